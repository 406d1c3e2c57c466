"""What a comparison of runs says, on runs made by hand; the reader of .wandb files on bytes made by hand.

Real run folders and real .wandb files are in tests/integration/test_compare_real_runs.py.
"""

import csv
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.apis.public import Run as RunOfServer

from launch.results import RunResult
from launch.wandb_records import BLOCK, MAGIC, read_online, whole_records
from tools.compare_runs import Comparison, as_markdown, as_text, compare, main, write_csv

ENV = {
    "commit": "0123456789abcdef", "devices": ["H200", "H200"], "world_size": 2, "packages": {"torch": "2.13.0"},
    "data": {"train": "aaa", "val": {"web": "bbb"}},
}  # fmt: skip


def a_run(name: str = "a", moe: dict[str, Any] | None = None, **changed: Any) -> RunResult:
    config = {"train_batch_size": 8, "run": {"model": {"moe": moe or {"top_k": 2}}, "wandb": {"name": name}}}
    summary = {"status": "completed", "step": 10, "train/loss": 2.0}
    return RunResult(**{"name": name, "folder": Path(name), "config": config, "env": ENV, "summary": summary} | changed)


def compared(*runs: RunResult, everything: bool = False) -> Comparison:
    return compare(list(runs), [], everything)


# --- configurations -------------------------------------------------------------------------------------------------


def test_a_key_that_differs_is_one_row_and_a_run_that_lacks_it_shows_a_dash() -> None:
    found = compared(a_run(moe={"top_k": 2}), a_run("b", moe={"top_k": 1, "bias": None}), a_run("c", moe={"top_k": 2}))
    assert found.keys == {"run.model.moe.top_k": ["2", "1", "2"], "run.model.moe.bias": [None, "null", None]}
    assert "\nrun.model.moe.bias   -  null  -\n" in as_text(found)


def test_keys_that_say_under_whose_name_a_run_happened_need_all() -> None:
    assert compared(a_run("a"), a_run("b")).keys == {}
    assert compared(a_run("a"), a_run("b"), everything=True).keys == {"run.wandb.name": ['"a"', '"b"']}


def test_if_nothing_differs_it_says_so() -> None:
    assert "Configuration\nnothing differs\n" in as_text(compared(a_run("a"), a_run("b")))
    assert "Nothing differs." in as_markdown(compared(a_run("a"), a_run("b")))


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [(1.0, 1, False), (True, 1, True), (0, False, True), ([1, 2], [1, 2.0], False), ([1], [2], True), ({}, None, True)],
)
def test_values_are_compared_as_json_where_1_is_1_0_but_not_true(one: object, other: object, differ: bool) -> None:
    assert bool(compared(a_run(moe={"key": one}), a_run("b", moe={"key": other})).keys) is differ


def test_runs_of_one_name_are_told_apart_by_their_folders_or_numbers() -> None:
    found = compared(a_run(folder=Path("x/a")), a_run("b"), a_run(folder=Path("y/a")))
    assert found.runs == ["x/a", "b", "y/a"]
    found = compared(a_run(folder=Path("x/a")), a_run("b"), a_run(folder=Path("z/x/a")))
    assert found.runs == ["x/a #1", "b", "x/a #2"]
    assert as_text(found).startswith("x/a #1: x/a\nb: b\nx/a #2: z/x/a\n")


# --- figures --------------------------------------------------------------------------------------------------------


def with_figures(name: str, **figures: object) -> RunResult:
    return a_run(name, summary={"status": "completed", **figures})


def test_a_figure_that_was_not_measured_is_a_dash_and_never_0() -> None:
    found = compared(with_figures("a", peak_mem_mib=100.0), with_figures("b"), with_figures("c", peak_mem_mib=math.nan))
    assert found.figures["peak_mem_mib"] == [100.0, None, None]
    assert "\npeak_mem_mib                100        -          -\n" in as_text(found)
    assert found.figures["tail50_mfu"] == [None, None, None]


