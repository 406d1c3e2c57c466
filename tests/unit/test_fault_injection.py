"""The faults that tests inject happen when and as they are meant to (tests/faults.py)."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_config import REPO_ROOT
from tests.faults import NOTES, PLAN, RUN_DIR, Fault, Injector, flip_bit, plan_as_text, truncate

REACH = """
import os, sys
from model.phases import reached
from tests import faults
faults.install(int(os.environ["RANK"]))
for phase in sys.argv[1:]:
    reached(phase)
"""
FULL = """
import sys
from pathlib import Path
from tests.faults import fill_disk
folder = Path(sys.argv[1])
(folder / "before").write_bytes(bytes(100))
fill_disk(str(folder / "full"), 1000)
(folder / "full" / "small").write_text("x" * 400)
(folder / "elsewhere").write_bytes(bytes(10_000))
try:
    with open(folder / "full" / "large", "wb") as file:
        file.write(bytes(700))
except OSError as error:
    print(error.errno, error.filename)
assert (folder / "full" / "small").read_text() == "x" * 400
"""


def reach(folder: Path, fault: Fault, rank: int, *phases: str) -> int:
    (folder / "notes").mkdir(exist_ok=True)
    faults = {PLAN: plan_as_text([fault]), NOTES: str(folder / "notes"), RUN_DIR: str(folder)}
    environment = {**os.environ, **faults, "RANK": str(rank), "PYTHONPATH": str(REPO_ROOT)}
    return subprocess.run([sys.executable, "-c", REACH, *phases], env=environment, check=False).returncode


def test_a_fault_comes_when_its_rank_reaches_its_phase_for_the_nth_time(tmp_path: Path) -> None:
    kill = Fault("SIGKILL", 1, "forward", times=2)
    assert reach(tmp_path, kill, 0, "forward", "forward", "forward") == 0
    assert reach(tmp_path, kill, 1, "forward", "update") == 0
    assert not (tmp_path / "notes" / "faults.jsonl").exists()
    assert reach(tmp_path, kill, 1, "forward", "save: write", "forward") == -signal.SIGKILL
    (note,) = map(json.loads, (tmp_path / "notes" / "faults.jsonl").read_text().splitlines())
    assert (note["fault"], note["phase"]) == (str(kill), "forward")
    phases = (tmp_path / "notes" / "phase1").read_text()
    assert phases.split() == ["forward", "save:", "write"], "what the rank was doing, and its thread"


def test_a_fault_of_a_step_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NOTES, raising=False)
    fault = Fault("slow", 0, "forward", times=2, step=5)
    injector = Injector([fault], 0)
    injector.step = 4
    assert [injector.due("forward") for _ in range(3)] == [[], [], []]
    injector.step = 5
    assert [injector.due("forward") for _ in range(3)] == [[], [fault], []]


def test_the_newest_file_that_a_pattern_names_is_damaged(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        (tmp_path / name).write_bytes(b"abcdef")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert reach(tmp_path, Fault("flip", 0, "load", bytes=7, file="???"), 0, "load") == 0
    assert reach(tmp_path, Fault("truncate", 0, "load", bytes=2, file="ol*"), 0, "load") == 0
    assert ((tmp_path / "new").read_bytes(), (tmp_path / "old").read_bytes()) == (b"accdef", b"ab")


def test_a_full_disk_takes_what_there_is_room_for_and_then_says_so(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    told = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert told.split() == [str(errno.ENOSPC), str(tmp_path / "full" / "large")]
    assert {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == {
        "before": 100,
        "small": 400,
        "elsewhere": 10_000,
        "large": 600,
    }


def test_a_flipped_bit_leaves_size_and_time_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    before = file.stat()
    flip_bit(file, -1, 3)
    assert file.read_bytes() == b"abk"
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    flip_bit(file, -1, 3)
    truncate(file, 9)
    assert file.read_bytes() == b"abc"


def test_after_a_power_cut_only_what_was_flushed_has_its_content(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    program = """
import os, pathlib, subprocess, sys, time
if len(sys.argv) == 1:
    sys.exit(subprocess.run([sys.executable, sys.argv[0], "rank"]).returncode)
from tests import faults
from model.phases import reached
faults.install(0)
for name in ("flushed", "lost"):
    with open(pathlib.Path(os.environ["MOELAB_TEST_RUN_DIR"], "checkpoints", name), "w") as file:
        file.write("content")
        file.flush()
        if name == "flushed":
            os.fsync(file.fileno())
reached("save: latest")
"""
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "notes").mkdir()
    plan = plan_as_text([Fault("power", 0, "save: latest")])
    faults = {PLAN: plan, NOTES: str(tmp_path / "notes"), RUN_DIR: str(tmp_path), "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env={**os.environ, **faults}, check=False)
    assert done.returncode == 256 - signal.SIGKILL
    contents = {path.name: path.read_text() for path in (tmp_path / "checkpoints").iterdir()}
    assert contents == {"flushed": "content", "lost": ""}
