"""FP8 through torchao: which matrix products of a model are converted, which are not and why, and how.

    experts     quantize_ with our ExpertsFP8Config   rowwise_with_gw_hp: model/fp8_experts.py
                                                      rowwise: torchao's grouped operator, forward and both backwards
                expert_backend "loop": torchao's Float8Linear, one expert after the other, any recipe
    dense       convert_to_float8_training: every nn.Linear becomes a Float8Linear
    lm_head     the products of the cross-entropy in chunks; or, with the plain one, those of a Float8Linear

    recipe               scales             forward    gradient of the input    gradient of the weight
    rowwise_with_gw_hp   powers of two      FP8 rows   FP8 rows                 bf16
    rowwise              powers of two      FP8 rows   FP8 rows                 FP8, rows of the transposed operands
    tensorwise           one per tensor     FP8        FP8 (e5m2)               FP8

Parameters stay the plain tensors they were: DeepSpeed, checkpoints and optimizers see nothing new. In eval mode all is
computed in bf16. On a CPU the same quantised values are dequantised and multiplied in fp32, which is slow and exact.
"""

from __future__ import annotations

from model.fp8_casts import Quantized, quantize_rows, quantize_weights  # before torchao: it quiets its loggers

# isort: split
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
import torchao
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8._inductor_patch import _patch_inductor_min_max_codegen
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from model.config import FP8_WIDTHS, FP8Casts, FP8Config, FP8Recipe
from model.experts import MLP, LoopedExperts, StackedExperts, activate
from model.fp8_experts import FP8Experts, take_over
from model.fp8_matmul import scaled_matmul
from model.fp8_weights import FP8Weights, refresh_fp8
from model.loss import Head, Products, chunked, plain
from model.moe import MoELayer

# --- what is converted ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A weight, or the weights of all experts of a layer, and what became of it."""

    name: str
    count: int  # matrices, over all expert-parallel ranks
    shape: tuple[int, int]  # outputs, inputs
    skipped: str | None  # why it stays as it is; None: converted


@dataclass(frozen=True)
class Conversion:
    """What a model's matrices were converted to."""

    matrices: list[Matrix]
    how: str

    @property
    def converted(self) -> int:
        return sum(each.count for each in self.matrices if each.skipped is None)

    @property
    def skipped(self) -> int:
        return sum(each.count for each in self.matrices if each.skipped is not None)

    def text(self) -> str:
        """For people: one line for all matrices that differ only in the number of their block."""
        lines = [f"FP8: {self.how}", f"{self.converted} matrices converted, {self.skipped} skipped"]
        grouped: dict[tuple[str, tuple[int, int], str], int] = {}
        for each in self.matrices:
            name = ".".join("*" if part.isdigit() else part for part in each.name.split("."))
            key = (name, each.shape, f"not FP8: {each.skipped}" if each.skipped else "FP8")
            grouped[key] = grouped.get(key, 0) + each.count
        lines += [f"  {count:5} {name} [{n} x {k}]  {fate}" for (name, (n, k), fate), count in grouped.items()]
        return "\n".join(lines)


def apply_fp8(model: nn.Module, config: FP8Config, *, emulate: bool, compiled: bool) -> Conversion:
    """Convert a GPT's matrix products in place, before it is compiled and handed to DeepSpeed.

    Args:
        emulate: compute on something else than a GPU that has FP8 products.
        compiled: compile what casts outside of blocks: weights, and the head's operands.

    Call `refresh_fp8(model)` before the first training step and after every write to the weights.
    """
    _patch_inductor_min_max_codegen()  # triton-lang/triton#11111: NaNs where none are
    conversion = Conversion(plan_conversion(model, config), describe(config, emulate))
    wanted = {each.name for each in conversion.matrices if each.skipped is None}
    linear = partial(to_float8_linear, recipe=config.recipe, emulate=emulate)
    heads = {name for name, module in model.named_modules() if isinstance(module, Head)}
    linear(model, wanted - heads)
    for name, experts in list(model.named_modules()):
        if isinstance(experts, LoopedExperts) and name in wanted:
            linear(experts, None)
    quantize_(
        model,
        ExpertsFP8Config(config.recipe, config.casts, compiled),
        lambda module, name: isinstance(module, StackedExperts) and name in wanted,
    )
    for name in heads & wanted:
        parent, _, child = name.rpartition(".")
        head = model.get_submodule(name)
        assert isinstance(head, Head)
        setattr(model.get_submodule(parent), child, FP8Head.of(head, config.recipe, emulate, compiled))
    return conversion