def test_the_difference_to_the_first_run_is_in_percent_and_0_only_if_they_are_equal() -> None:
    runs = (
        with_figures("a", num_steps=4, peak_mem_mib=-2.0, total_time_min=0),
        with_figures("b", num_steps=5, peak_mem_mib=-3.0, total_time_min=7),
        with_figures("c", num_steps=4, peak_mem_mib=-2.000001),
    )
    lines = [line.split("  ") for line in as_text(compared(*runs)).splitlines()]
    rows = {line[0]: [each.strip() for each in line[1:] if each] for line in lines}
    assert rows["num_steps"] == ["4", "5 (+25.00%)", "4 (0%)"]
    assert rows["peak_mem_mib"] == ["-2", "-3 (-50.00%)", "-2 (-5e-05%)"]
    assert rows["total_time_min"] == ["0", "7", "-"]


def test_figures_come_in_the_stated_order_and_the_others_with_all() -> None:
    figures = {"zzz": 1, "parameters": {"total": 7}, "val/loss": 3.0, "val/bpb": 1.0, "tail50_dt_ms": 5.0, "step": 1}
    names = list(compared(with_figures("a", **figures), with_figures("b")).figures)
    assert names[:3] == ["status", "step", "num_steps"]
    assert names.index("tail50_dt_ms") < names.index("val/bpb") < names.index("val/loss") < names.index("train/loss")
    assert "zzz" not in names
    everything = list(compared(with_figures("a", **figures), with_figures("b"), everything=True).figures)
    assert everything == [*names, "parameters.total", "zzz"]


def test_what_the_summary_lacks_is_taken_from_the_last_step_that_logged_it() -> None:
    steps = [{"step": 1, "train/loss": 5.0, "train/aux_loss": 1.0}, {"step": 2, "train/loss": 4.0}]
    killed = a_run("killed", summary={"status": "running", "step": 0}, steps=steps)
    figures = compared(a_run(), killed).figures
    found = [figures[name][1] for name in ("status", "step", "train/loss", "train/aux_loss")]
    assert found == ["running", 2, 4.0, 1.0]


def test_a_loss_that_was_not_finite_at_the_end_is_a_dash_not_the_last_finite_one() -> None:
    steps = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": None}]
    diverged = a_run("nan", summary={"status": "nan", "train/loss": math.nan}, steps=steps)
    assert compared(a_run(), diverged).figures["train/loss"] == [2.0, None]


# --- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"commit": "fedcba9876543210"}, "commit differs: a: 0123456789; b: fedcba9876"),
        ({"dirty_hash": "77"}, "commit differs: a: 0123456789; b: 0123456789 with changes 77"),
        ({"devices": ["H100"]}, "hardware differs: a: 2 x H200; b: 1 x H100"),
        ({"devices": ["cpu"], "cpu": "Xeon"}, "hardware differs: a: 2 x H200; b: 1 x Xeon"),
        ({"world_size": 4}, "world_size differs: a: 2; b: 4"),
        ({"packages": {"torch": "2.14.0"}}, "torch differs: a: 2.13.0; b: 2.14.0"),
        ({"packages": {}}, "torch differs: a: 2.13.0; b: not recorded"),
        ({"data": {"train": "aaa", "val": {"web": "c"}}}, 'data.val.web differs: a: "bbb"; b: "c"'),
        ({"attempts": [ENV, {**ENV, "world_size": 1}]}, "world_size differs: a: 2; b: 2 then 1"),
    ],
)
def test_a_warning_says_what_makes_figures_hard_to_compare(changed: dict[str, Any], warning: str) -> None:
    assert compared(a_run(), a_run("b", env=ENV | changed)).warnings == [warning]
    assert f"\nwarning: {warning}" in as_text(compared(a_run(), a_run("b", env=ENV | changed)))


def test_a_run_with_forced_load_is_warned_about() -> None:
    found = compared(a_run(moe={"force_balanced": False}), a_run("b", moe={"force_balanced": True}))
    assert found.warnings == ["force_balanced differs: a: false; b: true"]


