"""Every kind of file of a checkpoint, damaged in every way: another whole one is continued, or the run is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_zero_and_memory import Case, load, save, start_engine, state_of, train_step

from launch.begin import Start
from launch.run_config import REPO_ROOT
from launch.run_dir import decide_beginning, latest_step, saved_steps
from model.checkpoint import read_tensors
from model.config import CheckpointError, ConfigError
from model.manifest import DamagedCheckpoint, read_manifest, write_manifest
from model.tensor_files import hash_of_file
from ranks import RankPool
from tests.faults import flip_bit, truncate

CASE = Case("MOE", {"stage": 1}, 2)
OLDER, NEWEST = "step_00000001", "step_00000003"  # one bit apart


class Payload:
    """What makes whoever unpickles it create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent.parent / "ran")))


def saved_by_torch(path: Path) -> None:
    torch.save({"weight": Payload(path.parent.parent / "ran")}, path)


WAYS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
    "empty": lambda path: truncate(path, 0),
    "cut to a few bytes": lambda path: truncate(path, 5),
    "half": lambda path: truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(1)),
    "one bit of its first byte": lambda path: flip_bit(path, 0),
    "one bit of its header": lambda path: flip_bit(path, 100),
    "one bit in the middle": lambda path: flip_bit(path, path.stat().st_size // 2),
    "one bit of its last byte": lambda path: flip_bit(path, -1),
    "another's": lambda path: path.write_bytes((path.parent.parent / OLDER / path.name).read_bytes()),
    "a pickle": pickled,
    "torch.save's": saved_by_torch,
}


def save_two_checkpoints(folder: Path) -> None:
    engine = start_engine(CASE)
    for step in (1, 2, 3):
        train_step(engine, step)
        if step != 2:
            save(engine, CASE, folder, step)
    engine.destroy()


def begin(run_dir: Path, resume: str) -> tuple[str, str]:
    """What train.py decides on every rank: the checkpoint, "" if it is refused, and what it says."""
    import torch.distributed as dist

    import train

    expected = state_of(CASE, 0)
    try:
        start = Start(
            args=Namespace(run_dir=run_dir, resume=resume),
            run=SimpleNamespace(config_hash=expected.config_hash, deepspeed={"zero_optimization": CASE.zero}),
            topology=SimpleNamespace(ranks=2, ep_size=CASE.ep_size),
            beginning=decide_beginning(run_dir, expected.config_hash, resume),
            rank=dist.get_rank(),
            local_rank=dist.get_rank(),
        )
        data = SimpleNamespace(train=SimpleNamespace(fingerprint=expected.data_fingerprint))
        beginning = train.begin_with(start, data)
    except (ConfigError, CheckpointError) as error:
        return "", f"{type(error).__name__}: {error}"
    assert beginning.checkpoint is not None
    return beginning.checkpoint.name, "\n".join(beginning.notes)


def load_newest(run_dir: Path) -> str:
    engine = start_engine(CASE)
    try:
        load(engine, CASE, run_dir / "checkpoints", 3)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return "loaded"


