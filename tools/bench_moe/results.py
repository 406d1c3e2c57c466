"""What is written down: the machine and the code (`env`), rows as JSON, and the tables that are made from it alone."""

from __future__ import annotations

import json
import os
import platform
import shlex
from pathlib import Path
from typing import Any

from launch.environment import cpu_model, describe_checkout, package_versions, utc_now
from launch.run_config import REPO_ROOT
from launch.run_dir import write_text
from model.config import ConfigError

TOOL = "bench_moe"
FOLDER = REPO_ROOT / "benchmarks"
README = FOLDER / "README.md"
BEGIN, END = "<!-- results: written by python -m tools.bench_moe --readme -->", "<!-- end of results -->"
PACKAGES = ("torch", "deepspeed", "torchao", "transformers", "triton")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides how fast a CPU multiplies bf16
VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "MALLOC_", "GLIBC_TUNABLES", "NVIDIA_TF32",
             "CUBLAS_", "PYTORCH_", "TORCH_BLAS", "CUDA_LAUNCH_BLOCKING")  # fmt: skip

Row = dict[str, Any]


def describe_machine(arguments: list[str]) -> dict[str, Any]:
    """The part of `env` that needs no torch. No paths: it is made to be committed."""
    return {
        "tool": TOOL,
        "command": shlex.join(["python", "-m", "tools.bench_moe", *arguments]),
        "date": utc_now(),
        **describe_checkout(REPO_ROOT),
        "packages": {name: version for name, version in package_versions().items() if name in PACKAGES},
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags_of_cpu()],
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],  # other processes, if it is not near 0
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        # a preloaded library may bring another malloc
        "preloaded": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()],
    }


def flags_of_cpu(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def write_results(path: Path, env: dict[str, Any], rows: list[Row]) -> None:
    """The JSON, one line per row, so that a diff shows which changed."""
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows)
    head = json.dumps({"env": env}, indent=1, allow_nan=False).removesuffix("\n}")
    write_text(path, f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    """Markdown: one table for every shape and precision, or one of training steps."""
    if any("run" in row for row in rows):
        return table(STEP_COLUMNS, rows)
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(f"{', '.join(f'{n}={v}' for n, v in row['shape'].items())}, {row['dtype']}", []).append(row)
    return "\n\n".join(f"{title}\n\n{table(BLOCK_COLUMNS, cases[title])}" for title in cases)


def number(row: Row, key: str, digits: int, factor: float = 1.0) -> str:
    return f"{factor * row[key]:,.{digits}f}" if key in row else ""


def routing(row: Row) -> str:
    """Capacity 1.0 and what it dropped, or that nothing is dropped."""
    if row.get("capacity_factor", 0.0) == 0.0:
        return "dropless" if "capacity_factor" in row else ""
    dropped = f", {number(row, 'dropped_frac', 1, 100)}% dropped" if "dropped_frac" in row else ""
    return f"capacity {row['capacity_factor']}{dropped}"


BLOCK_COLUMNS = {
    "block": lambda row: f"`{row['block']}`{', emulated' if row.get('emulated') else ''}",
    "routing": routing,
    "activation, width": lambda row: f"{row['activation']}, {row['width']}" if "width" in row else "",
    "GFLOP": lambda row: number(row, "flops", 1, 1e-9),
    "ms": lambda row: row["error"].replace("|", "/") if "error" in row else number(row, "ms_median", 2),
    "IQR": lambda row: number(row, "ms_iqr", 2),
    "speed / stock": lambda row: number(row, "speed_over_stock", 2),
    "time / dense": lambda row: number(row, "time_over_dense", 2),
    "compiled / dense compiled": lambda row: number(row, "time_over_dense_static", 2),
    "TFLOP/s": lambda row: number(row, "tflops", 2),
    "peak MiB": lambda row: number(row, "peak_mem_mib", 0),
    "compile s": lambda row: number(row, "compile_s", 0),
}
STEP_COLUMNS = {
    "run": lambda row: f"`{row['run']}`" + (", load forced" if row.get("moe/force_balanced") else ""),
    "commit": lambda row: commit(row),
    "ranks": lambda row: number(row, "world_size", 0),
    "tok/s": lambda row: row["error"].replace("|", "/") if "error" in row else number(row, "tok_per_sec_median", 0),
    "IQR of tok/s": lambda row: number(row, "tok_per_sec_iqr", 0),
    "dt ms": lambda row: number(row, "dt_ms_median", 1),
    "MFU %": lambda row: number(row, "mfu_median", 2),
    "peak MiB": lambda row: number(row, "peak_mem_mib_median", 0),
    "compile s": lambda row: number(row, "compile_s_median", 1),
    "launch to first step s": lambda row: number(row, "launch_to_first_step_s_median", 1),
}


def commit(facts: dict[str, Any]) -> str:
    return f"{facts.get('commit', 'unknown')[:10]}{' with changes' if facts.get('dirty') else ''}"


def table(columns: dict[str, Any], rows: list[Row]) -> str:
    """A Markdown table without the columns that no row fills, padded to be read as it is."""
    cells = [[title, *(show(row) for row in rows)] for title, show in columns.items()]
    kept = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in zip(*kept, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- benchmarks/README.md -------------------------------------------------------------------------------------------


def is_ours(path: Path) -> bool:
    """Whether bench_moe wrote it: the folder holds other tools' results too."""
    return json.loads(path.read_text(encoding="utf-8")).get("env", {}).get("tool") == TOOL


def section_of(path: Path) -> str:
    """What the README says of one file of results."""
    results = json.loads(path.read_text(encoding="utf-8"))
    env = results["env"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    hardware = (
        f"{env['cores']} cores of {env['cpu']} ({', '.join(env['cpu_flags']) or 'none of ' + ', '.join(CPU_FLAGS)})"
    )
    if env.get("device", "cpu") != "cpu":
        hardware = f"{env['device']}; {hardware}"
    return "\n".join(
        [
            f"### {path.name}",
            "",
            f"`{env['command']}`",
            "",
            f"Commit {commit(env)}, {env['date'][:10]}. {hardware}. {packages}. Load before: {env['load_before']:.2f}.",
            "",
            tables(results["rows"]),
        ]
    )


def with_results(readme: str, folder: Path = FOLDER) -> str:
    """The README with the tables of all files of results beside it. Raises ConfigError if it has no place for them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{README}: lacks the lines {BEGIN} and {END}. Put them where the tables belong.")
    sections = [section_of(path) for path in sorted(folder.glob("*.json")) if is_ours(path)] or ["None yet."]
    return "\n\n".join([f"{before}{BEGIN}", *sections, f"{END}{after}"])
