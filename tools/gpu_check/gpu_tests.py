"""The project's own tests that need a GPU."""

from __future__ import annotations

from typing import Any

from launch.run_config import REPO_ROOT
from tools.gpu_check.child import Context, Row

TESTS = REPO_ROOT / "tests" / "gpu"


def gpu_tests(case: str, context: Context) -> None:
    """A row for every test of tests/gpu, as soon as it has ended, and their counts at the end."""
    if not any(TESTS.glob("**/test_*.py")):
        context.add({"what": "tests", "absent": "no GPU tests"})
        return
    import pytest

    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.passed:
                return
            counts[report.outcome] += 1
            row: Row = {"what": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                row["error"] = " ".join(str(report.longreprtext).split())[-300:]
            context.add(row)

    arguments = [str(TESTS), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    code = int(pytest.main(arguments, plugins=[Reporter()]))
    context.add({"what": "tests", **counts})
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")
