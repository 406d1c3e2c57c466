"""The project's own tests that need a GPU."""

from __future__ import annotations

from typing import Any

from launch.run_config import REPO_ROOT
from tools.gpu_check.child import Context, Row, device_answers

TESTS = REPO_ROOT / "tests" / "gpu"


def gpu_tests(case: str, context: Context) -> None:
    """A row for every test of a file in tests/gpu, as soon as it has ended."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.passed:
                return
            row: Row = {"what": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                row["error"] = " ".join(str(report.longreprtext).split())[-300:]
            context.add(row)

    arguments = [str(TESTS / case), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    code = int(pytest.main(arguments, plugins=[Reporter()]))
    if not device_answers():
        raise RuntimeError("a test left this process without its GPU, and those after it failed for that")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")
