"""Published figures stand in their file as they were published, and a wrong file is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.reference import Reference, read_reference, reference_table
from launch.run_config import REPO_ROOT
from model.config import ConfigError

SEED = REPO_ROOT / "benchmarks" / "seed_h800.json"

WITH, WITHOUT = "with experts", "without experts"
# leg, FP8, compile, capacity factor, steps, status, tok/s, dt ms, MFU %, peak MiB, minutes; None: not published
PUBLISHED = [
    ("bf16 experts, static compile", "none", "static", None, 360, None, 1080430, 487.1, 13.07, 23429, 3.31),
    ("fp8 without experts, static", WITHOUT, "static", None, 360, None, 1039883, 505.2, 12.58, 23234, 3.50),
    ("fp8 with experts, dynamic", WITH, "dynamic", None, 360, None, 785495, 669.7, 9.51, 19669, 4.06),
    ("fp8 with experts, static", WITH, "static", None, 360, None, 474178, 1107.1, 5.74, 22791, 6.67),
    ("bf16 experts, no compile", "none", "none", None, 360, None, 1045351, 503.9, 12.65, 23433, 3.41),
    ("fp8 with experts, no compile", WITH, "none", None, 360, None, 359711, 1462.6, 4.35, 22863, 8.53),
    ("bf16 experts, dynamic", "none", "dynamic", None, None, None, 947987, None, None, 21107, 1.71),
    ("fp8 without experts, dynamic", WITHOUT, "dynamic", None, None, None, 913356, None, None, 20980, 1.73),
    ("fp8 with experts, dynamic, 360 steps", WITH, "dynamic", None, 360, None, 799038, 657.4, 9.67, 19666, 4.08),
    ("fp8 with experts, dynamic, coalesce guard", WITH, "dynamic", None, None, None, 781338, None, None, 19670, 1.64),
    ("fp8 with experts, static, repeat", WITH, "static", None, None, None, 478362, None, None, 22787, 2.54),
    ("fp8 with experts, no compile, repeat", WITH, "none", None, None, None, 364789, None, None, 22865, 3.23),
    ("capacity 0.0 (dropless)", WITH, "static", 0.0, 280, "completed", 468783, 1120.4, 5.67, None, None),
    ("capacity 1.0", WITH, "static", 1.0, 280, "stopped at step 106", 783042, 670.1, 9.47, None, None),
    ("capacity 1.25", WITH, "static", 1.25, 280, "never ran", None, None, None, None, None),
    ("capacity 1.0, dynamic", WITH, "dynamic", 1.0, 280, "never ran", None, None, None, None, None),
    ("capacity 1.0, no compile", WITH, "none", 1.0, 280, "never ran", None, None, None, None, None),
]  # fmt: skip


@pytest.fixture
def seed() -> Reference:
    return read_reference(SEED)


def test_every_published_number_is_there_and_no_other(seed: Reference) -> None:
    rows = [
        (row.leg, row.fp8, row.compile, row.capacity_factor, row.steps, row.status,
         row.tok_per_sec, row.dt_ms, row.mfu, row.peak_mem_mib, row.total_time_min)
        for row in seed.rows
    ]  # fmt: skip
    assert rows == PUBLISHED
    assert [row.leg for row in seed.rows if row.coalesce_guard] == ["fp8 with experts, dynamic, coalesce guard"]


def test_published_speed_time_and_mfu_agree_with_what_is_stated_of_the_run(seed: Reference) -> None:
    """tok/s is a mean of rates and dt one of times, printed to one digit of percent; they may differ by some tenths."""
    for row in seed.rows:
        if row.tok_per_sec and row.dt_ms and row.mfu:
            assert 1000 * seed.tokens_per_step / row.dt_ms == pytest.approx(row.tok_per_sec, rel=0.01), row.leg
            rate = row.tok_per_sec * seed.flops_per_token / seed.num_gpus
            assert 100 * rate / seed.peak_flops == pytest.approx(row.mfu, abs=0.006), row.leg


def test_the_table_shows_what_was_published_and_the_rate_of_one_gpu(seed: Reference) -> None:
    table = reference_table(seed)
    assert len(table.rows) == len(PUBLISHED)
    names = [column.name for column in table.columns]
    first, never = (dict(zip(names, table.rows[index], strict=True)) for index in (0, -1))
    assert first == {
        "leg": "bf16 experts, static compile",
        "status": None,
        "steps": 360,
        "tok/s": 1080430,
        "tok/s per GPU": 135053.75,
        "dt ms": 487.1,
        "MFU %": 13.07,
        "peak MiB": 23429,
        "minutes": 3.31,
    }
    assert [name for name, cell in never.items() if cell is not None] == ["leg", "status", "steps"]
    for fact in (
        "8x H800",
        "524,288 tokens a step",
        "756 TFLOP/s a GPU",
        "731.8 MFLOP per token",
        "one run per leg",
        "1-2%",
    ):
        assert fact in table.note


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"title": None}, "r.json: reference.title is missing. State it."),
        ({"num_gpus": 0}, "r.json: reference.num_gpus=0: should be greater than or equal to 1."),
        ({"rows": []}, "r.json: reference.rows=[]: should be"),
        ({"rows": "none"}, 'r.json: reference.rows="none": should be'),
        ({"rows": [{"leg": "a", "fp8": "none"}]}, "r.json: rows[0].compile is missing. State it."),
        ({"rows": [{"leg": "a", "fp8": "none", "compile": "none", "mfu": "9"}]}, 'r.json: rows[0].mfu="9": should be'),
        ({"rows": [{"leg": "a", "fp8": "none", "compile": "none", "toks": 9}]}, "r.json: rows[0].toks"),
        ({"rows": [{"leg": "a", "fp8": "none", "compile": "none"}] * 2}, "r.json: leg='a' stands in two rows."),
        ({"rows": [7]}, "r.json: rows[0]"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    tree = {key: value for key, value in {**json.loads(SEED.read_text()), **changes}.items() if value is not None}
    (tmp_path / "r.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as refusal:
        read_reference(tmp_path / "r.json")
    assert str(refusal.value).startswith(line)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--reference .*none\.json: no such file"):
        read_reference(tmp_path / "none.json")
