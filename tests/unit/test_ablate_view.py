"""What `status` and the live table show of a run."""

from pathlib import Path

from rich.console import Console

from launch.ablate import table_of
from launch.experiment import Experiment, RunState
from launch.run_config import REPO_ROOT, load_run
from launch.suite import PlannedRun


def shown(state: RunState) -> str:
    experiment = Experiment(Path("nowhere"))
    experiment.suite = {"name": "a_suite", "question": "Why [not]?"}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(table_of(experiment, [state]))
    return console.export_text()


def planned() -> PlannedRun:
    tree = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json").resolved
    return PlannedRun("capacity", 2, 7, 10, tree)


def test_a_reason_with_brackets_is_shown_as_it_is() -> None:
    reason = "RuntimeError: [/a/gloo/pair.cc:152] refused [bold]"
    text = shown(RunState(planned(), "failed", 1, None, 5, reason))
    assert reason in text
    assert "Why [not]?" in text
    assert "5/10" in text


def test_a_run_that_is_still_to_come_has_no_step_and_no_figures() -> None:
    row = next(line for line in shown(RunState(planned(), "pending", 0)).splitlines() if "capacity" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["capacity", "2", "pending", "", "", "", "", "", ""]
