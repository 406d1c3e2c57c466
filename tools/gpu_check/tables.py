"""gpu_check.md, from the content of gpu_check.json alone: the targets, then a table for every part."""

from __future__ import annotations

from typing import Any

ENVIRONMENT = {
    "gpu": "GPU",
    "capability": "compute capability",
    "memory_gib": "GPU memory, GiB",
    "driver_version": "driver",
    "sm_clock_mhz": "SM clock, MHz",
    "sm_clock_max_mhz": "SM clock at the most, MHz",
    "memory_clock_mhz": "memory clock, MHz",
    "power_limit_w": "power limit, W",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "python": "Python",
    "cpu": "CPU",
    "cores": "cores",
    "load_before": "load before",
}
# Key of a row, title, digits (None: text). A column that no row of a table fills is left out.
COLUMNS: tuple[tuple[str, str, int | None], ...] = (
    ("what", "what", None),
    ("implementation", "by", None),
    ("shape", "shape", None),
    ("sizes", "sizes", None),
    ("capacity_factor", "capacity", 2),
    ("fast_accumulation", "fast accumulation", None),
    ("ms", "ms", 4),
    ("ms_iqr", "IQR ms", 4),
    ("tflops", "TFLOP/s", 0),
    ("gb_per_s", "GB/s", 0),
    ("share_of_copy", "of a copy", 2),
    ("tok_per_sec", "tok/s", 0),
    ("dt_ms", "dt ms", 2),
    ("dt_ms_iqr", "IQR ms", 2),
    ("mfu", "MFU %", 2),
    ("speed_over_bf16", "speed / bf16", 3),
    ("speed_over_torch", "speed / torch", 3),
    ("bytes", "bytes", None),
    ("relative_error", "relative error", 6),
    ("relative_error_of_rounding_alone", "of rounding alone", 6),
    ("right", "right", None),
    ("peak_mem_mib", "peak MiB", 0),
    ("first_call_s", "first call s", 1),
    ("compile_s", "compile s", 1),
    ("inductor_cache", "cache", None),
    ("launch_to_first_step_s", "launch to first step s", 1),
    ("graphs", "graphs", None),
    ("recompiles", "recompiles", 0),
    ("waits", "waits", None),
    ("data", "data", None),
    ("steps", "steps", 0),
    ("last_loss", "last loss", 4),
    ("mean_last50_loss", "mean of last 50", 4),
    ("val_loss", "val loss", 4),
    ("val_bpb", "val bpb", 4),
    ("parts", "ms by part", None),
    ("outcome", "outcome", None),
    ("seconds", "s", 1),
)


def markdown(content: dict[str, Any]) -> str:
    env = content["env"]
    remark = " with changes" if env.get("dirty") else " (as stated with --commit)" if "commit_stated" in env else ""
    commit = f"{env.get('commit', 'unknown')[:10]}{remark}"
    lines = ["# GPU check", ""]
    if content["dry_run"]:
        lines += ["**Dry run, no measurement.** Tiny sizes on the CPU, to show that the check itself works.", ""]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    lines += [f"`{env['command']}`", "", f"Commit {commit}, {env['date']}, {content['status']}. {packages}.", ""]
    known = [(title, shown(env[name], 2)) for name, title in ENVIRONMENT.items() if name in env]
    lines += [f"{'; '.join(f'{title} {value}' for title, value in known)}.", "", "## Targets", ""]
    head = ["#", "measure", "target", "measured", ""]
    keys = ("number", "measure", "target", "measured", "verdict")
    lines += table(head, [[str(each.get(key, "")) for key in keys] for each in content["targets"]])
    for part in content["parts"].values():
        lines += ["", f"## {part['title']}", "", *section(part)]
    return "\n".join(lines) + "\n"


def section(part: dict[str, Any]) -> list[str]:
    """A part: what became of it and of the cases that were not measured, and its rows. Tests are counted, and named if
    they failed."""
    took = f", {part['seconds']:.0f} s of {part['limit_s']:.0f} s" if "seconds" in part else ""
    lines = [f"{part['status']}{took}"]
    for name, case in part["cases"].items():
        if case["status"] != "measured":
            lines += [f"* {name}: {case['status']}{': ' + case['why'] if case.get('why') else ''}"]
        outcomes = [row["outcome"] for row in case["rows"] if "outcome" in row]
        if outcomes:
            lines += [f"* {name}: {', '.join(f'{outcomes.count(each)} {each}' for each in dict.fromkeys(outcomes))}"]
    rows = [(name, row) for name, case in part["cases"].items() for row in case["rows"]]
    rows = [(name, row) for name, row in rows if row.get("outcome") not in ("passed", "skipped")]
    if rows:
        used = [column for column in COLUMNS if any(column[0] in row for _, row in rows)]
        head = ["case", *(title for _, title, _ in used), "remark"]
        body = [[name, *(shown(row.get(key), digits) for key, _, digits in used), remark(row)] for name, row in rows]
        lines += ["", *table(head, body)]
    return lines


def remark(row: dict[str, Any]) -> str:
    """Why there is no number, or how it was timed."""
    if "error" in row:
        return f"failed: {row['error']}"
    if "absent" in row:
        return f"not measured: {row['absent']}"
    timed = f"{row['rounds']} x {row['iterations']} after {row['warm_up']}" if "iterations" in row else ""
    timed = timed or (f"{row['steps_timed']} steps after {row['warm_up']}" if "steps_timed" in row else "")
    return "; ".join(filter(None, (timed, row.get("note"))))


def shown(value: Any, digits: int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        tables = {"": "parts_ms", "; a micro-step uncompiled: ": "uncompiled_parts_ms"}
        return "".join(
            before + ", ".join(f"{name} {ms:.2f}" for name, ms in value[key].items())
            for before, key in tables.items()
            if key in value
        )
    if isinstance(value, list):
        return str(len(value))
    return f"{value:,.{digits}f}" if isinstance(value, float) and digits is not None else str(value)


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Markdown, padded to be read as it is, without columns that nothing fills."""
    columns = [[title, *(row[at].replace("|", "/") for row in body)] for at, title in enumerate(head)]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in zip(*columns, strict=True)
    ]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |".rstrip() for line in lines]
