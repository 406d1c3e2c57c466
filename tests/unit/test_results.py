"""What a run folder holds, at whatever point its run is."""

import json
from pathlib import Path

from launch.results import RunResult, read_run


def test_a_last_line_without_its_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 5.0}\n{"step": 2, "train/loss": 4.0}')
    (tmp_path / "expert_load.jsonl").write_text('{"step": 1, "lay')
    run = read_run(tmp_path)
    assert run.steps == [{"step": 1, "train/loss": 5.0}]
    assert run.expert_load == []


def test_an_empty_folder_has_nothing_measured(tmp_path: Path) -> None:
    run = read_run(tmp_path, "leg/repeat1")
    assert (run.name, run.status, run.steps, run.figure("peak_mem_mib")) == ("leg/repeat1", "unknown", [], None)


def test_a_figure_is_a_number_and_zero_is_one(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"none": 0, "text": "0", "truth": True, "nothing": None}))
    run = read_run(tmp_path)
    assert [run.figure(name) for name in ("none", "text", "truth", "nothing", "absent")] == [0, None, None, None, None]


def test_a_series_leaves_out_what_was_not_finite(tmp_path: Path) -> None:
    steps = [{"step": 1, "loss": None}, {"step": 2, "loss": 0.0}, {"step": 3}]
    assert RunResult("run", tmp_path, steps=steps).series("loss") == ([2], [0.0])
