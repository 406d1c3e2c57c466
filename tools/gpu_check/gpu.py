"""The GPU and the software on it; and the project's own tests that need a GPU."""

from __future__ import annotations

from typing import Any

import torch

from launch.gpu_monitor import describe_gpu
from launch.run_config import REPO_ROOT
from model.flops import peak_flops
from tools.gpu_check.child import Context, Row

TESTS = REPO_ROOT / "tests" / "gpu"


def environment(case: str, context: Context) -> None:
    """One row. Where torch sees no GPU it says so, which ends the check."""
    row: Row = {
        "what": "environment",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus_visible": torch.cuda.device_count(),
    }
    if context.device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "peak_flops": peak_flops(properties.name),
            **describe_gpu(str(properties.uuid)),
        }
        row.pop("pci_bus_id", None)
    context.add(row)


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
