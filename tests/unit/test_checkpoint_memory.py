"""What a save needs of the host's memory, and what it takes to be there."""

from __future__ import annotations

import pytest
import torch

import model.checkpoint as program
from model.checkpoint import tensors_of
from model.partition import Span


def test_what_is_not_copied_stays_where_it_is_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has no memory for copies has none for all tensors of a GPU at once either."""
    monkeypatch.setattr(program.dist, "get_rank", lambda: 0)
    on_device = Span("w", "weight", (6,), 0, torch.empty(6, device="meta"), slice(2, 6))
    tensors, facts = tensors_of([on_device], {"bias": torch.zeros(3)}, copy=False)
    assert tensors["w:weight:2"].device.type == "meta"
    assert facts["w"].kinds["weight"].pieces[0].numel == 4
