"""Activation checkpointing changes what is kept and what runs twice, and not one bit of the result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.run_config import REPO_ROOT, load_run
from model.config import ActivationCheckpointing
from model.gpt import GPT, Stats

WAYS: list[ActivationCheckpointing] = ["none", "selective", "block"]
MOE = ["run.model.moe.capacity_factor=0.5", "run.model.moe.aux_loss_coeff=0.5"]
DROPLESS = ["run.model.moe.capacity_factor=0.0", "run.model.activation=swiglu"]
RULES = [
    *("run.model.moe.score_func=sigmoid", "run.model.moe.balance=bias", "run.model.moe.num_shared_experts=1"),
    *("run.model.moe.num_groups=2", "run.model.moe.top_k_groups=1", "run.model.moe.z_loss_coeff=0.1"),
    *("run.model.moe.aux_loss_coeff=0.5", "run.model.moe.aux_loss_scope=global_batch"),
    *("run.model.moe.capacity_factor=0.5", "run.model.moe.drop_policy=probability"),
]
DENSE = ["run.model.moe=null", "run.model.ffn_hidden_size=64", "run.model.num_kv_heads=1"]
EXPENSIVE = ("aten.mm.default", "aten.bmm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Counts the operators that run inside it, and knows which of the memory that they made is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        results = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}  # a view of a weight makes nothing
        for storage in storages(results):
            if storage._cdata not in given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def bytes_in_use(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def build(settings: list[str], how: ActivationCheckpointing) -> GPT:
    """A tiny model whose gates and output projections, fresh zeros, are awake."""
    model = GPT(load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", settings).model, 1, 0, 3, how)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    return model


def one_pass(model: GPT) -> tuple[torch.Tensor, Stats]:
    tokens = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(1))
    earlier_ME = torch.tensor([[40.0, 10.0, 10.0, 4.0], [0.0, 0.0, 60.0, 4.0]])  # which one rule alone looks at
    return model(tokens[:, :-1], tokens[:, 1:], earlier_ME)


@pytest.mark.parametrize("settings", [MOE, DROPLESS, RULES, DENSE], ids=["capacity", "dropless", "rules", "dense"])
@pytest.mark.parametrize("how", ["selective", "block"])
def test_loss_statistics_and_gradients_are_the_same_bits(how: ActivationCheckpointing, settings: list[str]) -> None:
    """The auxiliary loss has a weight here: counted twice, it would change the loss, the router's gradient, or both."""
    plain, ours = build(settings, "none"), build(settings, how)
    (expected_loss, expected_stats), (loss, stats) = one_pass(plain), one_pass(ours)
    expected_loss.backward()
    loss.backward()
    assert torch.equal(loss, expected_loss)
    for name, value, expected in zip(Stats._fields, stats, expected_stats, strict=True):
        assert torch.equal(value, expected), name
    for (name, parameter), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected.grad), name


@pytest.mark.parametrize("settings", [MOE, DROPLESS, DENSE], ids=["capacity", "dropless", "dense"])
def test_less_memory_is_in_use_between_forward_and_backward(settings: list[str]) -> None:
    kept = {}
    for how in WAYS:
        model = build(settings, how)
        with Watch() as watch:
            outputs = one_pass(model)
        kept[how] = watch.bytes_in_use()
        del outputs
    assert kept["block"] < 0.9 * kept["selective"]
    assert kept["selective"] < 0.9 * kept["none"]


def backward_counts(settings: list[str], how: ActivationCheckpointing) -> Counter[str]:
    loss, _ = one_pass(build(settings, how))
    with Watch() as watch:
        loss.backward()
    return watch.counts


@pytest.mark.parametrize("settings", [MOE, DROPLESS, RULES], ids=["capacity", "dropless", "rules"])
def test_selective_neither_routes_nor_computes_experts_again(settings: list[str]) -> None:
    """Were tokens routed again and one of them elsewhere, the kept results would lie in another order."""
    counts = {how: backward_counts(settings, how) for how in WAYS}
    kept = ("aten.topk.default", "aten.sort.stable", "moelab.sum_over_ranks.default")
    for name in (*kept, "moelab.grouped_linear.default", "aten.bmm.default"):
        assert counts["selective"][name] == counts["none"][name], name
    assert counts["block"]["aten.sort.stable"] == 2, "once in each of two blocks"
    topk = 3 if settings is RULES else 1  # with groups also of the best in each, and of the best groups
    assert counts["block"]["aten.topk.default"] == 2 * topk


@pytest.mark.parametrize("settings", [MOE, DENSE], ids=["moe", "dense"])
def test_selective_repeats_norms_but_no_matrix_product_and_no_attention(settings: list[str]) -> None:
    counts = {how: backward_counts(settings, how) for how in WAYS}
    for name in EXPENSIVE:
        assert counts["selective"][name] == counts["none"][name], name
    assert counts["block"]["aten.mm.default"] > counts["none"]["aten.mm.default"]
    assert counts["none"][EXPENSIVE[-1]] == 0
    assert counts["block"][EXPENSIVE[-1]] == 2, "once in each of two blocks"
    assert counts["none"]["aten.rsqrt.default"] == 0
    assert counts["selective"]["aten.rsqrt.default"] > 0, "norms are cheap: they run again"


@pytest.mark.parametrize("how", ["selective", "block"])
def test_without_gradients_nothing_is_kept_and_values_are_the_same(how: ActivationCheckpointing) -> None:
    expected = build(DROPLESS, "none").eval()
    model = build(DROPLESS, how).eval()
    with torch.no_grad(), Watch() as watch:
        loss, stats = one_pass(model)
    assert torch.equal(loss, one_pass(expected)[0])
    assert watch.bytes_in_use() <= sum(part.untyped_storage().nbytes() for part in (loss, *stats))
