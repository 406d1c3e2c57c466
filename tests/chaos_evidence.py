"""What a disturbed run may leave behind, looked at without the code that wrote it: checkpoints, processes, folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import psutil

from tests.faults import flip_bit, truncate

MARK = "MOELAB_TEST_MARK"  # a variable that every process of a run inherits, whoever its parent is by then
NOT_A_RESULT = ("dt_ms", "tok_per_sec", "peak_mem", "mfu", "time/")  # what may differ between equal runs
SHARED_MEMORY = Path("/dev/shm")


# --- checkpoints ----------------------------------------------------------------------------------------------------


def latest(run_dir: Path) -> str | None:
    """The checkpoint that `latest` names: one that the run says is durable."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8", errors="replace").strip()
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*"))


def is_whole(checkpoint: Path) -> bool:
    """Whether the manifest is what its hash says, and every file what the manifest says."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
        told = {name: facts["sha256"] for name, facts in manifest["files"].items()}
        found = {name: digest((checkpoint / name).read_bytes()) for name in told}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(told) and found == told and digest(json.dumps(manifest, sort_keys=True).encode()) == stated


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """A digest of every file of tensors: equal runs on equal ranks write equal files."""
    return {path.name: digest(path.read_bytes()) for path in sorted(checkpoint.glob("*.safetensors"))}


def unfinished(run_dir: Path) -> dict[int, str]:
    """Folders of saves that did not end, by inode: a later save may use the name again."""
    folders = [path for path in (run_dir / "checkpoints").glob("*") if path.is_dir()]
    return {path.stat().st_ino: path.name for path in folders if not path.name.startswith("step_")}


# --- metrics --------------------------------------------------------------------------------------------------------


def results(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what is no result."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if not any(no in key for no in NOT_A_RESULT)} for line in lines]


def first_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]], whole: bool) -> str | None:
    """Where two runs part; None if nowhere. Unless `whole`, what was found may end early."""
    for mine, theirs in zip(found, expected, strict=False):
        # the last step of an attempt that stops is validated without being due; a line may be cut before its validation
        keys = [key for key in theirs if key in mine] if not whole else sorted(set(mine) | set(theirs))
        for key in keys:
            if mine.get(key) != theirs.get(key):
                return f"step {theirs['step']}: {key}={mine.get(key)!r}, undisturbed {theirs.get(key)!r}"
    if len(found) > len(expected) or (whole and len(found) != len(expected)):
        return f"{len(found)} lines, undisturbed {len(expected)}"
    return None


# --- processes and memory -------------------------------------------------------------------------------------------


def processes_of(mark: str) -> list[psutil.Process]:
    """The living processes that inherited the mark, wherever they have gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error, OSError):
        return process.cmdline()
    return []


def buffers_of(notes: Path) -> list[str]:
    """DeepSpeed's shared memory of the ranks that noted where they meet."""
    ports = {path.read_text() for path in notes.glob("port*")} - {""}
    names = SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*") if SHARED_MEMORY.is_dir() else []
    return sorted(path.name for path in names if path.name.split("_")[-2] in ports)


# --- damage between attempts ----------------------------------------------------------------------------------------


def damage(run_dir: Path, newest: Path, rng: random.Random) -> tuple[str, set[str]]:
    """Spoil something on the disk. Returns what was done, and the names that are no longer to be trusted."""
    latest_file = newest.parent / "latest"
    path = rng.choice([*sorted(newest.iterdir()), newest / "manifest.json", latest_file])
    way, size = rng.choice(["flip", "flip", "truncate", "empty", "remove"]), path.stat().st_size
    at = rng.randrange(size) if size else 0
    if way == "flip":
        flip_bit(path, at, bit := rng.randrange(8))
        way = f"flip bit {bit} of byte {at}"
    elif way == "remove":
        path.unlink()
    else:
        truncate(path, at := 0 if way == "empty" else at)
        way = f"truncate to {at} of {size} bytes"
    name = "latest" if path == latest_file else newest.name
    return f"{path.relative_to(run_dir)}: {way}", {name}


def leave_stray(run_dir: Path, rng: random.Random) -> str:
    """What a killed process, or a person, may leave in a run folder."""
    kind = rng.choice(["saving folder", "half a line", "temporary file", "empty checkpoint"])
    folder = run_dir / "checkpoints"
    if kind == "saving folder":
        stray = folder / f"saving_step_{rng.randrange(10**4):08d}"
        stray.mkdir(parents=True, exist_ok=True)
        (stray / "rank_00000.safetensors").write_bytes(rng.randbytes(100))
    elif kind == "half a line" and (run_dir / "metrics.jsonl").is_file():
        with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 7, "train/lo')
    elif kind == "empty checkpoint":
        (folder / f"step_{rng.randrange(10**6, 10**7):08d}").mkdir(parents=True, exist_ok=True)
    else:
        (run_dir / ".summary.json.1.tmp").write_text("{")
    return f"left a stray {kind}"


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
