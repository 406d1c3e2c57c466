"""FP8 in runs: the graphs of bf16, the same on any number of ranks, resumed bit for bit, never with old copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compile import TRAINING, VALIDATION, one_pass, trace_only, train_run
from test_expert_parallelism import batch, tiny_model, train_in_one_process, train_on_ranks, wake_up
from test_train import metrics, train, weights

from launch.run_config import REPO_ROOT, load_run
from model.compiling import CompileWatch, compile_blocks
from model.config import FP8Config
from model.fp8 import apply_fp8
from model.fp8_weights import refresh_fp8
from model.gpt import GPT
from ranks import RankPool

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
ALL = {"dense": True, "lm_head": True}
SETTINGS = ("run.fp8.enabled=true", "run.fp8.dense=true", "run.fp8.lm_head=true")


# --- compiled -------------------------------------------------------------------------------------------------------


def build(mode: Any, fp8: dict[str, Any], *settings: str) -> GPT:
    model = GPT(load_run(TINY, list(settings)).model, seed=3)
    wake_up(model, 0, 4)
    apply_fp8(model, FP8Config(enabled=True, **fp8), emulate=True, compiled=False)
    refresh_fp8(model)
    compile_blocks(model.blocks, mode)
    return model


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize(
    ("fp8", "settings"),
    [
        (ALL, ()),
        ({}, ("run.model.moe.capacity_factor=0",)),
        ({"recipe": "rowwise"}, ("run.model.activation=swiglu",)),
    ],
)
def test_static_fp8_blocks_make_the_graphs_of_bf16_and_are_never_compiled_again(
    watch: CompileWatch, backend: str, fp8: dict[str, Any], settings: tuple[str, ...]
) -> None:
    if backend == "inductor" and fp8 != ALL:
        pytest.skip("one configuration is enough for inductor's seconds")
    torch._dynamo.utils.counters.clear()
    patch = trace_only(backend)
    model, eager = build("static", fp8, *settings), build("none", fp8, *settings)
    for step in range(3):
        assert one_pass(model, batch(step)) == pytest.approx(one_pass(eager, batch(step)), rel=1e-3)
        assert watch.look("training step") == []
    assert watch.graphs == TRAINING
    for name, parameter in model.named_parameters():
        expected = dict(eager.named_parameters())[name].grad
        # A sum in another order can take a value to the next FP8 number, 2^-3 away; such values are few.
        assert float((parameter.grad - expected).norm() / expected.norm()) < 2**-5, name
    for step in range(2):
        assert one_pass(model.eval(), batch(step)) == pytest.approx(one_pass(eager.eval(), batch(step)), rel=1e-6)
        assert watch.look("validation") == []
    assert watch.graphs == TRAINING + VALIDATION
    one_pass(model.train(), batch(3))
    refresh_fp8(model)
    one_pass(model, batch(4))
    assert watch.look("training step") == []
    assert not torch._dynamo.utils.counters["graph_break"]
    patch.undo()


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_compiled_fp8_run_of_two_ranks_never_compiles_again(
    two_ranks: RankPool, tmp_path: Path, ep_size: int
) -> None:
    """Beside the blocks' graphs one each for the casts of w1 and w2, which have equal shapes here; the head's weight
    and operands are others."""
    settings = [*SETTINGS, f"run.launch.ep_size={ep_size}", "run.compile.mode=static", "run.train.num_steps=4"]
    assert two_ranks.run(train_run, tmp_path / "run", [*settings, "run.train.eval_every=2"], True) == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recompiles"] == 0
    blocks = {1: len(TRAINING + VALIDATION), 2: len(TRAINING) + 7}[ep_size]
    casts = 2 + 2  # weights of experts and head; the head's rows and gradients of logits
    assert summary["compiled_graphs"] == blocks + casts
    assert summary["fp8_matrices"] == {"converted": 25, "skipped": 3}


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity_factor", "ep_size"), [(0.0, 1), (0.0, 2), (4.0, 2)])
def test_two_ranks_equal_one_process_in_fp8(two_ranks: RankPool, capacity_factor: float, ep_size: int) -> None:
    """At capacity 4 of 4 experts nothing is ever dropped. Sums in another order take a few values to the next FP8
    number, 2^-3 away: one in 1e5 of them, at a distance in fp32 of about 1e-6."""
    config = tiny_model(capacity_factor=capacity_factor, expert_backend="bmm" if capacity_factor else "grouped")
    expected = train_in_one_process(config, ALL)
    high_precision = train_in_one_process(config)
    assert expected["losses"] != pytest.approx(high_precision["losses"], abs=1e-5), "FP8 changed nothing"
    for answer in two_ranks.run(train_on_ranks, config, ep_size, 1, ALL):
        assert answer["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert answer["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        for name, weight in answer["weights"].items():
            close = torch.isclose(weight, expected["weights"][name], rtol=1e-3, atol=2e-4)
            assert close.double().mean() > 0.99, name


# --- runs -----------------------------------------------------------------------------------------------------------


def test_an_fp8_run_resumes_bit_for_bit_and_its_checkpoint_is_that_of_a_bf16_run(tmp_path: Path) -> None:
    settings = ("--set", "bf16.enabled=true", *SETTINGS)
    assert train(1, tmp_path / "whole", *settings).returncode == 0
    first = train(1, tmp_path / "halves", *settings, "run.train.stop_at_step=5")
    assert first.returncode == 3, first.stderr
    assert train(1, tmp_path / "halves", *settings).returncode == 0
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    whole, halves = weights(tmp_path / "whole", 10), weights(tmp_path / "halves", 10)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)

    bf16 = train(1, tmp_path / "bf16", "--set", "bf16.enabled=true")
    assert bf16.returncode == 0, bf16.stderr
    plain = weights(tmp_path / "bf16", 10)
    assert {name: value.shape for name, value in plain.items()} == {name: value.shape for name, value in whole.items()}
    assert any(not torch.equal(plain[name], whole[name]) for name in whole), "FP8 changed nothing"


def load_and_continue(checkpoints: Path, fp8: bool) -> list[float]:
    """Two steps from a checkpoint of an FP8 run, through the engine, with or without FP8."""
    import deepspeed

    from model.checkpoint import load_checkpoint
    from model.manifest import read_manifest
    from model.optim import build_optimizer
    from model.partition import TrainingPartition

    run = load_run(TINY, ["bf16.enabled=true"])
    model = GPT(run.model, ep_size=2, ep_rank=torch.distributed.get_rank(), seed=99)
    if fp8:
        apply_fp8(model, FP8Config(enabled=True, **ALL), emulate=True, compiled=False)
    config = {key: value for key, value in run.deepspeed.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, run.deepspeed["optimizer"]), config=config
    )
    checkpoint = checkpoints / "step_00000010"
    load_checkpoint(TrainingPartition(engine, 2), checkpoint, read_manifest(checkpoint))
    losses = []
    for step in range(2):
        refresh_fp8(engine.module)
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = batch(step)[:2]
            loss, _ = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def test_a_checkpoint_of_an_fp8_run_trains_on_in_bf16(two_ranks: RankPool, tmp_path: Path) -> None:
    from ranks import train_on_this_rank

    assert two_ranks.run(train_on_this_rank, TINY, tmp_path / "run", ["bf16.enabled=true", *SETTINGS]) == [0, 0]
    checkpoints = tmp_path / "run" / "checkpoints"
    plain = two_ranks.run(load_and_continue, checkpoints, False)
    converted = two_ranks.run(load_and_continue, checkpoints, True)
    assert plain[0] == pytest.approx(converted[0], rel=5e-3)
    assert plain != converted


def forget_to_refresh(run_dir: Path, *settings: str) -> int:
    """A run whose weights are written by every step and cast only once, when the run begins."""
    import train as program
    from ranks import train_on_this_rank

    calls = 0

    def once(model: torch.nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            refresh_fp8(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "refresh_fp8", once)
        return train_on_this_rank(TINY, run_dir, [*SETTINGS, "run.train.num_steps=4", *settings])


@pytest.mark.parametrize(("settings", "step"), [((), 4), (("run.train.eval_every=2",), 2)])
def test_a_run_that_forgets_to_cast_its_weights_again_fails_when_it_validates_or_saves(
    two_ranks: RankPool, tmp_path: Path, settings: tuple[str, ...], step: int
) -> None:
    assert two_ranks.run(forget_to_refresh, tmp_path / "run", *settings) == [4, 4]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("failed", step)
    assert "the FP8 copies of blocks.0.mlp.deepspeed_moe.experts.w1" in summary["reason"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000000", "a save was not refused"
