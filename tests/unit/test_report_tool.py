"""Runs side by side: what is shown of run folders and of nanochat's logs, and what cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from launch.reference import read_reference
from launch.run_config import REPO_ROOT
from launch.run_dir import write_json
from launch.run_tables import read_runs, runs_report
from tools.report import main

DASH = "\N{EN DASH}"
SEED = REPO_ROOT / "benchmarks" / "seed_h800.json"
STEPS = [
    {"step": 0, "val/bpb": 3.25},
    {"step": 1, "train/loss": 5.5, "train/dt_ms": 250.5, "train/tok_per_sec": 16000.125, "train/grad_norm": None},
    {"step": 20, "train/loss": 1 / 3, "train/dt_ms": 200.0, "train/tok_per_sec": 20480.0, "val/bpb": 2.125},
]
SUMMARY = {
    "status": "completed",
    "step": 20,
    "num_steps": 20,
    "train/loss": 1 / 3,
    "val/bpb": 2.125,
    "tail50_tok_per_sec": 20480.4,
    "tail50_tok_per_sec_per_gpu": 10240.2,
    "tail50_dt_ms": 200.04,
    "tail50_mfu": 12.345,
    "peak_mem_mib": 23429.4,
    "time/compile_s": 31.25,
    "total_time_min": 3.5,
    "flops_per_token": 731.8e6,
    "peak_flops": 989e12,
    "parameters": {"total": 4_500_000},
    "tail50_step_ms": [200.0, 200.08],
}
LOG = """\
step 00000/00002 (0.00%) | loss: 10.400000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1,048,576 | mfu: 12.00
step 00001/00002 (50.00%) | loss: 9.500000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1,048,576 | mfu: 12.00
Peak memory usage: 23429.12MiB
Total training time: 0.00m
"""


def make_run(folder: Path, summary: dict[str, Any] = SUMMARY) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "env.json", {"commit": "0123456"})
    write_json(folder / "summary.json", summary)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS), encoding="utf-8")
    return folder


def make_log(path: Path) -> Path:
    path.write_text(LOG, encoding="utf-8")
    return path


def rows_of(markdown: str) -> list[dict[str, str]]:
    """Rows of the tables of a text, by the names of their columns."""
    rows, heads = [], []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        elif set(line) - set("|-: "):
            rows.append(dict(zip(heads, cells, strict=True)))
    return rows


# --- on the screen --------------------------------------------------------------------------------------------------


def test_a_run_folder_and_a_log_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_run(tmp_path / "ours")), str(make_log(tmp_path / "theirs.log"))]) == 0
    ours, theirs = rows_of(capsys.readouterr().out)
    assert ours == {
        "run": "ours", "status": "completed", "steps": "20", "tok/s": "20,480", "tok/s per GPU": "10,240",
        "dt ms": "200.0", "MFU %": "12.35", "peak MiB": "23,429", "compile s": "31.2", "minutes": "3.50",
        "train loss": "0.3333", "val/bpb": "2.1250",
    }  # fmt: skip
    assert theirs == {
        "run": "theirs", "status": "completed", "steps": "2", "tok/s": "1,048,576", "tok/s per GPU": DASH,
        "dt ms": "500.0", "MFU %": "12.00", "peak MiB": "23,429", "compile s": DASH, "minutes": DASH,
        "train loss": "9.5000", "val/bpb": DASH,
    }  # fmt: skip


def test_lines_of_a_table_line_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(make_run(tmp_path / "a")), str(make_run(tmp_path / "a_longer_name"))])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_the_peak_behind_every_mfu_and_the_smoothed_loss_are_said_once(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b"), make_log(tmp_path / "theirs.log")])
    note = runs_report(runs).tables[0].note
    assert note.count("a, b: MFU is percent of 989 TFLOP/s a GPU, by 731.8 MFLOP per token.") == 1
    assert "theirs: MFU is against the peak, and by the FLOPs per token, that nanochat assumed." in note
    assert "theirs: a log of nanochat, whose loss is a moving average" in note


def test_a_run_that_has_measured_nothing_yet_shows_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_run(tmp_path / "begun", {"status": "running", "step": 0}))]) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert {name for name, cell in row.items() if cell == DASH} == row.keys() - {"run", "status", "steps"}


def test_the_reference_stands_below_and_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_run(tmp_path / "ours")), "--reference", str(SEED)]) == 0
    out = capsys.readouterr().out
    assert out.index("Figures of merit") < out.index("The experiment that moelab continues, on 8 H800")
    ours, *theirs = rows_of(out)
    assert "run" in ours
    assert [row["leg"] for row in theirs] == [row.leg for row in read_reference(SEED).rows]


def test_runs_of_forced_load_or_synthetic_data_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forced = make_run(tmp_path / "forced", {**SUMMARY, "moe/force_balanced": 1.0})
    made_up = make_run(tmp_path / "made_up", {**SUMMARY, "data": "synthetic"})
    assert main([str(forced), str(made_up), str(make_run(tmp_path / "sound"))]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        "WARNING: forced: the load of the experts was forced: a benchmark of speed, which says nothing of a model",
        "WARNING: made_up: trained on synthetic data",
    ]


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo"), make_run(tmp_path / "other")]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "other"]


# --- curves ---------------------------------------------------------------------------------------------------------


def test_figures_hold_the_logged_steps_of_every_run_that_has_them(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "ours"), make_log(tmp_path / "theirs.log")])
    figures = {figure.name: figure for figure in runs_report(runs).figures}
    assert list(figures) == ["loss", "tok_per_sec", "mfu", "dt_ms"]
    ours, theirs = figures["loss"].curves
    assert (ours.leg, ours.x, ours.y) == ("ours", [1.0, 20.0], [5.5, 1 / 3])
    assert (theirs.leg, theirs.x, theirs.y) == ("theirs", [1.0, 2.0], [10.4, 9.5])
    assert [curve.run for curve in figures["mfu"].curves] == ["theirs"], "ours did not log it"


# --- files ----------------------------------------------------------------------------------------------------------


def test_out_holds_the_report_its_figures_and_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "ours"), make_log(tmp_path / "theirs.log")]
    out = tmp_path / "made" / "report"
    assert main([*map(str, runs), "--reference", str(SEED), "--out", str(out)]) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "report.md", "report.html", "runs.csv", "steps.csv",
        "figures/loss.png", "figures/tok_per_sec.png", "figures/mfu.png", "figures/dt_ms.png",
    }  # fmt: skip
    text = (out / "report.md").read_text(encoding="utf-8")
    assert [row["run"] for row in rows_of(text) if "run" in row] == ["ours", "theirs"]
    assert "The experiment that moelab continues, on 8 H800" in text
    with open(out / "steps.csv", encoding="utf-8", newline="") as file:
        steps = list(csv.DictReader(file))
    ours = [{name: json.loads(cell) for name, cell in row.items() if cell and name != "run"} for row in steps[:3]]
    assert ours == STEPS
    assert [(row["run"], row["step"], row["train/loss"]) for row in steps[3:]] == [
        ("theirs", "1", "10.4"),
        ("theirs", "2", "9.5"),
    ]
    with open(out / "runs.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], first["parameters.total"], first["tail50_tok_per_sec"]) == ("ours", "4500000", "20480.4")
    assert (second["run"], second["loss_is_smoothed"], second["val/bpb"]) == ("theirs", "true", "")
    assert "tail50_step_ms" not in first


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{tmp}/none"], "ConfigError: {tmp}/none: no such file or folder."),
        (["{tmp}"], "ConfigError: {tmp}: is not a run folder (no env.json)."),
        (["{tmp}/run", "{tmp}/run/"], "ConfigError: {tmp}/run stands twice."),
        (["{tmp}/empty.log"], "DataError: {tmp}/empty.log has no step line such as 'step 00119/00360"),
        (["{tmp}/damaged"], "DataError: {tmp}/damaged: a line of its metrics cannot be read (Expecting value"),
        (["{tmp}/run", "--reference", "{tmp}/none"], "ConfigError: --reference {tmp}/none: no such file."),
        (["{tmp}/run", "--reference", "{tmp}/run/env.json"], "ConfigError: env.json: reference.commit"),
        (["{tmp}/run", "--out", "{tmp}/empty.log"], "ConfigError: --out {tmp}/empty.log: cannot be made a folder"),
        ([], "ConfigError: python -m tools.report: the following arguments are required: RUN. See --help."),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    make_run(tmp_path / "run")
    (make_run(tmp_path / "damaged") / "metrics.jsonl").write_text("half a line\n")
    (tmp_path / "empty.log").touch()
    code: object
    try:
        code = main([argument.format(tmp=tmp_path) for argument in arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith(line.format(tmp=tmp_path)), printed.err
    assert printed.err.count("\n") == 1