def test_runs_of_one_environment_give_no_warning() -> None:
    assert compared(a_run(), a_run("b", env={**ENV, "attempts": [ENV], "hostname": "other"})).warnings == []


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_csv_file_has_exact_numbers_json_for_keys_and_nothing_for_what_is_absent(tmp_path: Path) -> None:
    one = with_figures("a", **{"val/loss": 0.1 + 0.2})
    other = a_run("b", moe={"top_k": 1}, summary={}, env={**ENV, "world_size": 4})
    write_csv(tmp_path / "out.csv", compared(one, other))
    with open(tmp_path / "out.csv", newline="") as file:
        rows = {(row["table"], row["key"], row["run"]): row["value"] for row in csv.DictReader(file)}
    assert rows["source", "path", "a"] == "a"
    assert rows["configuration", "run.model.moe.top_k", "b"] == "1"
    assert float(rows["figure", "val/loss", "a"]) == 0.1 + 0.2
    assert rows["figure", "val/loss", "b"] == ""
    assert rows["environment", "world_size", "b"] == "4"


def test_the_markdown_file_is_tables_that_a_bar_in_a_cell_does_not_break() -> None:
    text = as_markdown(compared(a_run(moe={"x": "p|q"}), a_run("b", env={**ENV, "world_size": 4})))
    assert "| key | a | b |\n| --- | --- | --- |\n" in text
    assert '| run.model.moe.x | "p\\|q" | - |\n' in text
    assert text.endswith("## Warnings\n\n* world_size differs: a: 2; b: 4\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["file.txt"], "file.txt: is no run. Name a run folder, an offline W&B run (its .wandb file"),
        (["nowhere"], "nowhere: there is no run. Name a run folder"),
        (["empty"], "empty: is no run. Name a run folder"),
        (["one"], "one: holds 1 run, and it takes two to compare."),
        (["one", "./one"], "one: is named twice. Name every run once."),
        (["bad.wandb", "one"], "bad.wandb: is not a .wandb file of a version that is known here."),
        (["hollow.wandb", "one"], "hollow.wandb: holds no whole record of a run (empty, or damaged)."),
        (["broken", "one"], "broken: a line of its .jsonl files is damaged"),
        (["one", "one", "--md", "no/x.md"], "no/x.md: there is no folder no."),
        (["--ALL"], "python -m tools.compare_runs: "),
    ],
)
def test_what_is_no_run_is_refused_in_one_line_that_says_what_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "one", "broken"):
        (tmp_path / name).mkdir()
    for name in ("one", "broken"):
        (tmp_path / name / "env.json").write_text("{}")
    (tmp_path / "broken" / "metrics.jsonl").write_text("{\n")
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "bad.wandb").write_bytes(b":W&B\xe1\xbe\x07")
    (tmp_path / "hollow.wandb").write_bytes(MAGIC)
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse
        code = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("ConfigError: ")
    assert said in err
    assert err.count("\n") == 1


# --- the log format of .wandb files ----------------------------------------------------------------------------------


def chunk(kind: int, content: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + content), len(content), kind) + content


# Three records: one chunk; three chunks over three blocks; one chunk, after padding of fewer than seven bytes.
SMALL, LARGE, AFTER = b"small", b"x" * 40000, b"after"
LEFT = BLOCK - len(MAGIC) - len(chunk(1, SMALL))
PARTS = [LARGE[: LEFT - 7], LARGE[LEFT - 7 : LEFT - 7 + 7230], LARGE[LEFT - 7 + 7230 :]]
SECOND = chunk(3, PARTS[1]) + chunk(4, PARTS[2])
FILL = b"f" * (BLOCK - len(SECOND) - 7 - 3)
FILE = MAGIC + chunk(1, SMALL) + chunk(2, PARTS[0]) + SECOND + chunk(1, FILL) + bytes(3) + chunk(1, AFTER)


