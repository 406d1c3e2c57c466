"""What run.fp8 converts, what it says about it, and that all else is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recompute import Watch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear

from launch.run_config import REPO_ROOT, load_run
from model.config import FP8Config
from model.experts import LoopedExperts
from model.fp8 import Conversion, FP8Head, FP8Linear, TorchaoExperts, apply_fp8, recipe_config
from model.fp8_experts import FP8Experts
from model.fp8_matmul import refuse_fp8
from model.fp8_weights import refresh_fp8, refuse_stale
from model.gpt import GPT
from model.loss import Head

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
ALL = {"dense": True, "lm_head": True}
DENSE = ("run.model.moe=null", "run.model.ffn_hidden_size=64")


def build(*settings: str, config: str = "moe_tiny") -> GPT:
    run = load_run(REPO_ROOT / "ds_configs" / f"{config}.json", list(settings))
    model = GPT(run.model, seed=3, cross_entropy=run.train.cross_entropy,
                activation_checkpointing=run.train.activation_checkpointing)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def convert(model: GPT, **fp8: Any) -> Conversion:
    conversion = apply_fp8(model, FP8Config(enabled=True, **fp8), emulate=True, compiled=False)
    refresh_fp8(model)
    return conversion


def tokens(seed: int = 0, sequences: int = 4) -> Tensor:
    return torch.randint(0, 512, (sequences, 33), generator=torch.Generator().manual_seed(seed))


def one_pass(model: GPT, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name."""
    model.zero_grad()
    loss, _ = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seed_model() -> GPT:
    """The model of ds_configs/moe_d12.json, without memory."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.gpt.initialize_weights", lambda *_: None)
        return GPT(load_run(REPO_ROOT / "ds_configs" / "moe_d12.json").model)


def test_without_experts_49_matrices_of_the_seeds_model_are_converted_and_210_are_not(seed_model: GPT) -> None:
    """12 x 4 attention projections and the head; not the 192 of experts, 12 gates and 6 value gates."""
    conversion = convert(seed_model, experts=False, dense=True, lm_head=True)
    assert (conversion.converted, conversion.skipped) == (49, 210)
    text = conversion.text()
    assert "  192 blocks.*.mlp.deepspeed_moe.experts [1536 x 768]  not FP8: run.fp8.experts is false" in text
    assert "   12 blocks.*.mlp.deepspeed_moe.gate.wg [8 x 768]  not FP8: the router is fp32" in text
    assert "    6 blocks.*.attention.value_gate [12 x 32]  not FP8: 12 outputs, not a multiple of 16" in text


@pytest.mark.parametrize("backend", ["bmm", "loop"])
def test_what_the_report_says_is_what_was_converted(backend: str) -> None:
    model = build(f"run.model.moe.expert_backend={backend}")
    conversion = convert(model, **ALL)
    modules = dict(model.named_modules())
    for each in conversion.matrices:
        module = modules[each.name]
        if isinstance(module, LoopedExperts):
            assert all(type(linear) is FP8Linear for mlp in module.deepspeed_experts for linear in (mlp.w1, mlp.w2))
            assert each.count == 2 * len(module.deepspeed_experts)
        else:
            assert isinstance(module, FP8Experts | FP8Linear | FP8Head) == (each.skipped is None), each.name
    named = {each.name for each in conversion.matrices}
    multiplied = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim >= 2}
    embeddings = {name for name in multiplied if "embedding" in name}
    inside = {name for name in multiplied if any(name.startswith(f"{parent}.") for parent in named)}
    assert multiplied - embeddings - inside - named == set(), "a matrix that the report does not mention"


def test_narrow_matrices_stay_in_bf16_if_the_file_says_so(seed_model: GPT) -> None:
    """768 x 1536 has N*K/(N+K) = 512, 768 x 768 has 384, the head 750."""
    fates = {}
    with torch.device("meta"):
        for limit in (0.0, 500.0, 600.0, 800.0):
            fates[limit] = plan(seed_model, limit)
    assert fates[0.0] == {"experts", "q_proj", "lm_head"}
    assert fates[500.0] == {"experts", "lm_head"}
    assert fates[600.0] == {"lm_head"}
    assert fates[800.0] == set()


def plan(model: GPT, limit: float) -> set[str]:
    from model.fp8 import plan_conversion

    config = FP8Config(enabled=True, dense=True, lm_head=True, min_reduced_width=limit)
    matrices = {each.name.rpartition(".")[2]: each.skipped for each in plan_conversion(model, config)}
    return {name for name in ("experts", "q_proj", "lm_head") if matrices[name] is None}


def test_names_and_values_of_a_state_dict_stay() -> None:
    plain, converted = build(), build()
    convert(converted, **ALL)
    assert list(plain.state_dict()) == list(converted.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, converted.state_dict()[name]), name
    converted.load_state_dict(plain.state_dict())
    plain.load_state_dict(converted.state_dict())


# --- the numbers ----------------------------------------------------------------------------------------------------

SETTINGS = [
    ({}, ()),
    (ALL, ()),
    (ALL, ("run.model.moe.capacity_factor=0", "run.model.activation=swiglu")),
    (ALL, ("run.train.cross_entropy=plain",)),
    ({**ALL, "recipe": "rowwise"}, ("run.train.cross_entropy=plain",)),
    ({**ALL, "recipe": "tensorwise"}, ("run.train.cross_entropy=plain", "run.model.moe.expert_backend=loop")),
    (ALL, ("run.model.moe.expert_backend=loop", "run.model.moe.capacity_factor=0")),
    (
        {"experts": False, **ALL},
        ("run.model.moe=null", "run.model.ffn_hidden_size=64", "run.model.tie_embeddings=true"),
    ),
]


@pytest.mark.parametrize(("fp8", "settings"), SETTINGS)
def test_training_is_close_to_high_precision_and_never_equal(fp8: dict[str, Any], settings: tuple[str, ...]) -> None:
    """Gradients of what is converted are off by e4m3's or e5m2's error, its own or that of what comes before and after;
    a factor that is lost or a wrong sign would be off by half or more. Product by product: tests below and others."""
    plain, converted = build(*settings), build(*settings)
    conversion = convert(converted, **fp8)
    loss, gradients = one_pass(plain, tokens())
    fp8_loss, fp8_gradients = one_pass(converted, tokens())
    assert fp8_loss == pytest.approx(loss, rel=1e-2)
    modules = {each.name for each in conversion.matrices if each.skipped is None}
    assert set(gradients) == set(fp8_gradients)
    for name, expected in gradients.items():
        error = float((fp8_gradients[name] - expected).norm() / expected.norm())
        assert error < 0.5, name
        if any(name.startswith(f"{module}.") for module in modules):
            assert error > 1e-3, f"{name} is as exact as without FP8"


@pytest.mark.parametrize(("fp8", "settings"), SETTINGS)
def test_evaluation_equals_the_model_without_fp8_bit_for_bit(fp8: dict[str, Any], settings: tuple[str, ...]) -> None:
    plain, converted = build(*settings).eval(), build(*settings)
    convert(converted, **fp8)
    converted.eval()
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(converted(batch[:, :-1], batch[:, 1:])[0], plain(batch[:, :-1], batch[:, 1:])[0])
        assert torch.equal(converted.logits(batch[:1, :7]), plain.logits(batch[:1, :7]))


@pytest.mark.parametrize("how", ["selective", "block"])
def test_activation_checkpointing_changes_nothing(how: str) -> None:
    results = []
    for setting in ("none", how):
        model = build(f"run.train.activation_checkpointing={setting}")
        convert(model, **ALL)
        results.append(one_pass(model, tokens()))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_selective_checkpointing_keeps_the_products_and_block_repeats_them() -> None:
    """Two forwards and two backwards in each of two layers."""

    def products(how: str) -> int:
        model = build(f"run.train.activation_checkpointing={how}")
        convert(model)
        with Watch() as watch:
            one_pass(model, tokens())
        return watch.counts["moelab.scaled_matmul.default"]

    assert [products(how) for how in ("none", "selective", "block")] == [8, 8, 12]


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "rowwise", "tensorwise"])
def test_an_expert_of_a_list_that_gets_no_token_does_not_stop_float8(recipe: str) -> None:
    """What ended FP8 experts in the experiment that this project continues: the maximum of an empty tensor."""
    model = build("run.model.moe.expert_backend=loop", "run.model.moe.capacity_factor=0", "run.model.moe.top_k=1")
    convert(model, recipe=recipe)
    experts = [module for module in model.modules() if isinstance(module, LoopedExperts)]
    rows = torch.randn(5, 32)
    ends = torch.tensor([0, 1, 5, 5], dtype=torch.int32)
    y = experts[0](rows, ends)
    assert y.shape == rows.shape
    y.sum().backward()
    assert all(not p.grad.any() for p in experts[0].deepspeed_experts[0].parameters())
    assert all(p.grad.isfinite().all() for p in experts[0].parameters())


def test_a_number_of_tokens_that_is_no_multiple_of_16_is_computed() -> None:
    plain = build("run.train.cross_entropy=plain")
    converted = build("run.train.cross_entropy=plain")
    convert(converted, experts=False, recipe="rowwise", **ALL)
    batch = tokens(sequences=1)[:, :6]
    assert one_pass(converted, batch)[0] == pytest.approx(one_pass(plain, batch)[0], rel=1e-2)


def test_both_products_of_a_head_in_chunks_are_in_fp8() -> None:
    """Of the rows' error and the weight's, 2.7% each (e4m3's, of Gaussian numbers), and neither less nor more."""
    head = Head(64, 96, None, "chunked")
    model = torch.nn.ModuleDict({"lm_head": head})
    convert(model, experts=False, lm_head=True)  # type: ignore[arg-type]
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    model["lm_head"].weight.data.copy_(weight)
    refresh_fp8(model)
    products = model["lm_head"].products()
    x, grad = (torch.randn(512, size, generator=torch.Generator().manual_seed(size)) for size in (64, 96))
    for found, exact in ((products.logits(x), x @ weight.t()), (products.input_gradient(grad), grad @ weight)):
        assert float((found - exact).norm() / exact.norm()) == pytest.approx(2**0.5 * 0.027, rel=0.1)


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "rowwise", "tensorwise"])
def test_a_plain_head_computes_the_products_of_a_float8_linear(recipe: Any) -> None:
    head = Head(64, 96, None, "plain")
    model = torch.nn.ModuleDict({"lm_head": head})
    convert(model, experts=False, lm_head=True, recipe=recipe)  # type: ignore[arg-type]
    linear = Float8Linear.from_float(torch.nn.Linear(64, 96, bias=False), recipe_config(recipe, emulate=True))
    linear.weight.data.copy_(head.weight)
    results = []
    for product in (linear, lambda x: model["lm_head"].linear(x, head.weight)):
        x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = product(x)
        y.backward(torch.randn(48, 96, generator=torch.Generator().manual_seed(1)))
        results.append((y, x.grad))
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*results, strict=True))
    assert torch.equal(linear.weight.grad, head.weight.grad)  # type: ignore[arg-type]


