"""Which parameter gets which optimizer, learning rate and decay; and Muon against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.run_config import REPO_ROOT, load_run
from model.gpt import GPT
from model.optim import assign, assignment_table, build_optimizer, set_lr
from reference import muon_step

ADAMW: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}
MUON: dict[str, Any] = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-3, "weight_decay": 0.1}}


def tiny(*assignments: str) -> GPT:
    return GPT(load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", ["run.model.norm_affine=true", *assignments]).model)


def groups_by_name(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The group of every parameter; fails if one is in no group or in two."""
    group_of: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    found = {name: group_of.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not group_of
    return found


@pytest.mark.parametrize(("section", "router_optimizer"), [(ADAMW, None), (MUON, "muon"), (MUON, "adamw")])
def test_every_parameter_is_in_exactly_one_group_with_the_right_decay(
    section: dict[str, Any], router_optimizer: str | None
) -> None:
    model = tiny()
    for name, group in groups_by_name(model, build_optimizer(model, section, router_optimizer)).items():
        plain = "embedding" in name or "norm" in name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
        assert bool(group.get("moe")) == (".experts." in name), name


@pytest.mark.parametrize("router_optimizer", ["muon", "adamw"])
def test_muon_gets_the_matrices_and_adamw_the_rest(router_optimizer: str) -> None:
    model = tiny("run.model.ffn_hidden_size=32", "run.model.moe.layer_freq=2")
    optimizer = build_optimizer(model, MUON, router_optimizer)
    by_muon = set()
    for name, group in groups_by_name(model, optimizer).items():
        parameter = dict(model.named_parameters())[name]
        assert parameter.use_muon == group["use_muon"], (
            "ZeRO reads the flag of the parameter, the step that of the group"
        )
        assert group["lr"] == (0.02 if group["use_muon"] else 1e-3)
        if group["use_muon"]:
            by_muon.add(name.removesuffix(".weight").split(".")[-1])
    matrices = {"q_proj", "k_proj", "v_proj", "o_proj", "value_gate", "w1", "w2"}
    assert by_muon == (matrices | {"wg"} if router_optimizer == "muon" else matrices)


def test_a_tied_head_is_an_embedding() -> None:
    model = tiny("run.model.tie_embeddings=true")
    rows = {row.name: row for row in assign(model, MUON, "muon")}
    assert "lm_head.weight" not in rows
    assert (rows["token_embedding.weight"].optimizer, rows["token_embedding.weight"].weight_decay) == ("adamw", 0.0)


def test_one_lr_in_the_file_is_that_of_both() -> None:
    section = {"type": "Muon", "params": {"lr": 0.01, "adam_lr": 0.002}}
    assert {row.optimizer: row.lr for row in assign(tiny(), section, "muon")} == {"muon": 0.01, "adamw": 0.002}


def test_the_schedule_scales_every_groups_own_peak() -> None:
    optimizer = build_optimizer(tiny(), MUON, "muon")
    for factor in (0.5, 0.25):  # of the peak, not of the factor before
        set_lr(optimizer, factor)
        assert {group["use_muon"]: group["lr"] for group in optimizer.param_groups} == {
            True: 0.02 * factor,
            False: 1e-3 * factor,
        }


def test_the_table_counts_experts_over_all_ranks_and_agrees_with_the_groups() -> None:
    model = tiny()
    lines = assignment_table(assign(model, MUON, "adamw"), ep_size=2).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    expected = ["16", "32", "x", "32", "muon", "0.02", "0.1"]
    assert rows["blocks.*.mlp.deepspeed_moe.experts.w1"] == expected, "2 blocks of 4 experts here, on 2 ranks"
    assert rows["blocks.*.mlp.deepspeed_moe.gate.wg.weight"] == ["2", "4", "x", "32", "adamw", "0.001", "0.1"]
    assert rows["blocks.*.attention_norm.weight"] == ["2", "32", "adamw", "0.001", "0"]
    others = sum(int(row[0]) for name, row in rows.items() if ".experts." not in name)
    assert others == sum(".experts." not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
@pytest.mark.parametrize("method", ["gram", "standard"])
def test_muons_update_of_one_matrix_is_its_formula(
    shape: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.muon import original_muon

    # Half precision is DeepSpeed's choice for speed; in fp32 what is left to differ is the order of sums.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: False)
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda _: False)
    generator = torch.Generator().manual_seed(1)
    weight, momentum = torch.randn(shape, generator=generator), torch.zeros(shape)
    theirs, ours = momentum.clone(), momentum
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            grad = torch.randn(shape, generator=generator)
            expected, ours = muon_step(weight, grad, ours, lr=1.0, weight_decay=0.0, beta=0.9)
            update = original_muon.muon_update(grad.clone(), theirs, beta=0.9, ns_method=method)
            torch.testing.assert_close(update, weight - expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
