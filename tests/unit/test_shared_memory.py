"""Which files in /dev/shm are removed after a run: those that dead ranks of this user left, and no other."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

from launch.shared_memory import PREFIX, remove_unused_buffers

HOLD = "import mmap, sys; file = open(sys.argv[1], 'r+b'); m = mmap.mmap(file.fileno(), 0); print(flush=True); input()"


def buffer(folder: Path, name: str) -> Path:
    path = folder / f"{PREFIX}{name}"
    path.write_bytes(bytes(mmap.PAGESIZE))
    os.utime(path, (0, 0))
    return path


def test_a_buffer_stays_while_a_process_has_it_mapped_and_goes_afterwards(tmp_path: Path) -> None:
    held = buffer(tmp_path, f"{os.getuid()}_127.0.0.1_29500_0")
    rank = subprocess.Popen([sys.executable, "-c", HOLD, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()
    left = buffer(tmp_path, f"{os.getuid()}_127.0.0.1_29500_1")
    assert remove_unused_buffers(tmp_path) == [left.name]
    assert held.exists()
    rank.kill()
    rank.communicate()
    assert remove_unused_buffers(tmp_path) == [held.name]
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_that_a_rank_of_another_run_has_made_and_not_yet_mapped_stays(tmp_path: Path) -> None:
    young = buffer(tmp_path, f"{os.getuid()}_127.0.0.1_29500_0")
    os.utime(young)
    hold = [sys.executable, "-c", f"import time; time.sleep(0.5); {HOLD}", young]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert remove_unused_buffers(tmp_path) == []
        assert young.exists()
        rank.kill()


def test_who_cannot_wait_leaves_a_young_buffer_to_the_next(tmp_path: Path) -> None:
    young = buffer(tmp_path, f"{os.getuid()}_127.0.0.1_29500_0")
    os.utime(young)
    assert remove_unused_buffers(tmp_path, wait_for_young=False) == []
    assert remove_unused_buffers(tmp_path) == [young.name]


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    buffer(tmp_path, f"{os.getuid() + 1}_127.0.0.1_29500_0")
    (tmp_path / "something_else").touch()
    assert remove_unused_buffers(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 2
    assert remove_unused_buffers(tmp_path / "nowhere") == []