def plan_conversion(model: nn.Module, config: FP8Config) -> list[Matrix]:
    """Every matrix that a model multiplies with, and why it is skipped if it is."""
    matrices: list[Matrix] = []
    inside: str | None = None  # the name of the LoopedExperts that the walk is in
    for name, module in model.named_modules():
        if inside is not None and name.startswith(f"{inside}."):
            continue
        inside = None
        if isinstance(module, StackedExperts | LoopedExperts):
            inside = name
            ep_size = next(each.ep_size for each in parents(model, name) if isinstance(each, MoELayer))
            matrices.append(plan_experts(name, module, ep_size, config))
        elif isinstance(module, nn.Linear):
            asked = config.lm_head if isinstance(module, Head) else config.dense
            key = "lm_head" if isinstance(module, Head) else "dense"
            shape = (module.out_features, module.in_features)
            reason = "the router is fp32" if name.endswith(".gate.wg") else None
            reason = reason or (None if asked else f"run.fp8.{key} is false") or why_not([shape], config)
            matrices.append(Matrix(name, 1, shape, reason))
    return matrices


def plan_experts(name: str, experts: StackedExperts | LoopedExperts, ep_size: int, config: FP8Config) -> Matrix:
    if isinstance(experts, StackedExperts):
        count, weights = experts.num_local_experts, (experts.w1[0], experts.w2[0])
    else:
        mlp = experts.deepspeed_experts[0]
        assert isinstance(mlp, MLP)
        count, weights = len(experts.deepspeed_experts), (mlp.w1.weight, mlp.w2.weight)
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    reason = None if config.experts else "run.fp8.experts is false"
    return Matrix(name, 2 * count * ep_size, shapes[0], reason or why_not(shapes, config))


def parents(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the one of this name, the innermost first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1)]


def why_not(shapes: list[tuple[int, int]], config: FP8Config) -> str | None:
    """Why matrices of these shapes [N, K] are not converted; None if they are."""
    for n, k in shapes:
        for width, what in ((n, "outputs"), (k, "inputs")):
            if width % FP8_WIDTHS:
                return f"{width} {what}, not a multiple of {FP8_WIDTHS}"
        if n * k / (n + k) < config.min_reduced_width:
            return f"N*K/(N+K) = {n * k / (n + k):.0f}, below run.fp8.min_reduced_width"
    return None


def describe(config: FP8Config, emulate: bool) -> str:
    product = "dequantised, multiplied in fp32 (no FP8 products on this device)" if emulate else "torch's FP8 products"
    casts = f", experts' casts: {config.casts}" if config.experts else ""
    return f"torchao {torchao.__version__}, {config.recipe}{casts}, {product}; validation without FP8"


# --- experts --------------------------------------------------------------------------------------------------------


@dataclass
class ExpertsFP8Config(AOBaseConfig):
    """For torchao's quantize_: stacked experts in FP8."""

    recipe: FP8Recipe
    casts: FP8Casts
    compiled: bool


@register_quantize_module_handler(ExpertsFP8Config)
def convert_experts(module: nn.Module, config: ExpertsFP8Config) -> nn.Module:
    assert isinstance(module, StackedExperts), type(module)
    if config.recipe == "rowwise_with_gw_hp":
        return FP8Experts.of(module, config.casts, config.compiled)
    assert config.recipe == "rowwise", config.recipe
    return take_over(TorchaoExperts, module)


