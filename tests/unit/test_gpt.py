"""The transformer: parameters counted, first values, dense against MoE, and the options of run.model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.moe.utils import is_moe_param

from launch.run_config import REPO_ROOT, load_run
from model import gpt
from model.config import ModelConfig, MoEConfig
from model.flops import count_parameters
from model.gpt import GPT, named_matrices
from model.moe import MoELayer

B, S, V = 2, 16, 64


def config(**changes: object) -> ModelConfig:
    moe = MoEConfig(num_experts=4, ffn_hidden_size=24)
    return ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_len": S,
            "vocab_size": V,
            "moe": moe,
            **changes,
        }
    )


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(model: GPT) -> GPT:
    """Random values everywhere, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def loss_of(model: GPT, seed: int = 0) -> torch.Tensor:
    return model(tokens(seed)[:, :-1], tokens(seed)[:, 1:])[0]


OPTIONS = [
    {},
    {"activation": "swiglu"},
    {"norm_affine": True},
    {"norm_affine": True, "embedding_norm": False, "qk_norm": False},
    {"value_embeddings": True, "num_layers": 3, "moe": None, "ffn_hidden_size": 48},
    {"num_kv_heads": 2, "value_embeddings": True},
    {"num_kv_heads": 1, "norm_affine": True},
    {"tie_embeddings": True},
    {"logit_softcap": 15.0},
    {"moe": MoEConfig(num_experts=4, top_k=1, ffn_hidden_size=24, num_shared_experts=2, z_loss_coeff=0.1)},
    {"moe": MoEConfig(num_experts=4, ffn_hidden_size=24, num_shared_experts=1, score_func="sigmoid", balance="bias")},
    {"moe": MoEConfig(num_experts=6, top_k=3, layer_freq=2, ffn_hidden_size=8), "ffn_hidden_size": 40, "num_layers": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_counts_are_those_of_the_built_model(options: dict[str, object]) -> None:
    model = GPT(config(**options))
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if is_moe_param(p))
    assert count_parameters(model.config).expert == experts


RUN_FILES = sorted(path for path in (REPO_ROOT / "ds_configs").rglob("*.json") if "suites" not in path.parts)


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda path: path.stem)
def test_counts_of_every_run_file_are_those_of_its_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "initialize_weights", lambda *_: None)  # on the meta device there is nothing to fill
    with torch.device("meta"):
        model = GPT(load_run(file).model)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_gets_a_gradient(options: dict[str, object]) -> None:
    model = randomize(GPT(config(**options)))
    loss_of(model).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


PRESETS = sorted((REPO_ROOT / "ds_configs" / "routing").glob("*.json"))
NARROW = ("hidden_size=32", "num_attention_heads=2", "seq_len=32", "vocab_size=512", "moe.ffn_hidden_size=16")


