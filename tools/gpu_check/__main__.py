"""Check what the project's FP8 design stands on, on one GPU, in minutes: one JSON and one table, whatever happens.

    python -m tools.gpu_check --out runs/check                          everything, nine minutes at the most
    python -m tools.gpu_check --out runs/more --parts steps,loss        some parts, with all of the time
    python -m tools.gpu_check --out runs/one --parts steps --cases '*dropless*'
    python -m tools.gpu_check --out /tmp/dry --dry_run                  the logic, in tiny sizes on the CPU

Exit codes: 0 every case came to its end, 1 something failed or was not reached (the files say what and why), 2 refused.

This process imports no torch: every part has processes of its own (watch.py), whose death or hang costs the case that
they were at. parts.py says what is measured in which order, targets.py what it is held against.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fnmatch
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from launch.command_line import OneLineParser
from launch.environment import describe_checkout
from launch.run_config import REPO_ROOT
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED
from model.config import ConfigError
from tools.gpu_check.parts import PARTS, Part
from tools.gpu_check.results import JSON_NAME, TABLE_NAME, Results
from tools.gpu_check.watch import Watch

EXIT_INCOMPLETE = 1
MINUTES = 9.0
RESERVE_S = 5.0  # of the time, to end processes and write


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not an Exception: nothing on the way may take it for a fault."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    begun = time.monotonic()
    args = parse_arguments(arguments)
    try:
        parts = chosen_parts(args)
        refuse(args)
        results = Results(args.out, arguments, args.minutes, args.dry_run, args.commit)
        deadline = begun + 60 * args.minutes - RESERVE_S
        with (
            interruptible(),
            tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as work,
        ):
            return check(parts, results, Path(work), deadline)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED


def check(parts: list[Part], results: Results, work: Path, deadline: float) -> int:
    """Run the parts until the deadline."""
    status = "interrupted"
    try:
        for part in parts:
            results.plan(part)
        results.save()
        for number, part in enumerate(parts):
            run_part(part, share_of(parts[number:], deadline), results, work)
            if part.name == "environment":
                refuse_without_gpu(results)
        status = "finished"
    except Interrupted as interruption:
        print(f"{interruption}: ended", file=sys.stderr)
    results.finish(status)
    print(f"\n{results.summary()}\n{results.out / JSON_NAME}\n{results.out / TABLE_NAME}", flush=True)
    return EXIT_COMPLETED if results.is_complete() else EXIT_INCOMPLETE


def share_of(parts: list[Part], deadline: float) -> float:
    """Seconds for the first of the parts that are left: its share of the time that is left."""
    return (deadline - time.monotonic()) * parts[0].share / sum(part.share for part in parts)


def run_part(part: Part, seconds: float, results: Results, work: Path) -> None:
    begun = time.monotonic()
    results.begin(part, seconds)
    print(f"{part.name}: up to {max(0.0, seconds):.0f} s", flush=True)
    watch = Watch(part, results.dry_run, work, results.out / "logs", results.save_if_due)
    try:
        watch.run(results.cases(part), begun + seconds)
    finally:
        results.end(part, time.monotonic() - begun)
    for line in results.lines(part):
        print(f"  {line}", flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, once: what follows ends processes and writes, undisturbed."""
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what is refused --------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    parser = OneLineParser(
        prog="python -m tools.gpu_check",
        description="Check what FP8 experts need, on one GPU: one JSON and one table of what was measured.",
        epilog="Exit codes: 0 every case came to its end, 1 something failed or was not reached, 2 refused.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help=f"a new folder for {JSON_NAME}, {TABLE_NAME} and logs/")
    add("--minutes", type=float, default=MINUTES, metavar="M", help="for everything together (default: %(default)s)")
    add("--parts", metavar="A,B", help=f"some of {names} (default: all; environment always)")
    add("--cases", nargs="+", metavar="PATTERN", help="of these parts only cases that match, such as 'seed*'")
    add("--commit", metavar="ID", help="of these files, where they are a copy without .git, from `git rev-parse HEAD`")
    add("--dry_run", action="store_true", help="every part in tiny sizes on the CPU; nothing is measured")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 24 * 60:
        parser.error(f"--minutes {args.minutes}: not a time to measure in. Use minutes, such as {MINUTES}")
    if args.commit is not None and not re.fullmatch("[0-9a-f]{40}", args.commit):
        parser.error(f"--commit {args.commit}: not 40 hexadecimal digits. Use what `git rev-parse HEAD` prints")
    return args


def chosen_parts(args: argparse.Namespace) -> list[Part]:
    """The parts to run with the cases to run. Raises ConfigError."""
    names = {part.name for part in PARTS}
    asked = args.parts.split(",") if args.parts else names
    for name in asked:
        if name not in names:
            raise ConfigError(f"--parts {name}: no such part. Use {', '.join(part.name for part in PARTS)}.")
    chosen = []
    for part in PARTS:
        cases = part.dry_cases if args.dry_run else part.cases
        if part.name != "environment":
            if part.name not in asked:
                continue
            if args.cases:
                cases = tuple(case for case in cases if any(fnmatch.fnmatch(case, each) for each in args.cases))
        if cases:
            chosen.append(with_cases(part, cases))
    if args.cases and len(chosen) == 1 and set(asked) != {"environment"}:
        raise ConfigError(
            f"--cases {shlex.join(args.cases)}: matches no case of the parts. See tools/gpu_check/parts.py."
        )
    return chosen


def with_cases(part: Part, cases: tuple[str, ...]) -> Part:
    return Part(part.name, part.title, part.function, cases, cases, part.share, part.case_limit_s)


def refuse(args: argparse.Namespace) -> None:
    """Raise ConfigError where nothing could be measured, or a result would be overwritten."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out}: is there and not an empty folder. Name a new one.")
    if args.commit is not None and describe_checkout(REPO_ROOT):
        raise ConfigError("--commit: this is a git checkout, which knows its commit. Leave --commit out.")
    if not args.dry_run and not has_driver():
        raise ConfigError("this machine has no NVIDIA driver, so no GPU. Use a machine with one, or --dry_run.")


def has_driver() -> bool:
    """Whether CUDA's driver library is there. Loading it initialises nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def refuse_without_gpu(results: Results) -> None:
    """Raise ConfigError, and leave nothing behind, where torch itself says that it sees no GPU."""
    if not results.dry_run and results.gpus_visible() == 0:
        shutil.rmtree(results.out)
        raise ConfigError("torch sees no GPU on this machine. Use another machine or torch, or --dry_run.")


if __name__ == "__main__":
    sys.exit(main())