class TorchaoExperts(StackedExperts):
    """The experts of a StackedExperts by torchao's differentiable grouped operator, which casts the weights in every
    forward and backward pass and computes the weight's gradient in FP8 too. Rows [L, M, D] only."""

    def forward(self, rows: Tensor, ends_L: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(rows, ends_L)
        assert ends_L is None, "groups of any size need padding that torchao 0.18.0 does not have; refused at the start"
        M = rows.shape[1]
        rows = F.pad(rows, (0, 0, 0, -M % FP8_WIDTHS))  # rows of zeros, which add nothing anywhere
        linear = torchao_linear if rows.is_cuda else RowwiseLinear.apply
        return linear(activate(linear(rows, self.w1), self.activation), self.w2)[:, :M].contiguous()


def torchao_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [L, M, K], weight [L, N, K] -> [L, M, N] by torchao's operator, which has kernels for GPUs only."""
    L, M, K = rows.shape
    ends = torch.arange(1, L + 1, dtype=torch.int32, device=rows.device) * M
    y = _to_fp8_rowwise_then_scaled_grouped_mm(
        rows.reshape(L * M, K), weight.mT, ends, out_dtype=rows.dtype, pad_token_groups_for_grouped_mm=False
    )
    return y.view(L, M, -1)


class RowwiseLinear(torch.autograd.Function):
    """What torchao's operator computes, on any device: every operand cast by the rows that its product sums over."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product_of_rows(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        return product_of_rows(grad, weight.mT), product_of_rows(grad.mT, rows.mT)


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """a [L, M, K] @ b [L, N, K]^T in FP8, all rows scaled on their own."""
    return scaled_matmul(*quantize_rows(a.contiguous()), *quantize_rows(b.contiguous()), None, a.dtype)


# --- linears --------------------------------------------------------------------------------------------------------


def recipe_config(recipe: FP8Recipe, emulate: bool) -> Float8LinearConfig:
    return replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


def to_float8_linear(module: nn.Module, names: set[str] | None, recipe: FP8Recipe, emulate: bool) -> None:
    """Convert the linears of these names, None: all, by torchao; in eval mode they compute in bf16."""
    convert_to_float8_training(
        module,
        module_filter_fn=lambda _, name: names is None or name in names,
        config=recipe_config(recipe, emulate),
    )
    for linear in module.modules():
        if type(linear) is Float8Linear:
            linear.__class__ = FP8Linear  # torchao makes Float8Linear and nothing else


class FP8Linear(Float8Linear):
    """torchao's Float8Linear, but bf16 in eval mode, and for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return in_whole_rows(super().forward, x) if self.training else F.linear(x, self.weight)


def in_whole_rows(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """linear(x) of x [..., K] with rows of zeros added where torchao needs them: it takes the maximum of no rows at
    all, and sums over rows in FP8 where the gradient of the weight is in FP8, which wants a multiple of 16."""
    rows = x.flatten(0, -2)
    present = rows.shape[0]
    if present and present % FP8_WIDTHS == 0:
        return linear(x)
    missing = -present % FP8_WIDTHS or FP8_WIDTHS
    y = linear(F.pad(rows, (0, 0, 0, missing)))[:present]
    return y.view(*x.shape[:-1], y.shape[-1])


# --- head -----------------------------------------------------------------------------------------------------------


class FP8Head(Head):
    """The head of a Head, whose parameter it takes over, with FP8 products where the loss is computed for training.

    In chunks they are as in model/fp8_experts.py; all at once they are those of torchao's Float8Linear.
    """

    fp8_weights: dict[str, FP8Weights]
    quantize: Callable[[Tensor], Quantized]
    float8_arguments: tuple[Any, Any]

    @classmethod
    def of(cls, head: Head, recipe: FP8Recipe, emulate: bool, compiled: bool) -> Self:
        with torch.device("meta"):
            taken = cls(head.in_features, head.out_features, head.softcap, "plain")
        taken.weight, taken.cross_entropy = head.weight, head.cross_entropy
        if head.cross_entropy is chunked:
            assert recipe == "rowwise_with_gw_hp", recipe
            taken.fp8_weights = {"weight": FP8Weights(quantize_weights, compiled)}
            taken.quantize = torch.compile(quantize_rows, dynamic=False) if compiled else quantize_rows
            taken.register_load_state_dict_post_hook(lambda module, _: refresh_fp8(module))
        else:
            float8 = Float8Linear.from_float(taken, recipe_config(recipe, emulate))
            taken.float8_arguments = (float8.linear_mm_config, float8.config)
        return taken.train(head.training)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not self.training:
            return super().forward(x, targets)
        x, targets = x.flatten(0, -2), targets.flatten()
        if self.cross_entropy is chunked:
            return chunked(x, self.weight, targets, self.softcap, self.products())
        return plain(x, self.weight, targets, self.softcap, self.linear)

    def products(self) -> Products:
        return FP8Products(self.weight.detach(), self.fp8_weights["weight"].get(), self.quantize)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return in_whole_rows(
            lambda rows: matmul_with_hp_or_float8_args.apply(rows, weight.t(), *self.float8_arguments), x
        )


class FP8Products(Products):
    """The head's products in FP8, from the copies of its weight."""

    def __init__(self, weight_VD: Tensor, copies: tuple[Tensor, ...], quantize: Callable[[Tensor], Quantized]) -> None:
        super().__init__(weight_VD)
        self.copies, self.quantize = copies, quantize

    def logits(self, x_TD: Tensor) -> Tensor:
        return scaled_matmul(*self.quantize(x_TD), *self.copies[:2], None, x_TD.dtype)

    def input_gradient(self, grad_TV: Tensor) -> Tensor:
        return scaled_matmul(*self.quantize(grad_TV), *self.copies[2:], None, grad_TV.dtype)