@pytest.mark.parametrize("file", PRESETS, ids=lambda path: path.stem)
def test_a_routing_preset_trains_every_parameter_and_every_expert_that_a_token_chose(file: Path) -> None:
    """With all of its experts, in a narrow model of two layers."""
    sizes = [f"run.model.{size}" for size in ("num_layers=2", *NARROW)]
    model = randomize(GPT(load_run(file, sizes).model))
    batch = torch.randint(0, 512, (16, 33), generator=torch.Generator().manual_seed(2))
    loss, stats = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0] == []
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
    for layer, tokens_E in zip(layers, stats.tokens_per_expert_ME, strict=True):
        assert torch.equal(layer.deepspeed_moe.experts.w2.grad.abs().amax((1, 2)) > 0, tokens_E > 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_output_depends_on_a_later_token(options: dict[str, object]) -> None:
    model = randomize(GPT(config(**options))).eval()
    first, second = tokens()[:1, :S], tokens()[:1, :S].clone()
    second[0, S // 2 :] = (second[0, S // 2 :] + 1) % V
    torch.testing.assert_close(model.logits(first)[:, : S // 2], model.logits(second)[:, : S // 2])


def test_fixed_capacity_is_causal_too() -> None:
    """Dropping is in token order: what a later token asks for never takes an earlier token's slot."""
    model = randomize(
        GPT(config(moe=MoEConfig(num_experts=4, ffn_hidden_size=24, capacity_factor=0.5, min_capacity=1)))
    )
    first, second = tokens()[:1, :S], tokens()[:1, :S].clone()
    second[0, S // 2 :] = (second[0, S // 2 :] + 1) % V
    assert model.training
    # the capacity is the same, since the number of tokens is
    torch.testing.assert_close(model.logits(first)[:, : S // 2], model.logits(second)[:, : S // 2])


@pytest.mark.parametrize("tie", [False, True])
def test_a_fresh_model_predicts_uniformly(tie: bool) -> None:
    model = GPT(config(tie_embeddings=tie, vocab_size=2048))
    _, stats = model(tokens()[:, :-1], tokens()[:, 1:])
    assert stats.cross_entropy.item() == pytest.approx(math.log(2048), rel=0.02)
    assert stats.aux_loss_M.tolist() == pytest.approx([1.0, 1.0])
    assert stats.tokens_per_expert_ME.unique().tolist() == [B * S * 2 // 4]


def test_without_moe_the_model_is_the_dense_one() -> None:
    """One expert that takes every token is the dense MLP of its width, once the weights are the same."""
    dense = randomize(GPT(config(moe=None, ffn_hidden_size=24)))
    sparse = GPT(config(moe=MoEConfig(num_experts=1, top_k=1, ffn_hidden_size=24, capacity_factor=0.0, balance="none")))
    state = dense.state_dict()
    renamed = {
        key.replace(".mlp.w", ".mlp.deepspeed_moe.experts.deepspeed_experts.0.w") if ".mlp.w" in key else key: value
        for key, value in state.items()
    }
    missing = sparse.load_state_dict(renamed, strict=False)
    assert missing.unexpected_keys == []
    assert all("gate.wg" in key for key in missing.missing_keys)
    loss, stats = dense(tokens()[:, :-1], tokens()[:, 1:])
    torch.testing.assert_close(loss_of(sparse), loss)
    assert loss.item() == stats.cross_entropy.item()
    assert stats.aux_loss_M.shape == (0,)


def test_experts_start_by_their_global_number_whatever_the_ep_size() -> None:
    whole = dict(named_matrices(GPT(config(), seed=7)))
    name = "blocks.0.mlp.deepspeed_moe.experts.deepspeed_experts.{}.w1.weight"
    for ep_rank in (0, 1):
        half = dict(named_matrices(GPT(config(), ep_size=2, ep_rank=ep_rank, seed=7)))
        for local in (0, 1):
            assert torch.equal(half[name.format(local)], whole[name.format(2 * ep_rank + local)])
        assert torch.equal(half["lm_head.weight"], whole["lm_head.weight"])
    assert not torch.equal(whole[name.format(0)], whole[name.format(1)]), "no two experts start equal"


def test_the_first_values_never_change_silently() -> None:
    """A golden value for each kind: weights are a function of (seed, name, shape)."""
    golden = json.loads((Path(__file__).parent / "golden_weights.json").read_text())
    model = GPT(config(value_embeddings=True), seed=0)
    assert {name: p.flatten()[0].item() for name, p in named_matrices(model) if p.any()} == pytest.approx(golden)


def test_the_aux_loss_enters_the_loss_by_its_coefficient() -> None:
    def loss(coeff: float) -> tuple[float, float, float]:
        moe = MoEConfig(num_experts=4, ffn_hidden_size=24, aux_loss_coeff=coeff)
        total, stats = randomize(GPT(config(moe=moe)))(tokens()[:, :-1], tokens()[:, 1:])
        return total.item(), stats.cross_entropy.item(), stats.aux_loss_M.sum().item()

    for coeff in (0.0, 0.02, 1.0):
        total, cross_entropy, aux = loss(coeff)
        assert total == pytest.approx(cross_entropy + coeff * aux, rel=1e-5)


def test_ignored_targets_count_nowhere() -> None:
    model = randomize(GPT(config()))
    x, y = tokens()[:, :-1], tokens()[:, 1:].clone()
    y[0, 5:] = -1
    _, stats = model(x, y)
    assert int(stats.num_targets) == S + 5
    log_probs = model.logits(x).log_softmax(-1)
    expected = -sum(log_probs[b, s, y[b, s]] for b in range(B) for s in range(S) if y[b, s] != -1) / (S + 5)
    torch.testing.assert_close(stats.cross_entropy, expected.detach())


def test_softcap_bounds_the_logits() -> None:
    model = randomize(GPT(config(logit_softcap=3.0)))
    assert model.logits(tokens()[:, :-1]).abs().max() <= 3.0


def test_generate_is_reproducible_and_slides_beyond_seq_len() -> None:
    model = randomize(GPT(config())).eval()
    first = model.generate([1, 2, 3], S + 4, seed=5)
    assert first == model.generate([1, 2, 3], S + 4, seed=5)
    assert len(first) == S + 4
    assert all(0 <= token < V for token in first)
