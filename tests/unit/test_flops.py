"""Parameter counts, FLOPs per token and MFU, from configurations alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.run_config import REPO_ROOT, load_run
from model.config import ModelConfig
from model.flops import count_parameters, flops_per_token, mfu_percent, mlp_parameters, peak_flops

MOE_D12 = load_run(REPO_ROOT / "ds_configs" / "moe_d12.json").model
DENSE_D12 = load_run(REPO_ROOT / "ds_configs" / "dense_d12.json").model


def test_moe_d12_has_the_parameters_of_the_experiment_it_continues() -> None:
    counts = count_parameters(MOE_D12)
    assert counts.total == 456_206_592
    assert counts.inactive == 169_869_312
    assert counts.active_matmul == 110_176_512
    assert counts.active == counts.total - counts.inactive
    assert counts.expert == 12 * 8 * 2 * 768 * 1536


def test_flops_per_token_are_6_a_matmul_parameter_and_attention() -> None:
    attention = 12 * 768 * (12 * 1024)
    assert flops_per_token(MOE_D12) == 6 * 110_176_512 + attention == 774_305_280


def test_a_dense_model_has_nothing_inactive_and_differs_from_its_moe_by_the_gates() -> None:
    """dense_d12 is as wide as the two experts that a token of moe_d12 meets."""
    dense, moe = count_parameters(DENSE_D12), count_parameters(MOE_D12)
    assert (dense.inactive, dense.expert, dense.active) == (0, 0, dense.total)
    assert moe.active_matmul - dense.active_matmul == 12 * 768 * 8


def test_shared_experts_are_active_for_every_token() -> None:
    moe = MOE_D12.moe
    assert moe is not None
    model = MOE_D12.model_copy(update={"moe": moe.model_copy(update={"num_shared_experts": 2})})
    plain, shared = count_parameters(MOE_D12), count_parameters(model)
    more = 12 * 2 * (2 * 768 * 1536)
    assert (
        shared.total - plain.total == shared.active - plain.active == shared.active_matmul - plain.active_matmul == more
    )
    assert (shared.inactive, shared.expert) == (plain.inactive, plain.expert), "they are not routed to"
    assert flops_per_token(model) - flops_per_token(MOE_D12) == 6 * more


PRESETS = sorted((REPO_ROOT / "ds_configs" / "routing").glob("*.json"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda path: path.stem)
def test_a_preset_computes_as_much_per_token_as_the_file_that_it_patches(file: Path) -> None:
    """Else two presets could not be compared at equal FLOPs: within 2%, which gates and whole widths cost."""
    assert flops_per_token(load_run(file).model) == pytest.approx(flops_per_token(MOE_D12), rel=0.02)


@pytest.mark.parametrize(("activation", "matrices"), [("relu2", 2), ("swiglu", 3)])
def test_a_gated_mlp_has_a_third_matrix(activation: str, matrices: int) -> None:
    assert mlp_parameters(8, 32, activation) == matrices * 8 * 32


def tiny(**changes: object) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "seq_len": 16, "vocab_size": 10}
    return ModelConfig.model_validate({**sizes, "ffn_hidden_size": 32, **changes})


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"tie_embeddings": True}, -10 * 8),
        ({"num_kv_heads": 1}, -2 * 8 * (8 - 2)),
        ({"norm_affine": True}, 2 * 8 + 2 * 2 + 8 + 8),
        ({"norm_affine": True, "qk_norm": False, "embedding_norm": False}, 2 * 8 + 8),
        ({"value_embeddings": True}, 10 * 8 + 8 * 4),
        ({"ffn_hidden_size": 16}, -2 * 8 * 16),
    ],
    ids=str,
)
def test_each_setting_adds_the_parameters_it_should(changes: dict[str, object], more: int) -> None:
    assert count_parameters(tiny(**changes)).total - count_parameters(tiny()).total == more


def test_a_tied_head_still_multiplies() -> None:
    assert count_parameters(tiny(tie_embeddings=True)).active_matmul == count_parameters(tiny()).active_matmul


def test_only_every_layer_freq_th_block_has_experts() -> None:
    moe = {"num_experts": 4, "top_k": 1, "layer_freq": 2, "ffn_hidden_size": 16}
    model = tiny(num_layers=4, moe=moe)
    assert model.moe_layers == [1, 3]
    assert count_parameters(model).expert == 2 * 4 * 2 * 8 * 16
    assert count_parameters(model).inactive == 2 * 3 * 2 * 8 * 16


def test_mfu_is_the_share_of_the_peak_in_percent() -> None:
    assert mfu_percent(135_054, 774_305_280, 989e12) == pytest.approx(10.57, abs=0.005)
    assert mfu_percent(135_054, 774_305_280, None) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_the_peak_goes_by_the_devices_name_and_is_unknown_rather_than_guessed(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
