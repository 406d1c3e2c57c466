"""python -m tools.gpu_check --dry_run as a user calls it: every part, in tiny sizes, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.run_config import REPO_ROOT
from tools.gpu_check.child import DRY, MEASURED
from tools.gpu_check.parts import PARTS

TIMEOUT = 480  # seconds; against hanging only: on two idle cores it takes less than one minute


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Where it wrote, where it might have left something, and what it printed."""
    out, temporary = tmp_path_factory.mktemp("check") / "out", tmp_path_factory.mktemp("tmp")
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--out", str(out), "--dry_run", "--minutes", "7"],
        cwd=REPO_ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, temporary, done.stdout


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in content["parts"].values() for case in part["cases"].values() for row in case["rows"]]


def test_every_case_of_every_part_comes_to_its_end(folders: tuple[Path, Path, str]) -> None:
    out, temporary, printed = folders
    content = json.loads((out / "gpu_check.json").read_text())
    assert (content["schema"], content["status"], content["dry_run"]) == (1, "finished", True)
    assert list(content["parts"]) == [part.name for part in PARTS]
    for part in PARTS:
        cases = content["parts"][part.name]["cases"]
        assert tuple(cases) == part.dry_cases
        assert {case["status"] for case in cases.values()} == {"measured"}, cases
        assert all(case["rows"] for case in cases.values()), part.name
    assert "0 failed, 0 not reached (dry run, no measurement)" in printed
    assert list(temporary.iterdir()) == []
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "gpu_check.md", "logs"}


def test_nothing_in_it_is_a_figure_of_speed(folders: tuple[Path, Path, str]) -> None:
    content = json.loads((folders[0] / "gpu_check.json").read_text())
    for row in rows_of(content):
        assert row["note"] == DRY
        assert not MEASURED & set(row), row
        assert "error" not in row
    for target in content["targets"]:
        assert target["measured"] == f"not measured: {DRY}"
    for line in (folders[0] / "gpu_check.md").read_text().splitlines():
        for title in ("TFLOP/s |", "GB/s", "tok/s", "speed /", "MFU % |"):
            assert title not in line


def test_the_table_names_what_it_was_made_with_and_every_target(folders: tuple[Path, Path, str]) -> None:
    table = (folders[0] / "gpu_check.md").read_text()
    content = json.loads((folders[0] / "gpu_check.json").read_text())
    assert "**Dry run, no measurement.**" in table
    assert "`python -m tools.gpu_check --out DIR --dry_run --minutes 7`" in table
    assert content["env"]["packages"]["torch"] in table
    for number in range(1, 12):
        assert f"\n| {number} " in table
    for part in PARTS:
        assert f"## {part.title}" in table


def test_no_path_of_this_machine_is_in_what_is_to_be_committed(folders: tuple[Path, Path, str]) -> None:
    for name in ("gpu_check.json", "gpu_check.md"):
        text = (folders[0] / name).read_text()
        for path in (folders[0], folders[1], REPO_ROOT):
            assert str(path) not in text


def test_legs_and_blocks_say_how_they_were_run(folders: tuple[Path, Path, str]) -> None:
    parts = json.loads((folders[0] / "gpu_check.json").read_text())["parts"]
    bf16, fp8 = (parts["steps"]["cases"][name]["rows"][0] for name in ("bf16", "fp8_experts"))
    for row in (bf16, fp8):
        assert row["config"] == "ds_configs/moe_tiny.json"
        assert "bf16.enabled=true" in row["set"]
        assert (row["data"], row["steps_timed"], row["recompiles"]) == ("synthetic", 3, 0)
    assert fp8["fp8_matrices"]["converted"] > 0
    assert "fp8_matrices" not in bf16
    block = parts["blocks"]["cases"]["seed ours"]["rows"][-1]
    assert block["command"].startswith("python -m tools.bench_moe --device cpu")
    assert all(row["right"] for row in rows_of({"parts": {"gemm": parts["gemm"]}}) if "right" in row)
