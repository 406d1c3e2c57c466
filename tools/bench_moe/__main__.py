"""How fast is our MoE block beside others, and how fast is a training step?

    python -m tools.bench_moe                                  the blocks on the CPU, under three minutes on two cores
    python -m tools.bench_moe --device cuda --compile          on a GPU, each block also compiled
    python -m tools.bench_moe --step ds_configs/demo.json      whole training steps of run files instead
    python -m tools.bench_moe --readme                         write the tables of benchmarks/README.md

Exit codes: 0 everything was measured, 1 something could not be (its row says why), 2 refused.
blocks.py says what is compared, timing.py and rounds.py how it is timed.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command_line import OneLineParser
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED, write_text
from model.config import ConfigError
from tools.bench_moe.results import README, Row, describe_machine, tables, with_results, write_results
from tools.bench_moe.rounds import interquartile_range, median_ratio
from tools.bench_moe.shapes import (
    ALSO_COMPILED,
    BLOCKS,
    DTYPES,
    FLOOR,
    SETS,
    STOCK,
    Shape,
    parse_blocks,
    parse_shapes,
)
from tools.bench_moe.training_steps import FEWEST_STEPS, measure_trials, parse_trial

if TYPE_CHECKING:
    import torch

    from tools.bench_moe.timing import Series

EXIT_FAULT = 1
ROUNDS_OF_BLOCKS, ROUNDS_OF_STEPS, STEPS = 5, 2, 20
ONLY_FOR_BLOCKS = ("device", "shapes", "dtypes", "blocks", "compile", "malloc")
ONLY_FOR_STEPS = ("steps", "assignments")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse_arguments(arguments)
    try:
        if args.readme:
            write_text(README, with_results(README.read_text(encoding="utf-8")))
            return EXIT_COMPLETED
        refuse_output(args.json)
        env = describe_machine(arguments)
        rows = run_steps(args, env) if args.step else run_blocks(args, env)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED
    if args.json is not None:
        write_results(args.json, env, rows)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"failed: {row.get('block', row.get('run'))}: {row['error']}", file=sys.stderr)
    return EXIT_FAULT if failed else EXIT_COMPLETED


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m tools.bench_moe", description="Time MoE blocks, or whole training steps.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="what the blocks compute on (default: cpu)")
    add("--shapes", nargs="+", metavar="SHAPE", help=f"such as {SETS['cpu'][0]}, or a set: cpu, gpu (default)")
    add("--dtypes", nargs="+", choices=DTYPES["cpu"], help="default: fp32 and bf16 on a CPU, bf16 on a GPU")
    also = f"{', '.join(BLOCKS)}; +static: compiled (default: all, and {', '.join(ALSO_COMPILED)})"
    add("--blocks", nargs="+", metavar="NAME", help=f"of {also}")
    add("--compile", action="store_true", default=None, help="measure every block compiled as well, as NAME+static")
    add("--malloc", choices=("keep", "system"), help="keep freed memory in the process (default), or do as malloc does")
    add("--step", nargs="+", metavar="RUNFILE", help="measure training steps of run files; RUNFILE@CHECKOUT: with the "
        "code of another checkout")  # fmt: skip
    add("--steps", type=int, metavar="N", help=f"of a run in one round (default: {STEPS})")
    add("--set", nargs="+", dest="assignments", metavar="KEY=VALUE", help="change keys of the run files")
    add("--rounds", type=int, metavar="N", help=f"default: {ROUNDS_OF_BLOCKS}, of training steps {ROUNDS_OF_STEPS}")
    add("--json", type=Path, metavar="OUT", help="write the results as JSON")
    add("--readme", action="store_true", help="write the tables of benchmarks/README.md from the JSON files beside it")
    args = parser.parse_args(argv)
    for name in ONLY_FOR_BLOCKS if args.step else ONLY_FOR_STEPS:
        if getattr(args, name) is not None:
            option = "--set" if name == "assignments" else f"--{name}"
            parser.error(f"{option} has no effect {'with' if args.step else 'without'} --step")
    fewest_rounds = 1 if args.step else 2
    if args.rounds is not None and args.rounds < fewest_rounds:
        parser.error(f"--rounds {args.rounds}: a spread needs at least {fewest_rounds}")
    if args.steps is not None and args.steps < FEWEST_STEPS:
        parser.error(f"--steps {args.steps}: a run times no step before its step {FEWEST_STEPS}")
    return args


def refuse_output(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"--json {path}: is a folder, or in one that does not exist. Name a file to write.")


# --- blocks ---------------------------------------------------------------------------------------------------------


def run_blocks(args: argparse.Namespace, env: dict[str, Any]) -> list[Row]:
    """Measure every block at every shape and precision, print the tables, and add to `env` how it was done."""
    kind = args.device or "cpu"
    shapes = parse_shapes(args.shapes or ["cpu" if kind == "cpu" else "gpu"])
    names = parse_blocks(args.blocks or [*BLOCKS, *ALSO_COMPILED], bool(args.compile))
    rounds = args.rounds or ROUNDS_OF_BLOCKS
    os.environ.setdefault("DS_ACCELERATOR", kind)  # before deepspeed is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tools.bench_moe import timing

    device = timing.find_device(kind)
    kept = args.malloc != "system" and timing.keep_freed_memory()
    env |= {"malloc": "keeps freed memory (M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)" if kept else "as the system has it"}
    env |= {"rounds": rounds, **timing.describe_device(device)}
    rows: list[Row] = []
    for shape in shapes:
        for dtype in args.dtypes or DTYPES[kind]:
            rows += (found := rows_of_case(shape, dtype, device, names, rounds))
            print(tables(found), end="\n\n", flush=True)
    return rows


def rows_of_case(shape: Shape, dtype: str, device: torch.device, names: tuple[str, ...], rounds: int) -> list[Row]:
    """All blocks at one shape and precision. They are built before any is timed, and forgotten afterwards."""
    import torch

    from tools.bench_moe import timing
    from tools.bench_moe.blocks import Block, Case

    torch.compiler.reset()  # its limit on recompilation is one for all blocks of a class
    case = Case(shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device)
    blocks: dict[str, Block] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            blocks[name] = case.build(name)
        except timing.FAULTS as fault:
            errors[name] = timing.in_one_line(fault)
    measured = timing.measure({name: block.step for name, block in blocks.items()}, (case.x, case.grad), rounds)
    for name, block in blocks.items():
        if measured[name].error is None:
            timing.attempt(measured[name], partial(case.check, block))
    head = {"shape": shape._asdict(), "dtype": dtype}
    failed = errors | {name: series.error for name, series in measured.items() if series.error is not None}
    return [
        {**head, "block": name}
        | (blocks[name].facts if name in blocks else {})
        | ({"error": failed[name]} if name in failed else figures(name, blocks[name].facts, measured))
        for name in names
    ]


def figures(name: str, facts: dict[str, Any], measured: dict[str, Series]) -> Row:
    """The numbers of one block; ratios where there is what to compare with, and where they mean something."""
    series, emulated = measured[name], facts.get("emulated", False)
    median = statistics.median(series.ms)
    row = {
        "ms_median": median,
        "ms_iqr": interquartile_range(series.ms),
        "ms_rounds": [round(ms, 4) for ms in series.ms],
        "steps_per_sample": series.steps_per_sample,
        **({} if emulated else {"tflops": facts["flops"] / median / 1e9}),
    }
    if "static" in name or "dynamic" in name:
        row["compile_s"] = series.first_step_s
    if series.peak_memory_mib is not None:
        row["peak_mem_mib"] = series.peak_memory_mib
    if series.minor_faults:
        row["minor_faults_per_step"] = statistics.median(series.minor_faults)
    if emulated:  # what takes the place of FP8 products says nothing about their speed
        return row
    stock, floor = measured.get(STOCK), measured.get(FLOOR)
    if stock is not None and stock.error is None:
        row["speed_over_stock"] = median_ratio(stock.ms, series.ms)
    if floor is not None and floor.error is None:
        row["time_over_dense"] = median_ratio(series.ms, floor.ms)
    compiled_floor = measured.get(f"{FLOOR}+static")
    if "+static" in name and compiled_floor is not None and compiled_floor.error is None:
        row["time_over_dense_static"] = median_ratio(series.ms, compiled_floor.ms)
    return row


# --- training steps -------------------------------------------------------------------------------------------------


def run_steps(args: argparse.Namespace, env: dict[str, Any]) -> list[Row]:
    """Measure training steps and print their table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through run_once, which ends its run
    rounds, assignments = args.rounds or ROUNDS_OF_STEPS, args.assignments or []
    trials = [parse_trial(text, assignments) for text in args.step]
    rows = measure_trials(trials, args.steps or STEPS, rounds, assignments)
    print(tables(rows), flush=True)
    env["rounds"] = rounds
    return rows


if __name__ == "__main__":
    sys.exit(main())
