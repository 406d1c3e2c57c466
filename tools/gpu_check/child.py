"""The process that measures cases of one part, and tells them to a file: one JSON line for all that happens.

    {"case": "rates seed", "event": "begun"}
    {"case": "rates seed", "event": "row", "row": {...}}          as soon as it is measured
    {"case": "rates seed", "event": "done"}                       or "failed", with "why"

If it dies, what it told stands, and another process takes the cases that are left (tools/gpu_check/watch.py).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
DRY = "dry run, no measurement"

# What measured code raises when it cannot be built or run. Anything else ends the process, and the next takes over.
FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
          TypeError, ValueError, subprocess.SubprocessError)  # fmt: skip

# Keys of rows that a dry run must not show: what they hold is measured on a GPU or not at all.
MEASURED = frozenset(
    (
        "ms", "ms_rounds", "ms_iqr", "tflops", "gb_per_s", "share_of_copy", "speed_over_bf16", "speed_over_torch",
        "first_call_s", "peak_mem_mib", "tok_per_sec", "tok_per_sec_iqr", "dt_ms", "dt_ms_iqr", "dt_ms_blocks", "mfu",
        "compile_s", "launch_to_first_step_s", "seconds", "parts", "waits", "bytes", "bytes_differing",
    )
)  # fmt: skip
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Context:
    """What the function of a part gets besides its case."""

    dry_run: bool
    work: Path  # for files that nobody keeps
    logs: Path  # for texts that are kept
    add: Callable[[Row], None]  # tells a row

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry_run else "cuda")


def main(argv: list[str] | None = None) -> int:
    end_with_parent()
    parser = argparse.ArgumentParser(prog="tools.gpu_check.child")
    for name in ("--function", "--events", "--work", "--logs"):
        parser.add_argument(name, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args(argv)
    module, _, function = args.function.partition(":")
    run_case = getattr(importlib.import_module(module), function)
    with open(args.events, "a", encoding="utf-8") as events:

        def tell(case: str, event: str, **rest: Any) -> None:
            events.write(json.dumps({"case": case, "event": event, **rest}, allow_nan=False) + "\n")
            events.flush()

        for case in args.cases:
            tell(case, "begun")

            def add(row: Row, case: str = case) -> None:
                tell(case, "row", row=presentable(row, args.dry_run))

            try:
                run_case(case, Context(args.dry_run, Path(args.work), Path(args.logs), add))
            except faults() as fault:
                traceback.print_exc()
                tell(case, "failed", why=in_one_line(fault))
                if not device_answers():
                    return 1
            else:
                tell(case, "done")
            gc.collect()
            empty_cache()
    return 0


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends in any way."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def presentable(row: Row, dry_run: bool) -> Row:
    """A row as JSON takes it; of a dry run without what it did not measure."""
    if dry_run:
        row = {name: value for name, value in row.items() if name not in MEASURED} | {"note": DRY}
    return {name: finite(value) for name, value in row.items() if value is not None}


def faults() -> tuple[type[BaseException], ...]:
    """FAULTS, and Triton's own where it is loaded."""
    triton = sys.modules.get("triton.errors")
    return FAULTS if triton is None else (*FAULTS, triton.TritonError)


def without_triton_casts(dry_run: bool) -> str | None:
    """Why FP8 experts with Triton's casts are not to be measured; None if they are."""
    if dry_run:
        return "Triton kernels are for GPUs"
    return None if importlib.util.find_spec("model.fp8_kernels") else "there is no model/fp8_kernels.py"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def in_one_line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def device_answers() -> bool:
    """False after a fault that leaves this process without its GPU, such as an illegal address."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
