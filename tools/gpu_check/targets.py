"""The project's targets for FP8 on one Hopper GPU, each with what was measured for it, or why nothing was.

Nothing here computes with a number that is not there: a ratio needs both of its sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tools.gpu_check.parts import RELU2_CASTS

Content = dict[str, Any]
Row = dict[str, Any]
DRY = "dry run, no measurement"


class NotMeasured(LookupError):
    """A number that a target needs is not there. The message says why."""


class Judgement(NamedTuple):
    """What was measured for a target."""

    measured: str
    verdict: str  # met, missed, undecided


class Target(NamedTuple):
    """A row of the table of targets."""

    number: int
    measure: str
    target: str
    judge: Callable[[Content], Judgement]


def row_of(content: Content, part: str, case: str, what: str, **others: str) -> Row:
    """The row of that name. Raises NotMeasured."""
    if content["dry_run"]:
        raise NotMeasured(DRY)
    if part not in content["parts"]:
        raise NotMeasured(f"the part {part} was not asked for")
    cases = content["parts"][part]["cases"]
    if case not in cases:
        raise NotMeasured(f"{part}, {case}: was not asked for")
    wanted = {"what": what, **others}
    found = [row for row in cases[case]["rows"] if all(row.get(name) == value for name, value in wanted.items())]
    if not found:
        entry = cases[case]
        raise NotMeasured(f"{part}, {case}, {what}: {entry['status']}{': ' + entry['why'] if entry.get('why') else ''}")
    for key in ("error", "absent"):
        if key in found[0]:
            raise NotMeasured(f"{part}, {case}, {what}: {found[0][key]}")
    return found[0]


def number_of(row: Row, key: str) -> float:
    """Raises NotMeasured for what is absent, or not a finite number."""
    value = row.get(key)
    if not isinstance(value, int | float):
        raise NotMeasured(f"{row['what']}: no {key}")
    return value


def verdict(met: bool) -> str:
    return "met" if met else "missed"


# --- one function for each target -----------------------------------------------------------------------------------


def speed_of(part: str, rows: dict[str, str], least: float, case: str) -> Callable[[Content], Judgement]:
    """FP8 over BF16 in rows that were measured together; `rows` are rows by the name to show."""

    def judge_it(content: Content) -> Judgement:
        found: dict[str, float] = {}
        reasons = []
        for name, what in rows.items():
            try:
                found[name] = number_of(row_of(content, part, case, what), "speed_over_bf16")
            except NotMeasured as why:
                reasons.append(str(why))
        if not found:
            raise NotMeasured("; ".join(dict.fromkeys(reasons)))
        shown = ", ".join(f"{name} {value:.3f}x" for name, value in found.items())
        return Judgement(shown, verdict(max(found.values()) >= least))

    return judge_it


def casts(content: Content) -> Judgement:
    """The slowest of the casts that the seed's experts need, each by its faster implementation. Triton's counts where
    its bytes are those of plain torch, as it promises; compiled, torch casts values that it has not rounded to bf16."""
    fastest: dict[str, float] = {}
    for what in RELU2_CASTS:
        found = []
        reasons = []
        for implementation in ("torch, compiled", "triton"):
            try:
                row = row_of(content, "casts", f"seed {what}", what, implementation=implementation)
                if implementation == "triton" and row.get("bytes_differing") != 0:
                    raise NotMeasured(f"{what}: Triton's bytes: {row.get('bytes')}")
                found.append(number_of(row, "gb_per_s") / 1000)
            except NotMeasured as why:
                reasons.append(str(why))
        if not found:
            raise NotMeasured("; ".join(dict.fromkeys(reasons)))
        fastest[what] = max(found)
    slowest = min(fastest, key=fastest.__getitem__)
    shown = f"{fastest[slowest]:.2f} ({slowest}) to {max(fastest.values()):.2f} TB/s"
    return Judgement(shown, verdict(fastest[slowest] >= 3.0))


def runs_of(content: Content, leg: str) -> list[Row]:
    """The leg and, if that was measured too, its repeat."""
    found = [row_of(content, "steps", leg, leg)]
    try:
        found.append(row_of(content, "steps", f"{leg}_again", f"{leg}_again"))
    except NotMeasured:
        pass
    return found


def step_ratio(content: Content, leg: str, base: str) -> tuple[float, float, float]:
    """Speed of a leg over another: of the medians, and the least and largest over all pairs of blocks of steps."""
    legs, bases = (runs_of(content, name) for name in (leg, base))
    ours, theirs = ([block for run in runs for block in run.get("dt_ms_blocks", [])] for runs in (legs, bases))
    if not ours or not theirs:
        raise NotMeasured(f"{leg} or {base}: no times of steps")
    middle = number_of(bases[0], "dt_ms") / number_of(legs[0], "dt_ms")
    return middle, min(theirs) / max(ours), max(theirs) / min(ours)


def step_speed(legs: tuple[str, ...], base: str, least: float) -> Callable[[Content], Judgement]:
    def judge_it(content: Content) -> Judgement:
        shown, verdicts, reasons = [], [], []
        for leg in legs:
            try:
                middle, low, high = step_ratio(content, leg, base)
            except NotMeasured as why:
                reasons.append(str(why))
                continue
            shown.append(f"{leg} {middle:.3f}x [{low:.3f}, {high:.3f}]")
            verdicts.append("met" if low >= least else "missed" if high < least else "undecided")
        if not shown:
            raise NotMeasured("; ".join(dict.fromkeys(reasons)))
        order = ("met", "undecided", "missed")
        return Judgement(", ".join(shown), min(verdicts, key=order.index))

    return judge_it


def mfu(content: Content) -> Judgement:
    row = row_of(content, "steps", "bf16", "bf16")
    percent, speed = number_of(row, "mfu"), number_of(row, "tok_per_sec")
    peak = number_of(row, "peak_flops") / 1e12
    shown = f"{percent:.2f}% of {peak:.0f} TFLOP/s, {speed:,.0f} tok/s, Muon, data {row.get('data')}"
    return Judgement(shown, verdict(percent >= 40))


def loss(content: Content) -> Judgement:
    """FP8's distance from BF16 against that of BF16 from itself, repeated or with another seed."""
    rows = {leg: row_of(content, "loss", leg, leg) for leg in ("bf16", "fp8_experts")}
    tails = {leg: number_of(row, "mean_last50_loss") for leg, row in rows.items()}
    distance = abs(tails["fp8_experts"] - tails["bf16"])
    shown = (
        f"{rows['bf16'].get('steps')} steps, data {rows['bf16'].get('data')}: bf16 {tails['bf16']:.4f}, "
        f"fp8_experts {tails['fp8_experts']:.4f}, apart {distance:.4f}"
    )
    noise: list[float] = []
    for leg in ("bf16_again", "bf16_other_seed"):
        try:
            noise.append(abs(number_of(row_of(content, "loss", leg, leg), "mean_last50_loss") - tails["bf16"]))
        except NotMeasured as why:
            shown += f"; {why}"
        else:
            shown += f"; {leg} apart {noise[-1]:.4f}"
    return Judgement(shown, verdict(distance <= max(noise)) if noise else "undecided")


