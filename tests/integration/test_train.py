"""train.py as a user starts it: exact resume, stopping, refusing, and what it leaves in the run folder."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.environment import utc_now
from launch.run_config import REPO_ROOT
from model.checkpoint import read_tensors

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
TIMEOUT = 240  # seconds; against hanging only
NOT_A_RESULT = ("dt_ms", "tok_per_sec", "peak_mem", "time/")  # what may differ between equal runs


def command(ranks: int, run_dir: Path, *options: str, config: Path = TINY) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [
        sys.executable,
        *launcher,
        str(REPO_ROOT / "train.py"),
        "--config",
        str(config),
        "--run_dir",
        str(run_dir),
        *options,
    ]


def environment(ranks: int) -> dict[str, str]:
    # The same number of threads whatever the machine: sums are taken in another order by other numbers of threads.
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def train(ranks: int, run_dir: Path, *options: str, config: Path = TINY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, run_dir, *options, config=config),
        env=environment(ranks),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(word in key for word in NOT_A_RESULT)} for line in lines
    ]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


MUON = (
    "gradient_clipping=0",
    'optimizer={"type": "Muon", "params": {"lr": null, "muon_lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}}',
    "run.train.router_optimizer=adamw",
)


@pytest.mark.parametrize(("ranks", "optimizer"), [(2, MUON)], ids=["two ranks, Muon"])  # AdamW: test_chaos.py
def test_ten_steps_equal_five_and_five_resumed_bit_for_bit(
    ranks: int, optimizer: tuple[str, ...], tmp_path: Path
) -> None:
    """Stopped in the middle of the decay of the learning rate."""
    settings = ("--set", "bf16.enabled=true", "run.train.decay_frac=0.8", "run.train.decay_shape=1-sqrt", *optimizer)
    whole = train(ranks, tmp_path / "whole", *settings)
    assert whole.returncode == 0, whole.stderr
    first = train(ranks, tmp_path / "halves", *settings, "run.train.stop_at_step=5")
    assert first.returncode in ((3,) if ranks == 1 else (1,)), first.stderr  # torchrun has its own code
    assert summary(tmp_path / "halves")["status"] == "stopped"
    assert [line["step"] for line in metrics(tmp_path / "halves")] == [0, 1, 2, 3, 4, 5]
    second = train(ranks, tmp_path / "halves", *settings)
    assert second.returncode == 0, second.stderr

    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == list(range(11))
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert ("muon" in log.split("step 0/10")[0]) == bool(optimizer), "the table of parameters stands before step 0"
    for line in metrics(tmp_path / "whole")[1:]:
        assert ("train/grad_norm" in line) != bool(optimizer), "under Muon DeepSpeed has no norm of the gradients"
        assert ("train/adam_lr" in line) == bool(optimizer)
    assert summary(tmp_path / "halves")["val/loss"] == summary(tmp_path / "whole")["val/loss"]
    assert summary(tmp_path / "whole")["status"] == "completed"
    whole_weights, halves_weights = weights(tmp_path / "whole", 10), weights(tmp_path / "halves", 10)
    assert whole_weights.keys() == halves_weights.keys()
    experts = [values for name, values in whole_weights.items() if ".experts." in name]
    assert [len(values) for values in experts] == [4, 4] * 2, "2 layers of 2 stacks of 4 experts"
    assert all(torch.equal(whole_weights[name], halves_weights[name]) for name in whole_weights)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All weights in a checkpoint, by name."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {name: values for name, kind, values in read_tensors(folder) if kind == "weight"}


def test_a_stopped_run_exits_with_three_and_a_completed_one_is_not_run_again(tmp_path: Path) -> None:
    assert train(1, tmp_path / "run", "--set", "run.train.stop_at_step=2").returncode == 3
    assert train(1, tmp_path / "run", "--set", "run.train.num_steps=10").returncode == 0
    again = train(1, tmp_path / "run")
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout


def test_sigterm_saves_at_a_step_boundary_and_the_run_continues(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("--set", "run.train.num_steps=2000", "run.train.save_every=1000")
    with subprocess.Popen(command(1, run_dir, *options), env=environment(1), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + TIMEOUT
        while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 4:
            assert process.poll() is None, "the run ended early"
            assert time.monotonic() < deadline, "the run did not get going"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 3
    stopped = summary(run_dir)
    assert stopped["status"] == "stopped"
    assert (run_dir / "checkpoints" / f"step_{stopped['step']:08d}" / "manifest.json").exists()
    resumed = train(1, run_dir, *options, f"run.train.stop_at_step={stopped['step'] + 2}")
    assert resumed.returncode == 3, resumed.stderr
    assert [line["step"] for line in metrics(run_dir)] == list(range(stopped["step"] + 3))


def test_a_run_continues_with_other_ranks_on_the_same_documents(tmp_path: Path) -> None:
    """Two ranks with the experts split, one rank, two ranks with the experts replicated: the losses are those of the
    undisturbed run, but for the rounding of sums that are taken in another order."""
    options = ("--set", "run.train.save_every=2", "run.train.log_every=1")
    assert train(1, tmp_path / "whole", *options).returncode == 0
    for ranks, settings in (
        (2, ("run.launch.ep_size=2", "run.train.stop_at_step=3")),
        (1, ("zero_optimization.stage=2", "run.train.stop_at_step=6")),
        (2, ("run.launch.ep_size=1", "run.model.moe.expert_backend=loop")),
    ):
        done = train(ranks, tmp_path / "parts", *options, *settings)
    assert done.returncode == 0, done.stderr
    parts, whole = metrics(tmp_path / "parts"), metrics(tmp_path / "whole")
    assert [line["step"] for line in parts] == list(range(11))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() & {"train/loss", "val/loss", "train/grad_norm", "train/tokens"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert "step_00000003 was saved with world_size=2; this run has 1" in log
    assert "step_00000003 was saved with zero_stage=1; this run has 2" in log
    assert "step_00000006 was saved with world_size=1; this run has 2" in log


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            ("gradient_cliping=1.0",),
            "ConfigError: gradient_cliping is not a known key. Did you mean gradient_clipping?",
        ),
        (("run.data.train=nowhere/train",), "DataError: nowhere/train"),
        (("run.train.cross_entropy=liger",), "ConfigError: run.train.cross_entropy='liger' has kernels for GPUs only"),
        (
            ("run.launch.ep_size=2",),
            "ConfigError: run.launch.ep_size=2 does not divide the 1 rank (1 node x 1 GPU). Use 1.",
        ),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_two_and_creates_nothing(
    options: tuple[str, ...], error: str, tmp_path: Path
) -> None:
    refused = train(1, tmp_path / "run", "--set", *options)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith(error)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(1, run_dir, "--set", "run.train.stop_at_step=1")
    running = {"status": "running", "hostname": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}
    (run_dir / "summary.json").write_text(json.dumps(running))
    refused = train(1, run_dir)
    assert refused.returncode == 2
    assert f"a run is writing to it (process {os.getpid()}" in refused.stderr
    assert json.loads((run_dir / "summary.json").read_text()) == running


def test_a_nan_ends_the_run_as_nan_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(1, run_dir, "--set", "optimizer.params.lr=1e30", "gradient_clipping=0", "run.train.save_every=1")
    assert done.returncode == 4
    assert summary(run_dir)["status"] == "nan"
    last_saved = (run_dir / "checkpoints" / "latest").read_text().split()[0]
    assert f"last saved: {last_saved}" in summary(run_dir)["reason"]
    assert last_saved == "step_00000001", "steps whose update is skipped do not push out what was saved before"
    assert all(value.isfinite().all() for value in weights(run_dir, int(last_saved.removeprefix("step_"))).values())


def test_an_update_that_is_skipped_between_logged_steps_ends_the_run_at_once(tmp_path: Path) -> None:
    settings = ("optimizer.params.lr=1e30", "gradient_clipping=0", "run.train.log_every=9")
    settings += ("run.train.max_skipped_steps=0",)
    done = train(1, tmp_path / "run", "--set", *settings)
    assert done.returncode == 4
    assert summary(tmp_path / "run")["status"] == "nan"
    assert summary(tmp_path / "run")["step"] == 2, "the first update is finite and enormous"


def test_a_dense_model_trains_and_reports_no_routing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(1, run_dir, "--set", "run.model.moe=null", "run.model.ffn_hidden_size=64", "run.launch.ep_size=1")
    assert done.returncode == 0, done.stderr
    assert metrics(run_dir)[-1]["train/loss"] < metrics(run_dir)[1]["train/loss"]
    assert not any(key.startswith("moe/") for line in metrics(run_dir) for key in line)


def test_the_run_folder_says_what_ran(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(1, run_dir, "--set", "run.train.num_steps=8")
    config, env = (json.loads((run_dir / name).read_text()) for name in ("config.json", "env.json"))
    assert config["run"]["train"]["num_steps"] == 8
    assert config["run"]["model"]["rope_theta"] == 10000.0, "defaults are filled in"
    assert env["config_hash"] == summary(run_dir)["config_hash"]
    assert env["data"]["train"].startswith("synthetic-")
    assert env["data"]["tokenizer"] is None, "synthetic data has no tokenizer"
    assert env["torch"]["git_version"] == torch.version.git_version
    assert env["torch"]["threads"] == 1
    assert [rank.keys() for rank in env["ranks"]] == [{"hostname"}], "one rank, and no GPU"
    done = summary(run_dir)
    assert done["tail_steps"] == 5, "the first three steps are warm-up and stay out of throughput"
    assert done["tail50_tok_per_sec"] > 0
    assert "tail50_mfu" not in done, "an unknown device has no peak, so no MFU"
    log = (run_dir / "log.txt").read_text()
    assert "attention: FLASH_ATTENTION, as torch chooses; cross-entropy: chunked" in log
    assert "completed" in log


def test_validation_is_the_loss_of_the_whole_split_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    """val/bpb = nats of every token of the split / ln 2 / bytes of its text, also from half the batches each."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(
            f"Document {number} says: naïve café, " + "round and round it goes. " * (20 + number)
        )
    prepare = [sys.executable, "-m", "tools.prepare_data", "--input", str(texts), "--out", str(tmp_path / "data")]
    subprocess.run([*prepare, "--vocab_size", "300", "--val_frac", "0.3"], check=True, cwd=REPO_ROOT, timeout=TIMEOUT)
    figures = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]["val"]

    data = [f"run.data.{split}={tmp_path / 'data' / split}" for split in ("train", "val")]
    options = ("--set", *data, "run.train.num_steps=1", "run.train.sample_tokens=4")
    alone, together = (train(ranks, tmp_path / f"run{ranks}", *options) for ranks in (1, 2))
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    assert "sample after step 1: 'The state of the Union" in alone.stdout
    first, other = metrics(tmp_path / "run1")[0], metrics(tmp_path / "run2")[0]
    assert other["val/loss"] == pytest.approx(first["val/loss"], rel=1e-6)
    assert first["val/bpb"] == pytest.approx(first["val/loss"] * figures["tokens"] / math.log(2) / figures["bytes"])
    assert first["val/loss"] == pytest.approx(math.log(512), rel=0.02), "a fresh model is uniform over its vocabulary"


