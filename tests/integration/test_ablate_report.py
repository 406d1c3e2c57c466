"""The report of a suite, from run folders that fake_launch.py left: verdicts, files, and what it must not believe."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_ablate import FAKE_LAUNCH, LEGS, Ablation

from launch.comparison import Comparison
from launch.experiment import Experiment
from launch.report import build_report, write_report
from launch.report_parts import Report, Table
from launch.results import read_lines

ANOTHER_SEED = {"question": "Nothing but noise?", "patch": {"run": {"train": {"seed": 100}}}}
GATES = [
    {"metric": "tail50_tok_per_sec", "at_least": "1.03x baseline"},
    {"metric": "train/loss", "no_worse_than": "baseline + 2 sigma"},
]
FOUR_FIGURES = ("loss", "tok_per_sec", "mfu", "dt_ms")


def leg(warmup: int) -> dict[str, Any]:
    return {"question": "?", "patch": {"run": {"train": {"warmup_steps": warmup}}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    """A baseline, one leg of another seed, one slower by 20%, one faster by 20%, one that crashes; three repeats."""
    folder = tmp_path_factory.mktemp("finished")
    fake = {"slow": {"dt_ms": 120}, "fast": {"dt_ms": 80}, "broken": {"end": "crash"}}
    legs = {"base": LEGS["base"], "seed": ANOTHER_SEED, "slow": leg(3), "fast": leg(4), "broken": leg(5)}
    patch = {"run": {"train": {"num_steps": 60}}}
    ablation = Ablation(folder, fake, legs=legs, repeats=3, gates=GATES, patch=patch, measure="throughput")
    ablation.variables["FAKE_SECONDS"] = "0.001"
    assert ablation("run").returncode == 4  # one leg crashes
    return ablation


@pytest.fixture
def copy(finished: Ablation, tmp_path: Path) -> Path:
    """The finished experiment, to be changed."""
    shutil.copytree(finished.exp_dir, tmp_path / "exp")
    return tmp_path / "exp"


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdicts(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    write_report(Experiment(folder))
    rows = read_csv(folder / "verdicts.csv")
    return {(row["leg"], row["metric"]): (row["verdict"], row["gate"]) for row in rows}


def report_of(folder: Path) -> Report:
    comparison = Comparison(Experiment(folder))
    return build_report(comparison, comparison.verdicts())


def table(report: Report, title: str) -> Table:
    return next(each for each in report.tables if each.title == title)


def cell(table: Table, row: str, column: str) -> Any:
    names = [each.name for each in table.columns]
    return next(each for each in table.rows if str(each[0]).split(" ")[0] == row)[names.index(column)]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_verdicts_seed_alone_is_not_distinguishable_slow_is_worse_fast_is_better_a_crash_is_invalid(copy: Path) -> None:
    speed = "tail50_tok_per_sec"
    found = verdicts(copy)
    assert found["seed", speed][0] == "not distinguishable"
    assert found["seed", "train/loss"] == ("not distinguishable", "passed")
    assert found["slow", speed] == ("worse", "failed")
    assert found["fast", speed] == ("better", "passed")
    assert found["broken", speed] == found["broken", "train/loss"] == ("invalid", "failed")
    text = (copy / "report.md").read_text()
    assert "broken: invalid, and cannot win (repeat 1 failed (RuntimeError: no reason))." in text
    assert "fast: passes every gate" in text


def test_the_files_of_a_report_exist_and_a_second_making_is_byte_identical(copy: Path) -> None:
    names = ["summary.csv", "steps.csv", "verdicts.csv", "report.md", "report.html"]
    names += [f"figures/{name}.png" for name in FOUR_FIGURES]
    write_report(Experiment(copy))
    first = {name: (copy / name).read_bytes() for name in names}
    write_report(Experiment(copy))
    assert {name: (copy / name).read_bytes() for name in names} == first
    assert all(first.values())


def test_csv_files_hold_what_metrics_jsonl_and_summary_json_hold(copy: Path) -> None:
    write_report(Experiment(copy))
    steps, summaries = read_csv(copy / "steps.csv"), read_csv(copy / "summary.csv")
    assert len(summaries) == 15
    for row in summaries:
        folder = copy / "legs" / row["leg"] / f"repeat{row['repeat']}_attempt{row['attempt']}"
        logged = read_lines(folder / "metrics.jsonl")
        own = [each for each in steps if (each["leg"], each["repeat"]) == (row["leg"], row["repeat"])]
        assert len(own) == len(logged) > 0
        for cells, line in zip(own, logged, strict=True):
            given = {name: json.loads(value) for name, value in cells.items() if value and name in line}
            assert given == line
            assert {name for name, value in cells.items() if value} - set(line) == {"leg", "repeat", "seed", "attempt"}
        summary = json.loads((folder / "summary.json").read_text())
        for name, value in summary.items():
            if not isinstance(value, list | dict):
                assert (json.loads(row[name]) if isinstance(value, int | float) else row[name]) == value


def test_what_was_not_measured_is_missing_in_every_table_and_never_zero(copy: Path) -> None:
    report = report_of(copy)
    assert cell(table(report, "Speed"), "base", "MFU, %") is None
    assert cell(table(report, "Speed"), "base", "compile, s") is None
    assert cell(table(report, "Speed"), "broken", "tok/s") is None
    assert next(figure for figure in report.figures if figure.name == "mfu").curves == []


def test_the_report_stands_on_the_folders_of_runs_not_on_what_the_queue_remembers(copy: Path) -> None:
    before = verdicts(copy)
    (copy / "queue.jsonl").unlink()
    assert verdicts(copy) == before


def test_a_leg_whose_runs_are_still_to_come_has_no_verdict_yet(copy: Path) -> None:
    shutil.rmtree(copy / "legs" / "fast" / "repeat3_attempt1")
    (copy / "legs" / "fast" / "repeat3_attempt1.txt").unlink()
    assert verdicts(copy)["fast", "tail50_tok_per_sec"] == ("", "")
    assert "fast: not finished (2 of 3 runs done)." in (copy / "report.md").read_text()


def test_no_leg_has_a_verdict_before_the_baseline_is_done(copy: Path) -> None:
    shutil.rmtree(copy / "legs" / "base" / "repeat3_attempt1")
    (copy / "legs" / "base" / "repeat3_attempt1.txt").unlink()
    assert set(verdicts(copy).values()) == {("", "")}


def test_the_heat_map_is_of_the_layer_with_the_most_uneven_load_at_the_end(copy: Path) -> None:
    lines = [
        {"step": 1, "layers": [1, 3], "tokens_per_expert": [[9, 0, 0], [1, 1, 4]]},
        {"step": 20, "layers": [1, 3], "tokens_per_expert": [[3, 3, 3], [0, 6, 0]]},
    ]
    for path in copy.glob("legs/*/*/expert_load.jsonl"):
        path.unlink()
    for run in ("base/repeat1_attempt1", "fast/repeat2_attempt1"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (copy / "legs" / run / "expert_load.jsonl").write_text(text)
    base, fast = report_of(copy).heat_maps  # the other legs have none, as a dense leg
    assert (base.steps, base.load) == ([1, 20], [[0.5, 0.0], [0.5, 3.0], [2.0, 0.0]])
    assert base.title == "base: load of the experts of layer 3, over the mean (base/repeat1)"
    assert fast.title.endswith("(fast/repeat2)")


def test_a_target_that_is_never_reached_is_said_and_has_no_speed(copy: Path) -> None:
    path = copy / "legs/slow/repeat2_attempt1/metrics.jsonl"
    lines = [{**line, "train/loss": 9.0} for line in read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    matched = table(report_of(copy), "Loss-matched speed")
    assert cell(matched, "slow", "tokens to it") == "not reached in 1 of 3 runs"
    assert [cell(matched, "slow", name) for name in ("token ratio", "seconds to it", "loss-matched speed")] == [
        None
    ] * 3


def test_a_baseline_that_failed_makes_every_leg_invalid(copy: Path) -> None:
    for path in copy.glob("legs/base/repeat2_attempt1/summary.json"):
        edit(path, lambda summary: summary.update(status="nan", reason="train/loss=nan at step 7"))
    found = verdicts(copy)
    assert {outcome for outcome, _ in found.values()} == {"invalid"}
    assert "baseline: repeat 2 nan (train/loss=nan at step 7)" in (copy / "report.md").read_text()


def test_a_run_that_lost_its_figure_makes_the_leg_invalid_rather_than_a_mean_of_the_others(copy: Path) -> None:
    edit(copy / "legs/fast/repeat1_attempt1/summary.json", lambda summary: summary.pop("tail50_tok_per_sec"))
    found = verdicts(copy)
    assert found["fast", "tail50_tok_per_sec"][0] == "invalid"
    assert found["fast", "train/loss"][0] == "not distinguishable"
    assert "tail50_tok_per_sec was not measured in 1 of 3 runs" in (copy / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"commit": "decade" * 7}, "commit differs"),
        ({"dirty": True, "dirty_hash": "abc"}, "commit differs"),
        ({"data": {"train": "other", "val": "val hash"}}, "training data differs"),
        ({"data": {"train": "train hash", "val": "other"}}, "validation data differs"),
        ({"devices": ["NVIDIA H200"]}, "hardware differs"),
        ({"cpu": "another processor"}, "hardware differs"),
        ({"world_size": 8}, "ranks differs"),
        ({"packages": {"torch": "2.11.0"}}, "versions differs"),
    ],
)
def test_what_a_run_ran_on_is_flagged_where_it_differs(copy: Path, change: dict[str, Any], warning: str) -> None:
    assert not any("differs" in each for each in report_of(copy).warnings)
    edit(copy / "legs/fast/repeat1_attempt1/env.json", lambda env: env.update(change))
    assert any(each.startswith(warning) and "fast" in each for each in report_of(copy).warnings)


def test_a_run_that_skipped_updates_is_flagged(copy: Path) -> None:
    assert not any("skipped" in each for each in report_of(copy).warnings)
    edit(copy / "legs/fast/repeat1_attempt1/summary.json", lambda summary: summary.update(skipped_steps=2))
    assert "fast/repeat1 skipped 2 updates (log.txt says why)" in report_of(copy).warnings


def test_validation_on_other_data_is_invalid(copy: Path) -> None:
    bits = {"metric": "val/bpb", "at_least": None, "at_most": None, "no_worse_than": "baseline + 2 sigma"}
    edit(copy / "suite.json", lambda suite: suite["gates"].append(bits))
    assert verdicts(copy)["fast", "val/bpb"] == ("not distinguishable", "passed")
    edit(copy / "legs/fast/repeat1_attempt1/env.json", lambda env: env["data"].update(val="other"))
    found = verdicts(copy)
    assert found["fast", "val/bpb"] == ("invalid", "failed")
    assert found["slow", "val/bpb"] == ("not distinguishable", "passed")


def test_side_by_side_no_speed_is_shown_or_judged(copy: Path) -> None:
    edit(copy / "suite.json", lambda suite: suite.update(measure="quality"))
    assert verdicts(copy)["fast", "tail50_tok_per_sec"] == ("invalid", "failed")
    report = report_of(copy)
    assert "Speed" not in [each.title for each in report.tables]
    assert [figure.name for figure in report.figures if figure.curves] == ["loss"]
    for column in ("seconds to it", "loss-matched speed", "raw speed"):
        assert cell(table(report, "Loss-matched speed"), "fast", column) is None
    assert cell(table(report, "Runs"), "fast", "tok/s") is None
    assert any("side by side" in warning for warning in report.warnings)


def test_speed_on_other_hardware_is_invalid_and_loss_is_not(copy: Path) -> None:
    edit(copy / "legs/fast/repeat1_attempt1/env.json", lambda env: env.update(devices=["NVIDIA H200"]))
    found = verdicts(copy)
    assert found["fast", "tail50_tok_per_sec"][0] == "invalid"
    assert found["fast", "train/loss"][0] == "not distinguishable"
    assert found["slow", "tail50_tok_per_sec"][0] == "worse"


def test_an_attempt_on_other_hardware_counts_though_the_first_was_on_the_same(copy: Path) -> None:
    another = {"devices": ["NVIDIA H200"], "world_size": 1}
    edit(copy / "legs/fast/repeat1_attempt1/env.json", lambda env: env["attempts"].append(another))
    assert verdicts(copy)["fast", "tail50_tok_per_sec"][0] == "invalid"


def test_loss_of_other_training_data_or_of_forced_routing_is_invalid_and_speed_is_not(copy: Path) -> None:
    for leg in ("base", "seed"):  # the baseline too: like with like says as little about a model
        for path in copy.glob(f"legs/{leg}/*/config.json"):
            edit(path, lambda config: config["run"]["model"]["moe"].update(force_balanced=True))
    edit(copy / "legs/fast/repeat1_attempt1/env.json", lambda env: env["data"].update(train="other"))
    found = verdicts(copy)
    assert {found[leg, "train/loss"] for leg in ("seed", "slow", "fast")} == {("invalid", "failed")}
    assert found["fast", "tail50_tok_per_sec"] == ("better", "passed")
    text = (copy / "report.md").read_text()
    assert "the load of experts is forced" in text
    assert "leg and baseline were trained on different data" in text


def test_a_leg_without_a_ratio_is_invalid_and_does_not_keep_the_others_from_a_verdict(copy: Path) -> None:
    edit(copy / "legs/slow/repeat1_attempt1/summary.json", lambda summary: summary.update(tail50_tok_per_sec=0))
    found = verdicts(copy)
    assert found["slow", "tail50_tok_per_sec"][0] == "invalid"
    assert found["fast", "tail50_tok_per_sec"] == ("better", "passed")


def test_forced_routing_is_flagged(copy: Path) -> None:
    def force(config: dict[str, Any]) -> None:
        config["run"]["model"]["moe"]["force_balanced"] = True

    edit(copy / "legs/fast/repeat1_attempt1/config.json", force)
    assert any(each.startswith("routing differs: learned") for each in report_of(copy).warnings)


def test_a_tail_of_few_steps_is_said(copy: Path) -> None:
    path = copy / "legs/slow/repeat1_attempt1"
    edit(path / "summary.json", lambda summary: summary.update(tail_steps=12))
    edit(path / "env.json", lambda env: env["attempts"].append({}))
    said = "tail-50 figures of slow/repeat1, which was resumed come from 12 steps"
    assert said in report_of(copy).warnings
    assert any(each.startswith("slow/repeat1 was resumed: its total time") for each in report_of(copy).warnings)


def test_a_leg_cannot_win_by_a_handful_of_steps(copy: Path) -> None:
    edit(copy / "legs/fast/repeat2_attempt1/summary.json", lambda summary: summary.update(tail_steps=7))
    found = verdicts(copy)
    assert found["fast", "tail50_tok_per_sec"] == ("invalid", "failed")
    assert found["fast", "train/loss"][0] == "not distinguishable"
    assert "repeat 2 was timed over 7 steps, which say too little" in (copy / "report.md").read_text()


def test_loss_matched_speed_stands_beside_raw_speed(copy: Path) -> None:
    matched = table(report_of(copy), "Loss-matched speed")
    assert cell(matched, "base", "loss-matched speed") == pytest.approx(1.0)
    assert cell(matched, "slow", "raw speed") == pytest.approx(1 / 1.2, rel=0.03)
    assert cell(matched, "slow", "loss-matched speed") == pytest.approx(1 / 1.2, rel=0.03)  # its loss is the same
    assert cell(matched, "slow", "token ratio") == pytest.approx(1.0)


def test_loss_matched_speed_compares_runs_of_the_same_repeat(copy: Path) -> None:
    edit(copy / "legs/slow/repeat2_attempt1/summary.json", lambda summary: summary.update(status="failed"))
    edit(copy / "legs/base/repeat2_attempt1/summary.json", lambda summary: summary.update(tail50_tok_per_sec=1.0))
    matched = table(report_of(copy), "Loss-matched speed")
    assert cell(matched, "slow", "loss-matched speed") == pytest.approx(1 / 1.2, rel=0.03)  # of repeats 1 and 3


def test_the_noise_floor_is_told(copy: Path) -> None:
    floor = table(report_of(copy), "Noise floor")
    assert 0.01 < cell(floor, "tail50_tok_per_sec", "sigma") < 2  # in percent
    assert cell(floor, "tail50_tok_per_sec", "degrees of freedom") == 8
    assert cell(floor, "train/loss", "sigma") > 0


def test_report_as_a_program_says_the_verdicts_and_does_not_read_the_suite_file_again(finished: Ablation) -> None:
    finished.suite.write_text("not even JSON")
    done = finished("report")
    assert done.returncode == 0, done.stderr
    assert "fast: passes every gate" in done.stdout
    assert FAKE_LAUNCH.exists()