def memory(content: Content) -> Judgement:
    bf16, fp8 = (row_of(content, "steps", leg, leg) for leg in ("bf16", "fp8_experts"))
    ours, theirs = number_of(fp8, "peak_mem_mib"), number_of(bf16, "peak_mem_mib")
    return Judgement(f"fp8_experts {ours:,.0f} MiB, bf16 {theirs:,.0f} MiB", verdict(ours <= theirs))


def seconds(key: str, most: float) -> Callable[[Content], Judgement]:
    """Of a leg that compiled all anew."""

    def judge_it(content: Content) -> Judgement:
        found = {}
        for leg in ("bf16", "fp8_experts"):
            row = row_of(content, "steps", leg, leg)
            if row.get("inductor_cache") != "empty":
                raise NotMeasured(f"{leg}: did not begin with an empty cache of compiled code")
            found[leg] = number_of(row, key)
        shown = ", ".join(f"{leg} {value:.1f} s" for leg, value in found.items())
        return Judgement(shown, verdict(max(found.values()) <= most))

    return judge_it


def exchanged(content: Content) -> Judgement:
    raise NotMeasured(DRY if content["dry_run"] else "one GPU exchanges nothing: needs two or more")


GEMMS = {"3d-3d": "fp8 3d-3d", "2d-3d": "fp8 2d-3d"}
MLPS = {"torch casts": "fp8", "triton casts": "fp8, triton casts"}
BLOCK = {"ours/fp8": "ours/fp8+static"}
EXPERTS, ALL = ("fp8_experts", "fp8_experts_triton"), ("fp8_all", "fp8_all_triton")

