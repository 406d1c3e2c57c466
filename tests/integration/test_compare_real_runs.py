"""Runs compared from what really lies on disk: run folders and the .wandb files that wandb writes beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from launch.results import read_run
from launch.run_config import REPO_ROOT, load_run
from launch.run_log import RunLog
from launch.wandb_records import CHUNK, read_offline, whole_records
from tools.compare_runs import main

STEPS = 10
ENV = {"commit": "0123456789abcdef", "devices": ["cpu"], "cpu": "Xeon", "world_size": 1, "packages": {"torch": "2"}}


@pytest.fixture(autouse=True)
def without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.chdir(tmp_path)


def attempt(
    folder: Path, *changes: str, steps: range = range(1, STEPS + 1), end: str | None = "completed", **env: Any
) -> Path:
    """One attempt at a run, as train.py would record it, with losses that depend on nothing but the step."""
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", ["run.wandb.mode=offline", *changes])
    log = RunLog(folder, run, resumed_step=steps.start - 1, total_steps=STEPS, enabled=True, environment={**ENV, **env})
    metrics: dict[str, float] = {}
    for step in steps:
        metrics = {"train/loss": 6.0 + 1 / (3 * step), "train/aux_loss": 1.0, "train/lr": 1e-3}
        log.log(step, metrics)
    log.progress(steps.stop)  # one more, which is not logged
    if end is None:
        log.wandb.run.finish()  # W&B's files are whole, but nothing says how the run ended
    else:
        log.finish(end, "done", {**metrics, "num_steps": STEPS, "peak_mem_mib": 7.5, "parameters": {"total": 7}})  # type: ignore[arg-type]
    wandb.teardown()  # wandb 0.31: finish() returns before the last block of the file is written
    return folder


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def section(out: str, title: str) -> list[str]:
    """The lines below a title, up to the next empty one."""
    lines = out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    return lines[begin : lines.index("", begin) if "" in lines[begin:] else None]


def row(out: str, figure: str) -> list[str]:
    """The cells of a figure; how wide the columns are depends on the times in them."""
    return next(cells for name, *cells in map(str.split, section(out, "Figures")) if name == figure)


def test_two_runs_that_differ_in_one_key_show_that_key_from_folders_files_and_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = attempt(tmp_path / "a", "run.wandb.group=x")
    b = attempt(tmp_path / "b", "run.model.moe.capacity_factor=2.0")
    for one, other in ((a, b), (wandb_files(a)[0], wandb_files(b)[0].parent), (a, b / "wandb"), (a / "wandb", b)):
        out = printed(capsys, one, other)
        assert section(out, "Configuration")[0].split() == ["key", "a", "b"]
        assert section(out, "Configuration")[1:] == ["run.model.moe.capacity_factor  1.25  2.0"]
        assert row(out, "train/loss") == ["6.03333", "6.03333", "(0%)"]
        assert "warning" not in out
    assert '\nrun.wandb.group                "x"' in printed(capsys, a, b, "--all")


def test_a_folder_and_its_own_wandb_file_hold_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = attempt(tmp_path / "a", steps=range(1, 201))
    file = wandb_files(folder)[0]
    assert file.stat().st_size > 2 * 32768  # more than one block
    out = printed(capsys, folder, file, "--all")
    assert section(out, "Configuration") == ["nothing differs"]
    for line in section(out, "Figures")[2:]:
        name, first, *rest = line.split()
        assert rest == ([first] if first == "-" else [first, "(0%)"]), name
    assert "warning" not in out
    assert read_run(folder).steps == next(iter(read_offline([file])[0].values())).steps


def test_a_wandb_folder_with_several_runs_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        file = wandb_files(attempt(tmp_path / name))[0]
        (tmp_path / "wandb").mkdir(exist_ok=True)
        file.parent.rename(tmp_path / "wandb" / file.parent.name)
    assert section(printed(capsys, tmp_path / "wandb"), "Configuration") == ["nothing differs"]


def test_the_files_of_a_resumed_run_are_joined_and_later_steps_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attempt(tmp_path / "a", end=None, steps=range(1, 8))
    attempt(folder, steps=range(5, STEPS + 1), commit="fedcba9876543210")
    files = wandb_files(folder)
    assert len(files) == 2
    runs, doubts = read_offline(reversed(files))
    (joined,) = runs.values()
    assert joined.steps == read_run(folder).steps
    assert [step["step"] for step in joined.steps] == list(range(1, STEPS + 1))
    assert doubts == []
    for arguments in ([folder / "wandb"], files):
        out = printed(capsys, folder, *arguments)
        assert section(out, "Configuration") == ["nothing differs"]
        assert row(out, "status") == ["completed", "completed"]
        assert row(out, "step") == ["11", "11", "(0%)"]
        assert "warning" not in out  # both say that the commits of the attempts differ
    other = attempt(tmp_path / "b")
    assert "commit differs: a: 0123456789 then fedcba9876; b: 0123456789" in printed(capsys, folder / "wandb", other)


def test_a_resumed_run_that_died_again_has_neither_end_nor_later_steps_of_an_earlier_attempt(tmp_path: Path) -> None:
    folder = attempt(tmp_path / "a", end="stopped", steps=range(1, 8))
    attempt(folder, end=None, steps=range(4, 6))
    (joined,) = read_offline(wandb_files(folder))[0].values()
    assert joined.steps == read_run(folder).steps
    assert (joined.status, joined.steps[-1]["step"]) == ("unknown", 5)


def test_of_a_truncated_file_the_whole_part_is_compared_and_a_warning_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = attempt(tmp_path / "a"), attempt(tmp_path / "b", "run.train.seed=1")
    file = wandb_files(b)[0]
    content = file.read_bytes()
    file.write_bytes(content[: 2 * len(content) // 3 + 3])  # among the steps, which come after the configuration
    out = printed(capsys, a, file)
    assert section(out, "Configuration")[1:] == ["run.train.seed  0  1"]
    assert 0 < int(row(out, "step")[1]) < STEPS
    assert row(out, "peak_mem_mib") == ["7.5", "-"]
    assert f"\nwarning: {file}: damaged or cut short (1 part lost); the rest is read\n" in out

    file.write_bytes(content[:40])
    assert main([str(a), str(file)]) == 2
    assert f"ConfigError: {file}: holds no whole record of a run" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = attempt(tmp_path / "a"), attempt(tmp_path / "b")
    file = wandb_files(b)[0]
    content = file.read_bytes()
    *_, last = whole_records(content)[0]  # says that the run has ended
    file.write_bytes(content[: -len(last) - CHUNK.size])
    out = printed(capsys, a, file)
    assert f"\nwarning: {file}: has no end; the run goes on, was killed, or the file is cut short\n" in out


def test_a_comparison_is_logged_as_one_wandb_run_with_two_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = attempt(tmp_path / "a"), attempt(tmp_path / "b", "run.train.seed=1")
    out = printed(capsys, a, b, "--log_wandb", "--project", "p", "--group", "g")
    assert "\nW&B: offline; send it with `wandb sync" in out
    wandb.teardown()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in (folder / "files" / "media" / "table").glob("*.json")]
    columns = [table["columns"] for table in tables]
    assert sorted(columns) == [["figure", "a", "b", "b to a (%)"], ["key", "a", "b"]]
    rows = [row for table in tables for row in table["data"]]
    assert ["run.train.seed", "0", "1"] in rows
    assert ["peak_mem_mib", 7.5, 7.5, 0.0] in rows
    assert ["tail50_mfu", None, None, None] in rows
    described = [Record.FromString(each).run for each in whole_records(next(folder.glob("*.wandb")).read_bytes())[0]]
    assert {(run.project, run.run_group, run.job_type) for run in described if run.run_id} == {("p", "g", "comparison")}
