"""After which ends launch.run --restarts starts a run again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.command_line import parse_launch_arguments
from launch.restarts import run_with_restarts
from launch.run_dir import EXIT_CODES, EXIT_FAILED, EXIT_REFUSED, checkpoint_name, write_json
from launch.supervise import StopRequests


def attempts(run_dir: Path, ends: list[dict | int | None], restarts: int, stop_in: int = 99) -> tuple[int, int]:
    """How many attempts there were, and the exit code. An end is what a summary says; an exit code; None: nothing."""
    stop, left, made = StopRequests(), iter(ends), iter(range(99))

    def attempt(number: int) -> int:
        assert number == next(made)
        stop.count += number == stop_in
        end = next(left)
        if isinstance(end, int):
            return end
        if end is None:
            return EXIT_FAILED
        write_json(run_dir / "summary.json", {"started": str(number), "reason": "because", **end})
        return EXIT_CODES.get(end["status"], EXIT_FAILED)

    code = run_with_restarts(attempt, run_dir, restarts, stop)
    return next(made), code


FAILED, STOPPED, COMPLETED = {"status": "failed"}, {"status": "stopped"}, {"status": "completed"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(checkpoint_name(40))
    return tmp_path


def test_a_failed_run_is_started_again_until_it_completes_and_says_why_and_from_where(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempts(run_dir, [FAILED, {"status": "oom"}, {"status": "hang"}, COMPLETED], restarts=5) == (4, 0)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "launch.run: starting again, 1 of 5: failed (because); from step 40"
    assert said[2] == "launch.run: starting again, 3 of 5: hang (because); from step 40"


def test_it_is_not_started_more_often_than_asked(run_dir: Path) -> None:
    assert attempts(run_dir, [FAILED] * 9, restarts=2) == (3, 4)
    assert attempts(run_dir, [FAILED] * 9, restarts=0) == (1, 4)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (COMPLETED, 0),
        (STOPPED, 3),
        (EXIT_REFUSED, 2),
        ({"status": "nan"}, 4),
        ({"status": "running"}, 4),
        ({"status": "failed", "reason": "disk full: /runs/a: No space left on device"}, 4),
        ({"status": "failed", "asked_to_stop": True}, 4),
    ],
)
def test_what_another_attempt_would_not_mend_is_left_alone(run_dir: Path, end: dict | int, code: int) -> None:
    assert attempts(run_dir, [end] * 9, restarts=3) == (1, code)
    assert attempts(run_dir, [FAILED, end, COMPLETED], restarts=3) == (2, code)


def test_a_request_to_stop_stops_for_good(run_dir: Path) -> None:
    assert attempts(run_dir, [FAILED] * 9, restarts=3, stop_in=1) == (2, 4)


def test_an_attempt_that_never_began_is_made_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempts(run_dir, [FAILED, None, COMPLETED], restarts=3) == (3, 0)
    assert "2 of 3: no rank began to train; from step 40" in capsys.readouterr().err


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_folder_that_the_attempt_refuses_is_no_business_of_a_restart(tmp_path: Path, restarts: int) -> None:
    damaged, file = tmp_path / "damaged", tmp_path / "file"
    damaged.mkdir()
    (damaged / "summary.json").write_text("{")
    file.touch()
    for run_dir in (damaged, file):
        assert run_with_restarts(lambda _: EXIT_REFUSED, run_dir, restarts, StopRequests()) == EXIT_REFUSED


def test_fewer_than_no_restarts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_launch_arguments(["run.json", "--restarts", "-1"])
    assert "argument --restarts: -1 is below 0" in capsys.readouterr().err