TARGETS = (
    Target(1, "FP8 product over BF16 bmm, seed's shape", ">= 1.4x", speed_of("gemm", GEMMS, 1.4, "rates seed")),
    Target(1, "the same, 2048 x 4096", ">= 1.6x", speed_of("gemm", GEMMS, 1.6, "rates 2048")),
    Target(2, "casts, the slowest, seed's shape", ">= 3.0 TB/s", casts),
    Target(3, "experts forward+backward, FP8 over BF16, seed", ">= 1.15x", speed_of("mlp", MLPS, 1.15, "seed ours")),
    Target(3, "the same, 2048 x 4096", ">= 1.30x", speed_of("mlp", MLPS, 1.30, "2048 ours")),
    Target(3, "the same, 64 experts of 2048 x 1408", ">= 1.10x", speed_of("mlp", MLPS, 1.10, "E64 ours")),
    Target(4, "MoE block, FP8 over BF16, seed", ">= 1.08x", speed_of("blocks", BLOCK, 1.08, "seed ours")),
    Target(4, "the same, 2048 x 4096", ">= 1.25x", speed_of("blocks", BLOCK, 1.25, "2048 ours")),
    Target(5, "whole step, experts in FP8, over BF16, seed", ">= 1.04x", step_speed(EXPERTS, "bf16", 1.04)),
    Target(5, "the same, hidden size 2048", ">= 1.10x",
           step_speed(("fp8_experts_2048", "fp8_experts_triton_2048"), "bf16_2048", 1.10)),
    Target(6, "whole step, experts, linears and head in FP8, seed", ">= 1.12x", step_speed(ALL, "bf16", 1.12)),
    Target(6, "the same, hidden size 2048", ">= 1.20x", step_speed(("fp8_all_2048",), "bf16_2048", 1.20)),
    Target(7, "BF16 whole step at the seed's settings, MFU", ">= 40%, stretch 45%", mfu),
    Target(8, "MoE step over dense step of equal FLOPs, BF16", ">= 0.90x", step_speed(("bf16",), "dense", 0.90)),
    Target(9, "loss, same data", "FP8 within run-to-run noise of BF16", loss),
    Target(10, "peak memory of a run", "FP8 <= BF16", memory),
    Target(10, "seconds of compiling", "<= 60 s", seconds("compile_s", 60)),
    Target(10, "launch to the end of the first step", "<= 90 s", seconds("launch_to_first_step_s", 90)),
    Target(11, "all-to-all bytes per GPU and micro-step, exposed ms", "published", exchanged),
)  # fmt: skip


def judge(content: Content) -> list[dict[str, Any]]:
    """All targets, in order, with what was measured or "not measured: why"."""
    found = []
    for target in TARGETS:
        try:
            measured, result = target.judge(content)
        except NotMeasured as why:
            measured, result = f"not measured: {why}", ""
        entry = {"number": target.number, "measure": target.measure, "target": target.target, "measured": measured}
        found.append(entry | ({"verdict": result} if result else {}))
    return found