def test_the_demo_runs_under_the_deepspeed_launcher_with_the_built_in_corpus(tmp_path: Path) -> None:
    """What `make train` does, two steps of it: first use of the corpus by two ranks, with shared experts."""
    run_dir = tmp_path / "run"
    launch = [sys.executable, "-m", "launch.run", "ds_configs/demo.json", "--run_dir", str(run_dir), "--set"]
    changes = [
        "run.train.num_steps=2",
        "run.data.val=synthetic",
        "run.wandb.mode=disabled",
        "run.train.sample_tokens=4",
    ]
    done = subprocess.run(
        [*launch, *changes],
        cwd=REPO_ROOT,
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(run_dir)["status"] == "completed"
    assert (summary(run_dir)["world_size"], summary(run_dir)["ep_size"]) == (2, 2)
    assert "sample after step 2" in done.stdout


@pytest.mark.parametrize("stopped_at", [2, 10])
def test_starting_a_finished_stretch_again_takes_no_step_and_saves_nothing(stopped_at: int, tmp_path: Path) -> None:
    options = ("--set", f"run.train.stop_at_step={stopped_at}")
    train(1, tmp_path / "run", *options)
    saved = tmp_path / "run" / "checkpoints" / f"step_{stopped_at:08d}"
    before = saved.stat().st_ino
    if stopped_at == 10:  # as if the run had died between its last save and its summary
        (tmp_path / "run" / "summary.json").unlink()
    assert train(1, tmp_path / "run", *options).returncode == (0 if stopped_at == 10 else 3)
    assert saved.stat().st_ino == before
    assert summary(tmp_path / "run")["step"] == stopped_at