def test_records_are_put_together_over_blocks() -> None:
    assert len(MAGIC + chunk(1, SMALL) + chunk(2, PARTS[0])) == BLOCK
    assert whole_records(FILE) == ([SMALL, LARGE, FILL, AFTER], 0)


@pytest.mark.parametrize(
    ("at", "whole"),
    [(len(MAGIC) + 8, [FILL, AFTER]), (BLOCK + 8, [SMALL, AFTER]), (2 * BLOCK + 8, [SMALL, LARGE, FILL])],
    ids=("first", "second", "third"),
)
def test_a_damaged_chunk_costs_its_record_and_the_rest_of_its_block(at: int, whole: list[bytes]) -> None:
    assert whole_records(FILE[:at] + bytes([FILE[at] ^ 1]) + FILE[at + 1 :]) == (whole, 1)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_file_that_is_cut_short_gives_its_whole_records(cut: int) -> None:
    assert whole_records(FILE[:-cut]) == ([SMALL, LARGE, FILL], 1)


def test_a_file_that_ends_between_the_chunks_of_a_record_has_lost_it() -> None:
    assert whole_records(FILE[:BLOCK]) == ([SMALL], 1)


def test_zeros_that_a_crash_left_at_the_end_are_no_records() -> None:
    assert whole_records(FILE + bytes(100)) == ([SMALL, LARGE, FILL, AFTER], 1)


# --- W&B's server ---------------------------------------------------------------------------------------------------


class FakeRun:
    """The attributes of wandb.apis.public.Run that are read; its values as the server gives them."""

    def __init__(self) -> None:
        self.id, self.name = "04f682e2", "on the server"
        self.config = {"_wandb": {}, "train_batch_size": 8, "env": ENV}
        summary = {"status": "completed", "step": 10, "train/loss": 2}
        self.summary_metrics = {**summary, "_step": 10, "_wandb": {"runtime": 1}}

    def scan_history(self) -> list[dict[str, Any]]:
        return [
            {"_step": 2, "_timestamp": 1.0, "train/loss": "NaN"},
            {"_step": 1, "_timestamp": 0.0, "train/loss": 2.5},
        ]


class FakeApi:
    def run(self, path: str) -> FakeRun:
        if path != "team/moelab/04f682e2":
            raise ValueError(f"Could not find run <Run {path}\n (not found)>")
        return FakeRun()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "Api", FakeApi)


def test_the_stand_in_for_a_run_of_the_server_has_only_what_wandbs_has() -> None:
    for name in ("id", "name", "config", "summary_metrics", "scan_history"):
        assert hasattr(RunOfServer, name)
        assert hasattr(FakeRun(), name)


def test_a_run_of_the_server_is_read_like_its_folder(server: None) -> None:
    run = read_online("team/moelab/04f682e2")
    assert (run.name, run.config, run.env) == ("on the server", {"train_batch_size": 8}, ENV)
    assert run.summary == {"status": "completed", "step": 10, "train/loss": 2}
    assert run.steps == [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None}]


def test_runs_of_the_server_and_folders_are_compared(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    for name, content in {"env": ENV, "config": {"train_batch_size": 16}, "summary": {"status": "completed"}}.items():
        (tmp_path / "a" / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert main(["a", "team/moelab/04f682e2"]) == 0
    out = capsys.readouterr().out
    assert "\ntrain_batch_size  16  8\n" in out
    assert "warning" not in out


def test_a_run_that_the_server_does_not_give_is_refused_in_one_line(
    server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["moelab/other", "team/moelab/04f682e2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: moelab/other: W&B does not give this run: ValueError: Could not find run <Run")
    assert "There is no such file or folder either. Name a run folder" in err
    assert err.count("\n") == 1


def test_without_a_key_the_server_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    assert main(["team/moelab/04f682e2", "b"]) == 2
    assert "no API key; set WANDB_API_KEY" in capsys.readouterr().err
