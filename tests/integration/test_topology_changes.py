"""A state that some ranks saved goes into any others, and out again: every weight and every moment, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero_and_memory import PARTITIONED, Case, load, save, start_engine, train_step

from model.checkpoint import read_tensors
from model.optim import set_lr
from ranks import RankPool

ZERO_1, ZERO_2 = {"stage": 1}, {"stage": 2}


def train_and_save(case: Case, folder: Path, first: int, steps: int, load_first: bool) -> list[float]:
    """Losses of steps first, first + 1, ..., from the checkpoint of `first`; the state that they leave is saved."""
    engine = start_engine(case)
    if load_first:
        load(engine, case, folder, first)
    losses = [train_step(engine, step)["loss"] for step in range(first, first + steps)]
    save(engine, case, folder, first + steps)
    engine.destroy()
    return losses


def pass_on(case: Case, source: Path, target: Path, step: int) -> float:
    """Load under `case`, save at once; then the loss of a step whose learning rate is 0, which is saved as the next."""
    engine = start_engine(case)
    load(engine, case, source, step)
    save(engine, case, target, step)
    set_lr(engine.optimizer, 0.0)
    loss = train_step(engine, step)["loss"]
    save(engine, case, target, step + 1)
    engine.destroy()
    return loss


def tensors(folder: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, kind): values for name, kind, values in read_tensors(folder / f"step_{step:08d}")}


def assert_equal(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert values.dtype == theirs[key].dtype, key
        assert torch.equal(values, theirs[key]), key


@pytest.mark.parametrize(
    ("start", "alone", "many"),
    [  # of two ranks, one, and four
        (Case("MOE", ZERO_1, 2), Case("MOE", ZERO_2, 1), Case("MOE", ZERO_1, 4)),
        (Case("MOE", ZERO_2, 1, bf16=True), Case("MOE", ZERO_1, 1, bf16=True), Case("MOE", ZERO_2, 2, bf16=True)),
        (
            Case("MOE", ZERO_1, 2, bf16=True, muon=True),
            Case("MOE", ZERO_2, 1, bf16=True, muon=True),
            Case("MOE", ZERO_2, 2, bf16=True, muon=True),
        ),
        (Case("TIED", PARTITIONED), Case("TIED", ZERO_2), Case("TIED", {"stage": 0})),
        (
            Case("DENSE", {"stage": 0}, bf16=True),
            Case("DENSE", ZERO_1, bf16=True),
            Case("DENSE", PARTITIONED, bf16=True),
        ),
    ],
    ids=lambda case: str(case) if isinstance(case, Case) else None,
)  # fmt: skip
def test_two_ranks_then_one_then_four_then_two_again_continue_as_if_nothing_had_been(
    one_rank: RankPool,
    two_ranks: RankPool,
    four_ranks: RankPool,
    start: Case,
    alone: Case,
    many: Case,
    tmp_path: Path,
) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    two_ranks.run(train_and_save, start, first, 0, 2, False)
    (undisturbed, _) = two_ranks.run(train_and_save, start, first, 2, 2, True)

    saved = tensors(first, 2)
    assert {kind for _, kind in saved} == {
        "weight",
        *(("momentum_buffer",) if start.muon else ()),
        "exp_avg",
        "exp_avg_sq",
    }
    (of_one,) = one_rank.run(pass_on, alone, first, second, 2)
    assert_equal(tensors(second, 2), saved)
    of_four = four_ranks.run(pass_on, many, second, third, 2)
    assert_equal(tensors(third, 2), saved)
    tolerance = 2e-2 if start.bf16 else 1e-5
    assert of_one == pytest.approx(undisturbed[0], abs=tolerance)
    assert of_four[0] == pytest.approx(undisturbed[0], abs=tolerance)
    for folder in (second, third):
        after = tensors(folder, 3)
        for key in (key for key in saved if key[1] == "weight"):
            assert torch.equal(after[key], saved[key]), f"{key[0]} moved at a learning rate of 0"
        assert any(not torch.equal(after[key], saved[key]) for key in saved if key[1] != "weight"), "no step was taken"

    (again, _) = two_ranks.run(train_and_save, start, third, 2, 2, True)
    assert again == undisturbed
    assert_equal(tensors(third, 4), tensors(first, 4))
