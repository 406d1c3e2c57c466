"""Compiled blocks: the graphs that are expected and no more, the eager model's numbers, and no wait for the host."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_expert_parallelism import batch, tiny_model, wake_up
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.run_config import REPO_ROOT, load_run
from model.compiling import CompileWatch, compile_blocks
from model.config import ActivationCheckpointing, CompileMode, MoEConfig
from model.gpt import GPT, collect_stats
from model.moe import MoELayer
from model.router import update_selection_bias
from model.stats import StepStats
from ranks import RankPool, train_on_this_rank

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"

# moe_tiny has two kinds of block, without and with a value embedding. A forward graph is made when a block first runs,
# its backward graph when it first runs backwards, so the last block's comes first.
TRAINING = ["forward 0/0", "forward 0/1", "backward 0/1", "backward 0/0"]
VALIDATION = ["forward 0/2", "forward 0/3"]  # without gradients


def trace_only(backend: str = "aot_eager") -> pytest.MonkeyPatch:
    """Let torch.compile run the traced operators as they are: graphs, breaks and guards are the same, and inductor's
    seconds of code generation for every graph are saved. Undo it after use."""
    patch, compile_module = pytest.MonkeyPatch(), torch.nn.Module.compile

    def compiled(self: torch.nn.Module, *, dynamic: bool, options: Any) -> None:
        compile_module(self, dynamic=dynamic, backend=backend)

    patch.setattr(torch.nn.Module, "compile", compiled)
    return patch


@pytest.fixture
def traced() -> Iterator[None]:
    patch = trace_only()
    yield
    patch.undo()


def build(mode: CompileMode, how: ActivationCheckpointing = "none", *settings: str) -> GPT:
    model = GPT(load_run(TINY, list(settings)).model, seed=3, activation_checkpointing=how)
    wake_up(model, 0, 4)
    compile_blocks(model.blocks, mode)
    return model


def one_pass(model: GPT, tokens: torch.Tensor, *earlier: torch.Tensor) -> float:
    """Loss of a training pass, or with a model in evaluation mode of a validation pass. A selection bias then moves."""
    with torch.set_grad_enabled(model.training):
        loss, stats = model(tokens[:, :-1], tokens[:, 1:], *earlier)
    if model.training:
        loss.backward()
        update_selection_bias(model, stats.tokens_per_expert_ME.double())
    return loss.item()


def test_static_blocks_make_one_graph_of_a_kind_and_are_never_compiled_again(watch: CompileWatch) -> None:
    check_graphs(watch)


def test_so_do_static_dropless_blocks_on_one_rank(watch: CompileWatch, traced: None) -> None:
    check_graphs(watch, "run.model.moe.capacity_factor=0.0")


BIASED = {
    "score_func": "sigmoid",
    "num_groups": 4,
    "top_k_groups": 2,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "balance": "bias",
    "bias_update_rate": 0.05,
    "aux_loss_scope": "sequence",
    "aux_loss_coeff": 0.1,
}
RULES = {
    "drops by gates": {"top_k": 1, "capacity_factor": 0.5, "drop_policy": "probability"},
    "raw gates and a z-loss": {"norm_topk_prob": False, "z_loss_coeff": 0.1, "aux_loss_coeff": 0.0},
    "load over the global batch": {"aux_loss_scope": "global_batch", "aux_loss_coeff": 0.5, "capacity_factor": 0.0},
}


@pytest.mark.parametrize("rule", RULES)
def test_so_do_blocks_of_every_routing_rule(watch: CompileWatch, traced: None, rule: str) -> None:
    check_rule(watch, RULES[rule])


def test_so_do_blocks_with_a_selection_bias_which_is_read_anew_in_every_step(watch: CompileWatch) -> None:
    check_rule(watch, BIASED)


def check_rule(watch: CompileWatch, rule: dict[str, Any]) -> None:
    settings = [f"run.model.moe.{key}={json.dumps(value)}" for key, value in rule.items()]
    check_graphs(watch, *settings, earlier=(torch.tensor([[90.0, 10.0, 20.0, 8.0], [0.0, 64.0, 60.0, 4.0]]),))


def check_graphs(watch: CompileWatch, *settings: str, earlier: tuple[torch.Tensor, ...] = ()) -> None:
    torch._dynamo.utils.counters.clear()
    model, plain = build("static", "none", *settings), build("none", "none", *settings)
    for step in range(3):
        expected = one_pass(plain, batch(step), *earlier)
        assert one_pass(model, batch(step), *earlier) == pytest.approx(expected, rel=1e-6)
        assert watch.look("training step") == []
    assert watch.graphs == TRAINING
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(plain.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)
    for step in range(2):
        assert one_pass(model.eval(), batch(step)) == pytest.approx(one_pass(plain.eval(), batch(step)), rel=1e-6)
        assert watch.look("validation") == []
    assert watch.graphs == TRAINING + VALIDATION
    one_pass(model.train(), batch(3), *earlier)
    assert watch.look("training step") == []
    assert not torch._dynamo.utils.counters["graph_break"]
    assert watch.seconds > 0
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("how", ["none", "block", "selective"])
@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
def test_a_list_of_experts_that_get_any_number_of_rows_is_not_compiled_and_nothing_is_compiled_again(
    watch: CompileWatch, traced: None, capacity_factor: float, how: ActivationCheckpointing
) -> None:
    """With a capacity in validation alone."""
    settings = ("run.model.moe.expert_backend=loop", f"run.model.moe.capacity_factor={capacity_factor}")
    model, plain = build("static", how, *settings), build("none", "none", *settings)
    for training in (True, False, True):
        for step in range(3):
            found, expected = (one_pass(each.train(training), batch(step)) for each in (model, plain))
            assert found == pytest.approx(expected, rel=1e-6)
            assert watch.look("training step" if training else "validation") == []
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(plain.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("mode", "again"), [("static", 4), ("dynamic", 0)])
def test_a_shape_that_changes_is_compiled_again_when_static_and_not_when_dynamic(
    watch: CompileWatch, traced: None, mode: CompileMode, again: int
) -> None:
    sizes = [(7, 24), (6, 20), (5, 17)]  # not 8: torch takes a size that equals another for a constant
    model, plain = build(mode), build("none")
    for rows, length in sizes:
        tokens = batch(0)[:rows, :length]
        assert one_pass(model, tokens) == pytest.approx(one_pass(plain, tokens), rel=1e-6)
        assert len(watch.look("training step")) == (0 if (rows, length) == sizes[0] else again)
    assert watch.recompiles == again * 2


def test_what_is_recomputed_is_not_kept_when_compiled_either(watch: CompileWatch) -> None:
    def bytes_kept(how: ActivationCheckpointing) -> tuple[int, list[torch.Tensor]]:
        model, kept = build("static", how), {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            loss, _ = model(batch(0)[:, :-1], batch(0)[:, 1:])
        loss.backward()
        return sum(kept.values()), [parameter.grad for parameter in model.parameters()]

    patch = trace_only("aot_eager_decomp_partition")  # the part of inductor that decides what is kept
    (everything, expected), *others = (bytes_kept(how) for how in ("none", "selective", "block"))
    patch.undo()
    for ours, gradients in others:
        assert ours < 0.9 * everything
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other)
    assert watch.graphs[:4] == TRAINING
    assert len(watch.graphs) == 12, "one graph forwards and one backwards for each kind of block"


# --- several ranks ----------------------------------------------------------------------------------------------------


def train_run(run_dir: Path, assignments: list[str], only_traced: bool) -> int:
    torch._dynamo.reset()
    patch = trace_only() if only_traced else pytest.MonkeyPatch()
    code = train_on_this_rank(TINY, run_dir, assignments)
    patch.undo()
    return code


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_run_of_two_ranks_compiles_once_and_says_how_long(two_ranks: RankPool, tmp_path: Path, ep_size: int) -> None:
    """Three validations, two of them between steps, and a sample; dropless validation at ep_size 2 exchanges counts."""
    settings = [f"run.launch.ep_size={ep_size}", "run.train.num_steps=4", "run.train.eval_every=2"]
    assert two_ranks.run(train_run, tmp_path / "static", [*settings, 'run.compile.mode="static"'], ep_size == 1) == [
        0,
        0,
    ]
    assert two_ranks.run(train_run, tmp_path / "none", settings, False) == [0, 0]
    static, none = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("static", "none"))
    assert static["recompiles"] == 0
    # At ep_size 2 a block's validation is cut where its ranks exchange counts, in each function on the way there.
    assert static["compiled_graphs"] == {1: len(TRAINING + VALIDATION), 2: len(TRAINING) + 7}[ep_size]
    assert static["time/compile_s"] > 0
    assert "time/compile_s" not in none
    assert (none["compiled_graphs"], none["recompiles"]) == (0, 0)
    assert static["val/loss"] == pytest.approx(none["val/loss"], rel=1e-5)


def test_the_summary_counts_the_seconds_of_all_graphs_that_it_counts() -> None:
    """A resumed run validates for the first time after its last step is logged, and compiles for that."""
    from train import Trainer

    def trainer(graphs: list[str]) -> Any:
        compiles = SimpleNamespace(seconds=7.0, graphs=graphs, recompiles=0)
        attempt = MagicMock(latest={"time/compile_s": 5.0} if graphs else {}, compiles=compiles)
        attempt.gpu_monitor.figures.return_value = {}
        return attempt

    figures = Trainer.figures(trainer(TRAINING + VALIDATION), timed=False)
    assert (figures["time/compile_s"], figures["compiled_graphs"]) == (7.0, 6)
    assert Trainer.figures(trainer([]), timed=False)["time/compile_s"] is None  # left out


def test_with_muon_whose_update_deepspeed_compiles_nothing_is_compiled_after_the_first_step_either(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    muon = '{"type": "Muon", "params": {"lr": null, "muon_lr": 0.02, "adam_lr": 0.004}}'
    settings = [f"optimizer={muon}", "gradient_clipping=0", "run.compile.mode=static", "run.launch.ep_size=2"]
    lengths = ["run.train.num_steps=4", "run.train.eval_every=2"]
    assert two_ranks.run(train_run, tmp_path / "run", [*settings, *lengths], True) == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recompiles"] == 0
    assert summary["compiled_graphs"] > len(TRAINING) + 7, "Muon's update is among them"


def losses_and_gradients(moe: dict[str, Any], ep_size: int, mode: CompileMode) -> dict[str, Any]:
    import torch.distributed as dist

    torch._dynamo.reset()
    rank = dist.get_rank()
    model = GPT(tiny_model(**moe), ep_size, rank % ep_size, seed=3)
    wake_up(model, rank % ep_size, 4 // ep_size)
    for block in model.blocks:
        block.mlp.set_deepspeed_parallelism()  # else the engine's to do
    patch = trace_only()
    compile_blocks(model.blocks, mode)
    losses = [one_pass(model, batch(step)[4 * rank : 4 * rank + 4]) for step in range(3)]
    patch.undo()
    return {"losses": losses, "gradients": {name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(("ep_size", "capacity_factor", "mode"), [(2, 1.0, "static"), (2, 0.0, "dynamic")])
def test_expert_parallel_ranks_compute_compiled_what_they_compute_eagerly(
    two_ranks: RankPool, ep_size: int, capacity_factor: float, mode: CompileMode
) -> None:
    moe = {"capacity_factor": capacity_factor}
    eager = two_ranks.run(losses_and_gradients, moe, ep_size, "none")
    compiled = two_ranks.run(losses_and_gradients, moe, ep_size, mode)
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-4, atol=1e-5)


@contextmanager
def set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


# --- the host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_one_rank_never_waits_for_a_number_that_was_computed(capacity_factor: float, training: bool) -> None:
    """Fake tensors have shapes and no numbers: whoever asks for one, as .item() and nonzero() do, raises."""
    check_that_the_host_never_waits({"capacity_factor": capacity_factor}, training)


@pytest.mark.parametrize("rule", [BIASED, *RULES.values()], ids=["bias", *RULES])
def test_nor_does_it_for_any_routing_rule_or_for_what_is_recorded_of_it(rule: dict[str, Any]) -> None:
    check_that_the_host_never_waits(rule, training=True)


def check_that_the_host_never_waits(moe: dict[str, Any], training: bool) -> None:
    config = MoEConfig.model_validate({"num_experts": 4, "ffn_hidden_size": 16, **moe})
    with FakeTensorMode(), set_default_dtype(torch.bfloat16):
        layer = MoELayer(8, config, "swiglu").train(training)
        x = torch.empty(2, 32, 8, dtype=torch.bfloat16, requires_grad=True)
        totals = StepStats(1, 4, "cpu")
        y, stats = layer(x, totals.tokens_per_expert_ME[0])
        (y.sum() + stats.aux_loss + stats.z_loss).backward()
        totals.add(collect_stats(y.sum(), torch.tensor(64), [stats]))
        update_selection_bias(layer, totals.tokens_per_expert_ME)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            stats.dropped.item()
    assert x.grad is not None


def count_questions_of_the_host(capacity_factor: float, ep_size: int) -> int:
    """How often a forward and backward pass of one layer asks a tensor for its numbers."""
    import torch.distributed as dist

    config = MoEConfig(num_experts=4, ffn_hidden_size=16, capacity_factor=capacity_factor)
    layer = MoELayer(8, config, "relu2", ep_size)
    layer.set_deepspeed_parallelism()
    torch.nn.init.normal_(layer.deepspeed_moe.gate.wg.weight)
    for parameter in layer.deepspeed_moe.experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    asked: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"):
            method = getattr(torch.Tensor, name)

            def counted(self: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                asked[name] += 1
                return method(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        y, stats = layer(x)
        (y.sum() + stats.aux_loss).backward()
    return asked.total()


@pytest.mark.parametrize(("capacity_factor", "ep_size", "times"), [(1.0, 1, 0), (0.0, 1, 0), (1.0, 2, 0), (0.0, 2, 1)])
def test_ranks_wait_for_the_host_once_a_layer_when_dropless_and_never_otherwise(
    two_ranks: RankPool, capacity_factor: float, ep_size: int, times: int
) -> None:
    assert two_ranks.run(count_questions_of_the_host, capacity_factor, ep_size) == [times, times]
