"""MoE blocks beside their peers, by `python -m tools.bench_moe` in a process of its own."""

from __future__ import annotations

import json
import re
import statistics
import sys
from typing import Any

from tools.gpu_check.child import Context, Row
from tools.gpu_check.programs import last_line, run_program
from tools.gpu_check.shapes import TOP_K, shape_named

BASE = "ours/bmm+static"
WARM_UP, ROUNDS = 20, 3  # bench_moe's on a GPU, and what we ask of it
GROUPS = {
    "ours": (BASE, "ours/fp8+static"),
    "peers": (BASE, "deepspeed/stock", "transformers/grouped_mm", "seed/loop", "dense/iso_flop+static"),
    "torchao": (BASE, "ours/fp8+static", "torchao/grouped+static", "torchao/loop"),
    "dropless": (BASE, "ours/grouped+static", "ours/fp8_grouped+static"),
}
DRY_BLOCKS = ("ours/bmm", "ours/fp8", "dense/iso_flop")
REFUSED = re.compile(r"ConfigError: --blocks (\S+): no such block")


def blocks(case: str, context: Context) -> None:
    """A row for every block of a group; one that bench_moe does not have says so."""
    name, _, group = case.partition(" ")
    E, C, K, N = shape_named(name, context.dry_run)
    k = 2 if context.dry_run else TOP_K.get(name, 2)
    shape = f"T{E * C // k},D{K},F{N},E{E},k{k}"
    wanted = list(DRY_BLOCKS if context.dry_run else GROUPS[group])
    rows, command = measured_rows(shape, wanted, context)
    base = next((row for row in rows if row["block"] == BASE), None)
    for row in rows:
        context.add({**from_bench(row, base), "shape": shape, "command": command})


def measured_rows(shape: str, wanted: list[str], context: Context) -> tuple[list[Row], str]:
    """What bench_moe wrote. A block that it refuses by name is left out, and the others are asked for again."""
    out, printed = context.work / "blocks.json", context.logs / f"blocks_{shape}.txt"
    out.unlink(missing_ok=True)
    while wanted:
        command = [sys.executable, "-m", "tools.bench_moe", "--device", context.device.type, "--dtypes", "bf16"]
        command += ["--shapes", shape, "--rounds", str(2 if context.dry_run else ROUNDS), "--json", str(out)]
        command += ["--blocks", *wanted]
        code = run_program(command, printed)
        refused = REFUSED.match(last_line(printed))
        if refused is None or refused[1] not in wanted:
            break
        wanted.remove(refused[1])
        context.add({"what": refused[1], "shape": shape, "absent": "tools.bench_moe has no such block"})
    if not out.is_file():
        raise RuntimeError(f"bench_moe ended with exit code {code}: {last_line(printed)}")
    shown = ["python", *command[1:]]
    shown[shown.index(str(out))] = "FILE"
    return json.loads(out.read_text(encoding="utf-8"))["rows"], " ".join(shown)


def from_bench(row: dict[str, Any], base: dict[str, Any] | None) -> Row:
    """A row of bench_moe's in the words of this check; the speed over our BF16 block within rounds."""
    found: Row = {"what": row["block"]}
    found |= {name: row[name] for name in ("activation", "dropped_frac", "error") if name in row}
    if "error" in row:
        return found
    found |= {
        "ms": row["ms_median"],
        "ms_iqr": row["ms_iqr"],
        "ms_rounds": row["ms_rounds"],
        "rounds": len(row["ms_rounds"]),
        "iterations": row["steps_per_sample"],
        "warm_up": WARM_UP,
    }
    found |= {name: row[name] for name in ("tflops", "compile_s", "peak_mem_mib", "emulated") if name in row}
    if base is not None and "error" not in base and row is not base:
        pairs = zip(base["ms_rounds"], row["ms_rounds"], strict=True)
        found["speed_over_bf16"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return found
