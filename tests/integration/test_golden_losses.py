"""The committed numbers of short runs: whatever moves one is seen, and has to be explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.run_config import REPO_ROOT
from launch.run_dir import write_json
from tools import golden

MACHINE = {"torch": "2", "deepspeed": "0", "cpu": "one", "vectors": "AVX2"}
STEPS = [{"step": 0, "val/loss": 6.0}, {"step": 1, "train/loss": 5.0, "train/grad_norm": 0.5}]


def test_the_golden_runs_give_the_numbers_that_are_committed() -> None:
    """One process for all of them; python -m tools.golden --check is what a person calls."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.golden", "--check"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {path.stem for path in golden.GOLDEN_DIR.glob("*.json")} == set(golden.CASES)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A golden file of one case, whose run gives STEPS unless a test says otherwise."""
    monkeypatch.setattr(golden, "GOLDEN_DIR", tmp_path)
    monkeypatch.setattr(golden, "CASES", {"moe": ("a=1",)})
    monkeypatch.setattr(golden, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(golden, "run_case", lambda assignments: STEPS)
    assert golden.main(["--record"]) == 0
    return tmp_path / "moe.json"


def test_a_golden_file_says_its_settings_and_what_it_was_recorded_with(recorded: Path) -> None:
    assert json.loads(recorded.read_text()) == {"assignments": ["a=1"], "recorded_with": MACHINE, "steps": STEPS}
    assert golden.main(["--check", "moe"]) == 0


@pytest.mark.parametrize(
    ("machine", "factor", "moved"),
    [
        (MACHINE, 1 + 1e-5, True),
        (MACHINE, 1 + 1e-7, False),
        ({**MACHINE, "cpu": "other"}, 1 + 1e-3, False),
        ({**MACHINE, "torch": "3"}, 1 + 2e-2, True),
        (MACHINE, float("nan"), True),
    ],
)
def test_a_number_that_moved_is_named_and_another_cpu_may_round_differently(
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: dict[str, str],
    factor: float,
    moved: bool,
) -> None:
    monkeypatch.setattr(golden, "this_machine", lambda: machine)
    monkeypatch.setattr(golden, "run_case", lambda assignments: [STEPS[0], {**STEPS[1], "train/loss": 5.0 * factor}])
    assert golden.main(["--check"]) == (golden.EXIT_MOVED if moved else 0)
    said = capsys.readouterr().out
    assert ("moe: first at step 1, train/loss=" in said) is moved
    assert ("python -m tools.golden --record, and the commit says why" in said) is moved


@pytest.mark.parametrize("steps", [STEPS[:1], [*STEPS, {"step": 2, "val/loss": 5.9}], [STEPS[0], {"step": 1}]])
def test_a_step_or_metric_more_or_fewer_is_a_difference(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, steps: Any
) -> None:
    monkeypatch.setattr(golden, "run_case", lambda assignments: steps)
    assert golden.main(["--check"]) == golden.EXIT_MOVED


def test_a_missing_or_outdated_golden_file_is_refused_before_a_run(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "run_case", lambda assignments: pytest.fail("a run was started"))
    write_json(recorded, {**json.loads(recorded.read_text()), "assignments": ["a=2"]})
    assert golden.main(["--check"]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: {recorded}: recorded with other settings than CASES['moe']. "
        "Record it anew: python -m tools.golden --record moe.\n"
    )
    recorded.unlink()
    assert golden.main(["--check"]) == 2
    assert "no such golden file. Record it: python -m tools.golden --record moe." in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--check", "--record"], ["--check", "nowhere"]])
def test_a_wrong_command_line_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        golden.main(argv)
    assert ended.value.code == 2


def test_a_run_that_does_not_complete_is_a_failure_with_what_it_printed(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(assignments: tuple[str, ...]) -> golden.Steps:
        raise golden.RunFailed("failed: no memory")

    monkeypatch.setattr(golden, "run_case", fail)
    assert golden.main(["--check"]) == golden.EXIT_MOVED
    assert "failed: no memory" in capsys.readouterr().err
