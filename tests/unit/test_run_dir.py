"""Whether a run may begin or continue in a folder, and files that are never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.run_dir import (
    Beginning,
    checkpoint_name,
    decide_beginning,
    latest_step,
    saved_steps,
    write_json,
    write_text,
)
from model.config import ConfigError

HASH = "0123456789abcdef"


def make_run_dir(tmp_path: Path, *, steps: tuple[int, ...] = (), latest: str | None = None, **summary: Any) -> Path:
    """A run folder with env.json, checkpoints of these steps, and a summary if it is given."""
    run_dir = tmp_path / "run"
    for step in steps:
        (run_dir / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
    run_dir.mkdir(exist_ok=True)
    if latest is not None:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        (run_dir / "checkpoints" / "latest").write_text(latest)
    write_json(run_dir / "env.json", {"config_hash": HASH})
    if summary:
        write_json(run_dir / "summary.json", summary)
    return run_dir


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# --- where a run begins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_folder_is_a_fresh_run(tmp_path: Path, resume: str, exists: bool) -> None:
    run_dir = tmp_path / "run"
    if exists:
        run_dir.mkdir()
    assert decide_beginning(run_dir, HASH, resume) == Beginning("fresh", 0)
    assert run_dir.exists() == exists


@pytest.mark.parametrize(
    ("folder", "beginning"),
    [
        ({}, Beginning("fresh", 0)),
        ({"status": "failed"}, Beginning("fresh", 0)),
        ({"steps": (5, 10), "latest": "step_00000010", "status": "running"}, Beginning("resume", 10, (10, 5))),
        ({"steps": (5, 10), "latest": "step_00000005", "status": "failed"}, Beginning("resume", 5, (5, 10))),
        ({"steps": (5,), "latest": "step_00000005", "status": "stopped", "step": 5}, Beginning("resume", 5, (5,))),
        ({"steps": (5,), "latest": "step_00000005"}, Beginning("resume", 5, (5,))),
        ({"steps": (5, 10), "latest": ""}, Beginning("resume", 10, (10, 5))),
        ({"steps": (5, 10), "latest": "step_000\x0000005"}, Beginning("resume", 10, (10, 5))),
        ({"steps": (5, 10), "latest": "step_0000005"}, Beginning("resume", 10, (10, 5))),  # a digit is gone
        ({"steps": (5, 10), "latest": "step_00000005 10d43e81"}, Beginning("resume", 10, (10, 5))),  # CRC of another
        ({"steps": (5, 10)}, Beginning("resume", 10, (10, 5))),
        ({"steps": (5, 10, 15, 20), "latest": "step_00000010"}, Beginning("resume", 10, (10, 5, 20, 15))),
        ({"steps": (5, 15), "latest": "step_00000010"}, Beginning("resume", 15, (15, 5))),
        ({"steps": (10,), "latest": "step_00000010", "status": "completed", "step": 10}, Beginning("completed", 10)),
    ],
    ids=str,
)
def test_auto_continues_an_unfinished_run_and_leaves_a_completed_one(
    tmp_path: Path, folder: dict[str, Any], beginning: Beginning
) -> None:
    assert decide_beginning(make_run_dir(tmp_path, **folder), HASH, "auto") == beginning


def test_a_step_is_resumed_even_when_it_is_not_the_latest_or_the_run_is_completed(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path, steps=(5, 10), latest="step_00000010", status="completed", step=10)
    assert decide_beginning(run_dir, HASH, "5") == Beginning("resume", 5, (5,))


def test_a_step_that_was_about_to_be_replaced_is_resumed_by_either_way(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path, steps=(5,), latest="step_00000005")
    (run_dir / "checkpoints" / "step_00000005").rename(run_dir / "checkpoints" / "replaced_step_00000005")
    for resume in ("auto", "5"):
        assert decide_beginning(run_dir, HASH, resume) == Beginning("resume", 5, (5,))


@pytest.mark.parametrize(
    "content",
    [b"", b'{"config_hash": "\xff"}', b"5", b'["h"]', b"null", b"[" * 5000],
    ids=lambda content: repr(content[:9]),
)
@pytest.mark.parametrize("name", ["env.json", "summary.json"])
def test_a_damaged_file_is_refused_by_name_whatever_is_in_it(tmp_path: Path, name: str, content: bytes) -> None:
    run_dir = make_run_dir(tmp_path, steps=(5,), latest="step_00000005")
    (run_dir / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: is not valid JSON"):
        decide_beginning(run_dir, HASH, "auto")


def test_what_may_not_begin_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path, steps=(5, 10), latest="step_00000010")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "env.json").write_text('{"config_hash": ')
    before = listing(tmp_path)

    def refusal(folder: str, resume: str, config_hash: str = HASH) -> str:
        with pytest.raises(ConfigError) as error:
            decide_beginning(tmp_path / folder, config_hash, resume)
        return str(error.value)

    for folder in ("empty", "missing"):
        assert refusal(folder, "10") == (
            f"--resume 10: {tmp_path / folder} holds no run. Use --resume auto, or name the run's folder."
        )
    assert refusal("file", "auto") == f"--run_dir {tmp_path / 'file'}: is a file. Name a folder."
    assert refusal("other", "auto") == (
        f"--run_dir {tmp_path / 'other'}: is not empty and not a run folder (no env.json). Use another --run_dir."
    )
    assert refusal("damaged", "auto") == (
        f"{tmp_path / 'damaged' / 'env.json'}: is not valid JSON, so the folder cannot be trusted. "
        "Use another --run_dir."
    )
    assert refusal("run", "never") == (
        f"--resume never: {run_dir} is not empty. Use another --run_dir, or --resume auto to continue it."
    )
    assert refusal("run", "auto", "f" * 16) == (
        f"--run_dir {run_dir}: belongs to a run with another configuration (hash {HASH}, this one {'f' * 16}). "
        f"Use another --run_dir, or the run file in {run_dir / 'config.json'}."
    )
    for resume in ("7", "-5", "last", "5.0"):
        assert refusal("run", resume) == (
            f"--resume {resume}: no such checkpoint in {run_dir} (saved steps: 5, 10). Use one of them, or auto."
        )
    assert listing(tmp_path) == before


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"saved steps: none"):
        decide_beginning(make_run_dir(tmp_path), HASH, "5")


def test_a_latest_without_any_checkpoint_is_no_fresh_run(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path, latest="damaged")
    with pytest.raises(ConfigError, match=r"`latest` is there, and no checkpoint. Restore one, or remove `latest`"):
        decide_beginning(run_dir, HASH, "auto")


def test_saved_steps_are_checkpoint_folders_only_oldest_first(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path, steps=(100, 20))
    (run_dir / "checkpoints" / "step_00000030.partial").mkdir()
    (run_dir / "checkpoints" / "step_00000040").write_text("a file")
    assert saved_steps(run_dir) == [20, 100]
    assert saved_steps(tmp_path / "nowhere") == []
    assert latest_step(run_dir) is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"status": "running"})
    write_json(path, {"status": "completed", "step": 3})
    assert json.loads(path.read_text()) == {"status": "completed", "step": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_the_old_file_is_in_place_until_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    seen: list[str] = []
    fsync = os.fsync

    def look_then_fsync(file: int) -> None:
        seen.append(path.read_text())
        fsync(file)

    monkeypatch.setattr(os, "fsync", look_then_fsync)
    write_text(path, "new")
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_a_figure_that_is_not_a_number_is_not_written_as_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"tail50_mfu": float("nan")})
    assert not path.exists()
