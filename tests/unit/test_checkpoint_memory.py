"""What a save needs of the host's memory, and what it takes to be there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import model.checkpoint as program
from model.checkpoint import available_memory, tensors_of
from model.partition import Span

GIB = 2**30


def test_what_is_not_copied_stays_where_it_is_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has no memory for copies has none for all tensors of a GPU at once either."""
    monkeypatch.setattr(program.dist, "get_rank", lambda: 0)
    on_device = Span("w", "weight", (6,), 0, torch.empty(6, device="meta"), slice(2, 6))
    tensors, facts = tensors_of([on_device], {"bias": torch.zeros(3)}, copy=False)
    assert tensors["w:weight:2"].device.type == "meta"
    assert facts["w"].kinds["weight"].pieces[0].numel == 4


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 64 * GIB),
        ("max", 64 * GIB),
        (str(32 * GIB), 20 * GIB),  # 30 of them in use, 18 of which are pages of files
        (str(256 * GIB), 64 * GIB),
    ],
)
def test_pages_of_files_count_as_memory_that_a_container_still_has(
    tmp_path: Path, limit: str | None, expected: int
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {64 * 2**20} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{30 * GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon {12 * GIB}\nfile {18 * GIB}\ninactive_file {18 * GIB}\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == expected
