"""A save is cut short, fails on one rank, lacks memory: what `latest` names is whole, and the next save works."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_zero_and_memory import Case, start_engine, state_of, train_step

import model.checkpoint as program
from launch.run_dir import steps_to_resume
from model import phases
from model.checkpoint import REPLACED, SAVING, CheckpointWriter, choose_checkpoint, read_tensors
from model.manifest import read_manifest
from model.partition import TrainingPartition
from ranks import RankPool

CASE = Case("MOE", {"stage": 1}, 2)


class Killed(BaseException):
    """Stands for the end of the process."""


class Setting:
    """An engine of this rank, and what saves its state."""

    def __init__(self, run_dir: Path, keep_last: int = 2) -> None:
        import torch.distributed as dist

        self.rank, self.folder = dist.get_rank(), run_dir / "checkpoints"
        self.engine = start_engine(CASE)
        self.writer = CheckpointWriter(self.folder, keep_last)

    def save(self, step: int) -> None:
        self.writer.save(TrainingPartition(self.engine, 2), name(step), state_of(CASE, step))

    def saved(self, step: int) -> None:
        self.save(step)
        self.writer.wait()

    def found(self) -> tuple[int, list[str]]:
        """The step that a resumed run would begin with, and what it would say of others."""
        import torch.distributed as dist

        dist.barrier()
        names = [name(step) for step in steps_to_resume(self.folder.parent)]
        dist.barrier()
        chosen, manifest, notes = choose_checkpoint(self.folder, names, state_of(CASE, 0))
        assert chosen == name(manifest.state.step)
        return manifest.state.step, notes

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def name(step: int) -> str:
    return f"step_{step:08d}"


# --- cut short --------------------------------------------------------------------------------------------------------


def cut_short(run_dir: Path, phase: str, again: bool) -> dict[str, Any]:
    """A save whose thread on rank 0 ends when it reaches `phase`; what a new attempt finds, what a new save leaves."""
    import torch.distributed as dist

    setting = Setting(run_dir)
    setting.saved(5)

    def kill(reached: str) -> None:
        if reached == phase and setting.rank == 0:
            raise Killed

    phases.listeners.append(kill)
    try:
        setting.save(5 if again else 6)
        assert setting.writer.current is not None
        setting.writer.current.published.wait()
    finally:
        phases.listeners.remove(kill)
    dist.barrier()
    found = setting.found()
    setting.writer = CheckpointWriter(setting.folder, 2)
    setting.saved(7)
    left = setting.names()
    setting.engine.destroy()
    return {"found": found, "left": left}


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there already"])
@pytest.mark.parametrize("phase", ["save: write", "save: manifest", "save: rename", "save: latest", "save: retention"])
def test_a_save_that_is_cut_short_leaves_what_latest_names_whole(
    two_ranks: RankPool, tmp_path: Path, phase: str, again: bool
) -> None:
    done = phase == "save: retention" and not again
    for told in two_ranks.run(cut_short, tmp_path, phase, again):
        assert told["found"] == (6 if done else 5, [])
        published = {name(5)} | ({name(6)} if phase in ("save: latest", "save: retention") and not again else set())
        assert set(told["left"]) == {"latest", name(7), *sorted(published)[-1:]}


def folders_flushed_before(run_dir: Path, phase: str) -> list[str]:
    """Names of the folders that rank 0 flushed in its first save before it reached `phase`."""
    setting = Setting(run_dir)
    flushed: set[int] = set()
    found: set[int] = set()

    def note(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)

    def look(reached: str) -> None:
        if reached == phase:
            found.update(flushed)

    phases.listeners.append(look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        setting.saved(5)
    phases.listeners.remove(look)
    setting.engine.destroy()
    folders = [run_dir.parent, run_dir, setting.folder, setting.folder / name(5)]
    return [folder.name for folder in folders if folder.stat().st_ino in found]


def test_no_power_cut_leaves_a_checkpoint_and_not_the_folders_that_it_is_in(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "a"
    told, _ = two_ranks.run(folders_flushed_before, run_dir, "save: rename")
    assert told == ["runs", "a", name(5)]
    told, _ = two_ranks.run(folders_flushed_before, tmp_path / "runs" / "b", "save: latest")
    assert told == ["runs", "b", "checkpoints", name(5)]


def replace_half(run_dir: Path) -> tuple[int, list[str]]:
    """The machine stops between the two renames that put a checkpoint in the place of another."""
    setting = Setting(run_dir)
    setting.saved(4)
    setting.saved(5)
    if setting.rank == 0:
        (setting.folder / name(5)).replace(setting.folder / f"{REPLACED}{name(5)}")
        (setting.folder / f"{SAVING}{name(5)}").mkdir()
    found = setting.found()
    setting.engine.destroy()
    assert setting.names() == ["latest", name(4), name(5)]
    return found


def test_a_checkpoint_that_was_about_to_be_replaced_is_put_back(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(replace_half, tmp_path) == [(5, [])] * 2


# --- failing ----------------------------------------------------------------------------------------------------------


def fail_on_rank_1(run_dir: Path) -> dict[str, Any]:
    """A disk that is full for rank 1 alone, which is told when the save is waited for."""
    setting = Setting(run_dir)
    setting.saved(5)
    write_tensors = program.write_tensors

    def full(path: Path, *_: object) -> tuple[int, str]:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if setting.rank == 1:
        program.write_tensors = full
    try:
        setting.save(6)
        assert setting.writer.current is not None
        setting.writer.current.written.wait()
        assert setting.writer.has_failed == (setting.rank == 1), "it is known before anybody waits for the save"
        with pytest.raises(OSError, match="No space left") as raised:
            setting.writer.wait()
    finally:
        program.write_tensors = write_tensors
    assert not setting.writer.finish_alone(0), "it is not on disk"
    told = (raised.value.errno, Path(raised.value.filename).name, setting.found(), setting.names())
    setting.saved(7)
    assert setting.writer.finish_alone(0)
    after = setting.found()
    setting.engine.destroy()
    return {"told": told, "after": after}


def test_a_disk_that_is_full_for_one_rank_fails_the_save_on_all_and_harms_nothing(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for answer in two_ranks.run(fail_on_rank_1, tmp_path):
        assert answer["told"] == (errno.ENOSPC, "rank_00001.safetensors", (5, []), ["latest", name(5)])
        assert answer["after"] == (7, [])


def remove_while_writing(run_dir: Path) -> str:
    """Another process takes the unfinished save for remains, before rank 1 has written its part."""
    import torch.distributed as dist

    setting = Setting(run_dir)
    removed = threading.Event()

    def hold(reached: str) -> None:
        if reached == "save: write" and setting.rank == 1:
            removed.wait(10)

    phases.listeners.append(hold)
    setting.save(6)
    believed = False
    if setting.rank == 0:
        assert setting.writer.current is not None
        setting.writer.current.written.wait()
        program.clear_leftovers(setting.folder)
        believed = setting.writer.finish_alone(10)
    dist.barrier()
    removed.set()
    with pytest.raises(FileNotFoundError) as raised:
        setting.writer.wait()
    phases.listeners.remove(hold)
    setting.engine.destroy()
    assert not believed, "rank 0 says that it has saved"
    return str(raised.value)


def test_a_save_whose_folder_is_removed_is_not_taken_for_a_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    for told in two_ranks.run(remove_while_writing, tmp_path):
        assert "removed while it was being written" in told
        assert f"{SAVING}{name(6)}" in told


def lose_a_peer_while_publishing(run_dir: Path) -> tuple[int, list[str]]:
    """The other rank is gone when this one waits for a save that rank 0 is about to publish."""
    setting = Setting(run_dir, keep_last=1)
    setting.saved(5)
    go_on = threading.Event()

    def hold(reached: str) -> None:
        if reached == "save: rename":
            go_on.wait(10)

    def lost(*_: object) -> None:
        raise RuntimeError("gloo/transport: Connection reset by peer")

    phases.listeners.append(hold)
    try:
        setting.save(6)
        save = setting.writer.newest
        assert save is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program.dist, "all_gather_object", lost)
            with pytest.raises(RuntimeError, match="gloo/transport"):
                setting.writer.wait()
        go_on.set()
        save.published.wait()
    finally:
        phases.listeners.remove(hold)
    found = setting.found()
    setting.engine.destroy()
    return found


def test_what_is_being_published_stays_whole_though_a_peer_is_gone(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(lose_a_peer_while_publishing, tmp_path) == [(6, [])] * 2


def refuse_for_space(run_dir: Path) -> tuple[str, list[str]]:
    setting = Setting(run_dir)
    setting.saved(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(OSError, match="No space left") as raised:
            setting.save(6)
    setting.engine.destroy()
    return str(raised.value), setting.names()


def test_a_checkpoint_that_has_no_room_is_not_begun(two_ranks: RankPool, tmp_path: Path) -> None:
    for told, names in two_ranks.run(refuse_for_space, tmp_path):
        assert "a checkpoint of 0.00 GiB does not fit into 0.00 GiB" in told
        assert names == ["latest", name(5)]


# --- in the background ------------------------------------------------------------------------------------------------


def train_while_writing(run_dir: Path, memory: float) -> dict[str, Any]:
    """A step is taken after the save returns and before anything is written, if the save leaves that to a thread."""
    setting = Setting(run_dir)
    train_step(setting.engine, 0)
    go_on = threading.Event()

    def hold(reached: str) -> None:
        if reached == "save: write" and threading.current_thread() is not threading.main_thread():
            go_on.wait(10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "available_memory", lambda: memory)
        if memory:
            phases.listeners.append(hold)
        setting.save(1)
        in_background = setting.writer.current is not None
        train_step(setting.engine, 1)
        go_on.set()
        setting.writer.wait()
        phases.listeners[:] = [listener for listener in phases.listeners if listener is not hold]
    setting.saved(2)
    setting.engine.destroy()
    return {"in background": in_background, "stalled": setting.writer.stall_s > 0}


def test_what_is_written_in_the_background_is_the_state_at_the_time_of_the_save(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for memory, in_background in ((1e12, True), (0.0, False)):
        folder = tmp_path / str(in_background)
        for answer in two_ranks.run(train_while_writing, folder, memory):
            assert answer == {"in background": in_background, "stalled": True}
    saved = {
        (how, step): {(tensor, kind): values for tensor, kind, values in read_tensors(folder)}
        for how in ("True", "False")
        for step in (1, 2)
        for folder in [tmp_path / how / "checkpoints" / name(step)]
    }
    for step in (1, 2):
        ours, theirs = saved["True", step], saved["False", step]
        assert all(torch.equal(values, theirs[key]) for key, values in ours.items())
    later = saved["True", 2]
    assert any(not torch.equal(values, later[key]) for key, values in saved["True", 1].items() if key[1] == "weight")


# --- retention --------------------------------------------------------------------------------------------------------


def keep(run_dir: Path) -> list[list[str]]:
    setting = Setting(run_dir, keep_last=2)
    told = []
    for step in (0, 1, 2, 9, 3, 4):  # 9 is of a branch that was abandoned for 3
        setting.saved(step)
        told.append(setting.names())
    setting.engine.destroy()
    return told


def keep_beside_damaged(run_dir: Path) -> list[list[str]]:
    setting = Setting(run_dir)
    for step in (1, 2, 3):
        setting.saved(step)
    setting.writer = CheckpointWriter(setting.folder, 2, off_line=[name(3)])  # as found by who continued step 2
    told = []
    for step in (4, 5, 6):
        setting.saved(step)
        told.append(setting.names())
    setting.writer = CheckpointWriter(setting.folder, 2, off_line=[name(6)])
    setting.saved(6)  # anew: whole again
    setting.saved(7)
    setting.engine.destroy()
    return [*told, setting.names()]


def test_a_damaged_checkpoint_takes_no_whole_ones_place(two_ranks: RankPool, tmp_path: Path) -> None:
    told, _ = two_ranks.run(keep_beside_damaged, tmp_path)
    assert told == [
        ["latest", name(2), name(3), name(4)],
        ["latest", name(4), name(5)],
        ["latest", name(5), name(6)],
        ["latest", name(6), name(7)],
    ]


def begin_and_save(run_dir: Path, resume: str) -> tuple[list[str], list[str]]:
    """What is left when step 2 is continued, by train.py's choice, beside a step 9; saves at 3, 10 and 11."""
    import torch.distributed as dist

    import train

    setting = Setting(run_dir)
    for step in (1, 9, 2):
        setting.saved(step)
    dist.barrier()
    steps = (2,) if resume == "2" else steps_to_resume(run_dir)
    start = SimpleNamespace(
        topology=SimpleNamespace(ranks=2, ep_size=2),
        run=SimpleNamespace(deepspeed={"zero_optimization": CASE.zero}, config_hash="of the test"),
        beginning=SimpleNamespace(action="resume", steps=steps),
        args=SimpleNamespace(run_dir=run_dir, resume=resume),
    )
    data = SimpleNamespace(train=SimpleNamespace(fingerprint="synthetic"))
    beginning = train.begin_with(start, data)  # type: ignore[arg-type]
    assert beginning.checkpoint == setting.folder / name(2)
    setting.writer = CheckpointWriter(setting.folder, 2, beginning.off_line)
    setting.saved(3)
    setting.saved(10)
    at_10 = setting.names()
    setting.saved(11)
    setting.engine.destroy()
    return at_10, setting.names()


@pytest.mark.parametrize("resume", ["auto", "2"])
def test_a_checkpoint_of_an_abandoned_branch_takes_no_ones_place_when_it_is_passed(
    two_ranks: RankPool, tmp_path: Path, resume: str
) -> None:
    for told in two_ranks.run(begin_and_save, tmp_path, resume):
        assert told == (["latest", name(3), name(9), name(10)], ["latest", name(10), name(11)])


def test_the_newest_stay_and_later_steps_of_another_branch_are_not_touched(two_ranks: RankPool, tmp_path: Path) -> None:
    told, _ = two_ranks.run(keep, tmp_path)
    assert told == [
        ["latest", name(0)],
        ["latest", name(0), name(1)],
        ["latest", name(1), name(2)],
        ["latest", name(2), name(9)],
        ["latest", name(2), name(3), name(9)],
        ["latest", name(3), name(4), name(9)],
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == name(4)
    manifest = read_manifest(tmp_path / "checkpoints" / name(4))
    assert (manifest.state.step, manifest.state.samples) == (4, 32)
