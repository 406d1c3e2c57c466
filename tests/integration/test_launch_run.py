"""launch.run as a program: what it refuses without starting anything, and runs under the real `deepspeed` launcher.

The ranks run fake_train.py, which imports no torch: here the launcher is tested, not training.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from launch.run_config import REPO_ROOT
from launched import LAUNCH_FAKE, PATIENCE, TINY, Launched, environment


def launch_run(*arguments: str | Path, cwd: Path = REPO_ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launch.run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=environment())


# --- without starting anything --------------------------------------------------------------------------------------


def test_a_misspelt_deepspeed_key_is_refused_on_one_line_and_nothing_is_created(tmp_path: Path) -> None:
    tree = json.loads(TINY.read_text())
    tree["gradient_cliping"] = tree.pop("gradient_clipping")
    (tmp_path / "typo.json").write_text(json.dumps(tree))
    done = launch_run(tmp_path / "typo.json", "--run_dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"ConfigError: .*gradient_cliping.*gradient_clipping.*\n", done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_a_run_that_is_too_large_for_this_machine_and_creates_nothing(tmp_path: Path) -> None:
    done = launch_run(
        REPO_ROOT / "ds_configs" / "moe_d12.json",
        "--dry_run",
        "--run_dir",
        tmp_path / "run",
        "--set",
        "run.train.seed=3",
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert shlex.split(first)[:4] == ["deepspeed", "--num_gpus", "8", str(REPO_ROOT / "train.py")]
    assert shlex.split(first)[-2:] == ["--set", "run.train.seed=3"]
    text = "\n".join(rest)
    for fact in (
        "[0 1 2 3 4 5 6 7]",
        "456,206,592 total, 286,337,280 active, 169,869,312 inactive, 110,176,512 active matmul",
        "FLOPs per token     774,305,280",
        "tokens per step     524,288",
        "steps               1,733",
        "accumulation steps  4",
        "GiB",
        f"{tmp_path / 'run'} (a fresh run)",
    ):
        assert fact in text
    assert not (tmp_path / "run").exists()


def test_paths_are_relative_to_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(TINY.read_text())
    command = [sys.executable, "-m", "launch.run", "mine.json", "--run_dir", "here", "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=environment())
    assert f"--config {tmp_path / 'mine.json'} --run_dir {tmp_path / 'here'}" in done.stdout


def test_more_cpu_ranks_than_cores_are_refused_with_the_way_out(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    one_too_many = [f"run.launch.num_gpus={cores + 1}", f"train_batch_size={2 * (cores + 1)}", "run.launch.ep_size=1"]
    command = [sys.executable, "-c", LAUNCH_FAKE, str(tmp_path / "no_script.py"), str(TINY)]  # if started, ends at once
    command += ["--run_dir", str(tmp_path / "run"), "--set", *one_too_many]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    assert done.returncode == 2
    assert f"run.launch.num_gpus={cores + 1}, but this machine has no GPU and {cores} core" in done.stderr
    assert f"--set run.launch.num_gpus={cores} for CPU ranks" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_completed_folder_says_so_and_exits_0(tmp_path: Path) -> None:
    plan = "from launch.run_config import load_run; import sys; print(load_run(sys.argv[1]).config_hash)"
    command = [sys.executable, "-c", plan, str(TINY)]
    config_hash = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.strip()
    (tmp_path / "env.json").write_text(json.dumps({"config_hash": config_hash}))
    (tmp_path / "summary.json").write_text(json.dumps({"status": "completed", "step": 10}))
    done = launch_run(TINY, "--run_dir", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: completed at step 10. Nothing to do.\n")
    assert "completed at step 10: nothing to do" in launch_run(TINY, "--run_dir", tmp_path, "--dry_run").stdout


def test_neither_torch_nor_deepspeed_nor_wandb_is_imported_before_the_run_starts() -> None:
    code = "import sys, launch.run, launch.run_log; print(*{'torch', 'deepspeed', 'wandb'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout == "\n"


# --- under the deepspeed launcher -----------------------------------------------------------------------------------


def test_a_completed_run_is_a_success_though_its_ranks_end_badly_and_leave_a_worker(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "complete")
    assert launched.end() == 0, launched.printed()
    assert launched.summary()["status"] == "completed"
    assert (launched.notes / "worker").exists()


def test_one_sigterm_stops_every_rank_at_its_own_pace(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "never")
    launched.await_training()
    assert len(launched.pids()) == 4  # two ranks, launch.py, the runner
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 3, launched.printed()
    assert launched.summary().items() >= {"status": "stopped", "reason": "asked by a signal"}.items()


def test_ranks_that_outlive_deepspeed_are_asked_to_save(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "never")
    launched.await_training()
    runner = psutil.Process(launched.process.pid).children()[0]
    runner.kill()
    assert launched.end() == 3, launched.printed()
    assert "deepspeed has ended without its ranks" in launched.printed()
    assert launched.summary()["status"] == "stopped"


def test_ranks_that_vanish_leave_a_summary_that_says_failed(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "crash")
    assert launched.end() == 4, launched.printed()
    assert launched.summary()["status"] == "failed"
    assert launched.summary()["reason"] == "ranks ended without a final status; launcher exit code 7"


def test_a_refusal_by_the_ranks_is_printed_once_and_nothing_is_created(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "refuse")
    assert launched.end() == 2, launched.printed()
    assert launched.printed().count("DataError: run.data.train=nowhere: no token files.") == 1
    assert not launched.run_dir.exists()