@pytest.fixture(scope="module")
def saved(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints OLDER and NEWEST."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    two_ranks.run(save_two_checkpoints, run_dir / "checkpoints")
    state = read_manifest(run_dir / "checkpoints" / NEWEST).state
    (run_dir / "env.json").write_text(json.dumps({"config_hash": state.config_hash}))
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def begun(two_ranks: RankPool, run_dir: Path, resume: str = "auto") -> tuple[str, str]:
    """What all ranks decide, alike; no payload has run, and nothing on the disk is another than before."""
    before = content_of(run_dir)
    first, second = two_ranks.run(begin, run_dir, resume)
    assert first == second, "the ranks decide differently"
    assert content_of(run_dir) == before
    return first


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_undamaged_the_newest_is_continued_and_nothing_is_said(two_ranks: RankPool, run_dir: Path) -> None:
    assert begun(two_ranks, run_dir) == (NEWEST, "")


@pytest.mark.parametrize(
    ("file", "way"),
    [(file, way) for file in ("rank_00000.safetensors", "manifest.json") for way in WAYS]
    + [("rank_00001.safetensors", way) for way in ("missing", "half", "one bit in the middle", "a pickle")],
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_continued(
    two_ranks: RankPool, run_dir: Path, file: str, way: str
) -> None:
    damaged = run_dir / "checkpoints" / NEWEST / file
    WAYS[way](damaged)
    name, said = begun(two_ranks, run_dir)
    assert name == OLDER
    assert str(damaged) in said or (file == "manifest.json" and str(damaged.parent) in said)
    assert f"names {NEWEST}; the newest checkpoint that is whole is {OLDER}" in said

    refused = begun(two_ranks, run_dir, resume="3")  # whoever asks for a step gets that one, or none
    assert refused[0] == ""
    way_out = "Give it its name back" if (file, way) == ("manifest.json", "another's") else "Resume from another step"
    assert re.match(rf"DamagedCheckpoint: {re.escape(str(damaged.parent))}.*{way_out}\.$", refused[1])

    shutil.rmtree(run_dir / "checkpoints" / OLDER)
    name, said = begun(two_ranks, run_dir)
    assert name == ""
    assert said.startswith(f"DamagedCheckpoint: {damaged.parent}")


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("a folder", "another's", "one bit of its header")])
def test_whatever_becomes_of_latest_the_newest_whole_checkpoint_is_continued(
    two_ranks: RankPool, run_dir: Path, way: str
) -> None:
    latest = run_dir / "checkpoints" / "latest"
    WAYS[way](latest)
    name, said = begun(two_ranks, run_dir)
    assert name == NEWEST
    named = {"one bit of its last byte": "step_00000002", "one bit in the middle": "step_01000003"}
    assert f"latest names {named.get(way, 'nothing')}; the newest checkpoint that is whole is {NEWEST}" in said