def test_stale_copies_anywhere_in_a_model_are_named() -> None:
    model = build()
    convert(model, **ALL)
    refuse_stale(model)
    model.lm_head.weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"the FP8 copies of lm_head.weight are not"):
        refuse_stale(model)


def test_the_rowwise_recipe_uses_torchaos_operator() -> None:
    model = build()
    convert(model, recipe="rowwise")
    assert sum(isinstance(module, TorchaoExperts) for module in model.modules()) == 2


# --- the device -----------------------------------------------------------------------------------------------------


def test_what_a_device_cannot_do_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fp8(FP8Config(), on_gpu=True, bf16=False)
    refuse_fp8(FP8Config(enabled=True), on_gpu=False, bf16=False)
    with pytest.raises(ValueError, match=r"run.fp8.casts='triton' has kernels for GPUs only.* Use 'torch'"):
        refuse_fp8(FP8Config(enabled=True, casts="triton"), on_gpu=False, bf16=True)
    with pytest.raises(ValueError, match=r"run.fp8.enabled=true on a GPU needs bf16.enabled=true"):
        refuse_fp8(FP8Config(enabled=True), on_gpu=True, bf16=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"NVIDIA A100 has compute capability 8.0.* for 9.0 .*Remove run.fp8"):
        refuse_fp8(FP8Config(enabled=True), on_gpu=True, bf16=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    refuse_fp8(FP8Config(enabled=True), on_gpu=True, bf16=True)
