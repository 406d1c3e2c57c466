"""CSV files hold what was recorded, and nothing that was not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from launch.csv_files import write_rows_csv, write_steps_csv

NUMBERS = [0.1, 1 / 3, 1e-07, 1.5e300, -0.0, 2.0, 7, 2**70, 487.1, True, None]  # None: was not finite


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_steps_read_back_are_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "train/loss": value} for step, value in enumerate(NUMBERS)]
    metrics_jsonl = [json.loads(json.dumps(line)) for line in lines]
    write_steps_csv(tmp_path / "steps.csv", [({"leg": "a"}, line) for line in metrics_jsonl])
    rows = read_csv(tmp_path / "steps.csv")
    assert [json.loads(row["train/loss"]) for row in rows] == NUMBERS
    assert [row["train/loss"] for row in rows] == [json.dumps(value) for value in NUMBERS]  # 2.0 is not 2, nor -0.0 0
    assert [json.loads(row["step"]) for row in rows] == list(range(len(NUMBERS)))


def test_columns_are_what_identifies_then_step_then_metrics_by_name(tmp_path: Path) -> None:
    write_steps_csv(
        tmp_path / "steps.csv",
        [
            ({"leg": "b", "repeat": 1}, {"val/bpb": 1.25, "step": 0, "train/loss": 10.5}),
            ({"leg": "a", "repeat": 2}, {"step": 3, "moe/dropped_frac": 0.0}),
        ],
    )
    assert (tmp_path / "steps.csv").read_text(encoding="utf-8").splitlines() == [
        "leg,repeat,step,moe/dropped_frac,train/loss,val/bpb",
        "b,1,0,,10.5,1.25",
        "a,2,3,0.0,,",
    ]


def test_a_metric_that_a_line_lacks_is_empty_and_one_that_was_not_finite_is_null(tmp_path: Path) -> None:
    write_steps_csv(tmp_path / "steps.csv", [({}, {"step": 0, "train/loss": None}), ({}, {"step": 1, "val/bpb": 1.0})])
    first, second = read_csv(tmp_path / "steps.csv")
    assert (first["train/loss"], second["train/loss"]) == ("null", "")


def test_no_step_gives_a_header_alone(tmp_path: Path) -> None:
    write_steps_csv(tmp_path / "steps.csv", [])
    assert (tmp_path / "steps.csv").read_text(encoding="utf-8") == "step\n"


@pytest.mark.parametrize("name", ["step", "train/loss"])
def test_an_identifying_column_may_not_hide_one_of_the_step(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        write_steps_csv(tmp_path / "steps.csv", [({name: 1}, {"step": 0, "train/loss": 1.0})])
    assert not list(tmp_path.iterdir())


def test_rows_are_flattened_with_dots_and_without_lists(tmp_path: Path) -> None:
    rows = [
        {"leg": "a", "summary": {"status": "completed", "memory": {"peak_mib": 0.1}, "tail50_step_ms": [1.0, 2.0]}},
        {"leg": 'b, "quoted"\nand more', "summary": {"step": 20}},
    ]
    write_rows_csv(tmp_path / "summary.csv", rows)
    assert read_csv(tmp_path / "summary.csv") == [
        {"leg": "a", "summary.status": "completed", "summary.memory.peak_mib": "0.1", "summary.step": ""},
        {
            "leg": 'b, "quoted"\nand more',
            "summary.status": "",
            "summary.memory.peak_mib": "",
            "summary.step": "20",
        },
    ]


def test_a_number_that_json_does_not_have_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_rows_csv(tmp_path / "summary.csv", [{"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        write_rows_csv(tmp_path / "summary.csv", [{"a": float("nan")}])
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
    assert read_csv(tmp_path / "summary.csv") == [{"a": "1"}]