def test_no_cut_of_latest_makes_it_name_another_step_and_a_bit_that_does_is_told_of(
    two_ranks: RankPool, run_dir: Path
) -> None:
    latest = run_dir / "checkpoints" / "latest"
    whole = latest.read_bytes()
    assert latest_step(run_dir) == 3
    for bit in range(8 * len(whole)):
        flip_bit(latest, bit // 8, bit % 8)
        if latest_step(run_dir) in (1, 2):  # the others name steps that are not there, as 2 does
            name, said = begun(two_ranks, run_dir)
            if name == OLDER:
                assert f"names {OLDER}, though later ones are there ({NEWEST})" in said
            else:
                assert (name, f"the newest checkpoint that is whole is {NEWEST}" in said) == (NEWEST, True)
        latest.write_bytes(whole)
    for size in range(len(whole)):
        truncate(latest, size)
        assert latest_step(run_dir) in (None, 3), latest.read_bytes()
        latest.write_bytes(whole)


def test_no_bit_of_a_manifest_changes_unseen(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / NEWEST
    size = (checkpoint / "manifest.json").stat().st_size
    for byte in range(0, size, size // 400):
        flip_bit(checkpoint / "manifest.json", byte, byte % 8)
        with pytest.raises(DamagedCheckpoint):
            read_manifest(checkpoint)
        flip_bit(checkpoint / "manifest.json", byte, byte % 8)
    assert read_manifest(checkpoint).state.step == 3


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_a_payload_does_not_run_even_where_the_manifest_vouches_for_it(
    two_ranks: RankPool, run_dir: Path, write: Callable[[Path], None]
) -> None:
    """As somebody would who wants to be unpickled: the manifest has the hash of what he wrote."""
    checkpoint = run_dir / "checkpoints" / NEWEST
    file = checkpoint / "rank_00001.safetensors"
    write(file)
    manifest = read_manifest(checkpoint)
    facts = manifest.files[file.name].model_copy(update={"bytes": file.stat().st_size, "sha256": hash_of_file(file)})
    write_manifest(checkpoint, manifest.model_copy(update={"files": {**manifest.files, file.name: facts}}))
    assert begun(two_ranks, run_dir)[0] == NEWEST
    for said in two_ranks.run(load_newest, run_dir):
        assert re.match(rf"{re.escape(str(file))}: cannot be read \(.*\)\. Resume from another step\.$", said)
    assert not (run_dir / "checkpoints" / "ran").exists()
    with torch.serialization.safe_globals([]), pytest.raises((CheckpointError, pickle.UnpicklingError)):
        list(read_tensors(checkpoint))
    assert not (run_dir / "checkpoints" / "ran").exists()


def test_the_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    for write in (pickled, saved_by_torch):
        os.makedirs(tmp_path / "a" / "b")
        write(tmp_path / "a" / "b" / "file")
        with open(tmp_path / "a" / "b" / "file", "rb") as file:
            pickle.load(file) if write is pickled else torch.load(file, weights_only=False)
        assert (tmp_path / "a" / "ran").exists()
        shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("name", ["saving_step_00000007", "step_00000009"])
def test_a_folder_of_a_save_that_was_cut_short_is_not_continued(two_ranks: RankPool, run_dir: Path, name: str) -> None:
    stray = run_dir / "checkpoints" / name
    shutil.copytree(run_dir / "checkpoints" / NEWEST, stray)
    (stray / "manifest.json").unlink()
    (run_dir / "checkpoints" / "latest").unlink()
    first, second = two_ranks.run(begin, run_dir, "auto")
    assert first == second
    assert first[0] == NEWEST


# --- whole runs -----------------------------------------------------------------------------------------------------


def train(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config = REPO_ROOT / "ds_configs" / "moe_tiny.json"
    settings = ["--set", "run.launch.ep_size=1", "run.train.num_steps=6", "run.train.save_every=2"]
    return subprocess.run(
        [sys.executable, REPO_ROOT / "train.py", "--config", config, "--run_dir", run_dir, *options, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses(run_dir: Path) -> list[tuple[int, float | None]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("train/loss")) for line in lines]


def test_a_run_falls_back_says_so_and_ends_as_if_nothing_had_been_or_is_refused_and_loses_nothing(
    tmp_path: Path,
) -> None:
    assert train(tmp_path / "whole").returncode == 0
    run_dir = tmp_path / "damaged"
    assert train(run_dir, "--set", "run.train.stop_at_step=4").returncode == 3
    checkpoints = run_dir / "checkpoints"
    assert saved_steps(run_dir) == [2, 4]
    damaged = checkpoints / "step_00000004" / "rank_00000.safetensors"
    flip_bit(damaged, -1)

    before = content_of(run_dir)
    for resume in ("4", "3"):
        refused = train(run_dir, "--resume", resume)
        assert refused.returncode == 2
        assert "Error: " in refused.stderr.strip().splitlines()[-1] or "Damaged" in refused.stderr
        assert content_of(run_dir) == before

    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    assert f"{damaged}: is damaged (SHA-256 " in done.stdout
    assert "the newest checkpoint that is whole is step_00000002" in done.stdout
    assert "continued from step_00000002" in done.stdout
    assert losses(run_dir) == losses(tmp_path / "whole")
    read_manifest(checkpoints / "step_00000004")  # saved anew

    (run_dir / "summary.json").unlink()  # as if it had ended before it knew that it was completed
    for step in saved_steps(run_dir):
        truncate(checkpoints / f"step_{step:08d}" / "manifest.json", 10)
    before = content_of(run_dir)
    refused = train(run_dir)
    assert refused.returncode == 2
    assert "no checkpoint is whole" in refused.stderr
    assert content_of(run_dir) == before
