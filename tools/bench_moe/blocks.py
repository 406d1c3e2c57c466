"""The blocks side by side: ours, DeepSpeed's, transformers', the seed experiment's loop, and a dense MLP as the floor.

All MoE blocks get the same gate, and those with equal experts the same experts: numbers from N(0, 0.02^2) by fixed
seeds. Tokens are from N(0, 1), as after a norm. So no expert is preferred, yet no two are chosen equally often.

Experts have two matrices and relu^2; transformers' Qwen3-MoE knows gated experts only, so those get three matrices of
two thirds of the width, and ours are measured with them as well (+swiglu). The dense MLP is k experts wide. No block
adds its balance loss to what is differentiated, though ours and DeepSpeed's compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from model.config import FP8_WIDTHS, FP8Config, MoEConfig
from model.fp8_weights import refresh_fp8
from model.moe import MoELayer
from tools.bench_moe.shapes import Shape

STD = 0.02
DRAWN = ("tokens", "gradient", "gate", "first", "second")  # in the order of their seeds
MIN_CAPACITY = MoEConfig.model_fields["min_capacity"].default  # DeepSpeed's too


@dataclass
class Block:
    """A module as the benchmark sees it: x [1, T, D] -> y [1, T, D], and what one must know to compare it."""

    module: nn.Module
    facts: dict[str, Any]
    count_dropped: Callable[[Any], Tensor | int] | None = None  # routes, from what the module returned; None: dense
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.module.parameters())

    def forward(self, x: Tensor) -> Tensor:
        returned = self.module(x)
        return returned[0] if isinstance(returned, tuple) else returned

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward, from a fixed gradient instead of a loss; leaves no gradients behind."""
        self.forward(x).backward(grad)
        x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True)
class Experts:
    """Weights of all experts of one block, and what they cost."""

    activation: str
    w1_ERD: Tensor  # R rows: the width, twice that if gated (gate above up)
    w2_EDF: Tensor

    @property
    def width(self) -> int:
        return self.w2_EDF.shape[2]


class Case:
    """One shape and precision: the tokens, the gradient and the weights that its blocks share."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.x = self.draw("tokens", 1, shape.T, shape.D).requires_grad_()
        self.grad = self.draw("gradient", 1, shape.T, shape.D)
        self.gate_ED = self.draw("gate", shape.E, shape.D) * STD

    def draw(self, what: str, *size: int) -> Tensor:
        """Numbers from N(0, 1), the same for every block and, rounded, in every precision."""
        generator = torch.Generator(self.device).manual_seed(DRAWN.index(what))
        return torch.randn(*size, generator=generator, device=self.device).to(self.dtype)

    def experts(self, activation: str) -> Experts:
        E, D = self.shape.E, self.shape.D
        gated = activation == "swiglu"
        width = self.shape.gated_width if gated else self.shape.F
        w1_ERD = self.draw("first", E, (2 if gated else 1) * width, D) * STD
        return Experts(activation, w1_ERD, self.draw("second", E, D, width) * STD)

    def build(self, name: str) -> Block:
        """A block by its name; what it raises is whatever its makers raise."""
        base, *suffixes = name.split("+")
        maker, variant = base.split("/")
        with self.device:
            block = MAKERS[maker](self, f"{variant}+swiglu" if "swiglu" in suffixes else variant)
        block.module.train()
        if "static" in suffixes or "dynamic" in suffixes:
            block.module.compile(dynamic="dynamic" in suffixes)
        return block

    def check(self, block: Block) -> None:
        """Note what share of the routes a block drops. Raises RuntimeError if it returns nonsense."""
        returned = block.module(self.x)
        y = returned[0] if isinstance(returned, tuple) else returned
        if y.shape != self.x.shape or y.dtype != self.dtype or not y.isfinite().all():
            raise RuntimeError(f"returned {y.dtype} {tuple(y.shape)}, not finite {self.dtype} {tuple(self.x.shape)}")
        if block.count_dropped is not None:
            block.facts["dropped_frac"] = float(block.count_dropped(returned)) / (self.shape.T * self.shape.k)

    def finish(
        self, module: nn.Module, weights: dict[str, Tensor], facts: dict[str, Any], count_dropped: Any = None
    ) -> Block:
        module.to(device=self.device, dtype=self.dtype)
        module.load_state_dict(weights)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return Block(module, {**facts, "parameters": parameters}, count_dropped)

    def facts_of(self, experts: Experts, capacity_factor: float) -> dict[str, Any]:
        """FLOPs are those of the k chosen experts of every token, forward and backward (3 times forward); no gate."""
        matrices = 3 if experts.activation == "swiglu" else 2
        return {
            "capacity_factor": capacity_factor,  # 0: dropless
            "activation": experts.activation,
            "width": experts.width,
            "flops": 3 * 2 * self.shape.T * self.shape.k * matrices * self.shape.D * experts.width,
        }

    # --- the makers -------------------------------------------------------------------------------------------------

    def ours(self, variant: str) -> Block:
        """bmm, loop and fp8 with capacity 1.0, grouped and fp8_grouped without dropping."""
        backend, _, activation = variant.partition("+")
        fp8 = FP8Config(enabled=True) if backend.startswith("fp8") else None
        return self.our_layer({"fp8": "bmm", "fp8_grouped": "grouped"}.get(backend, backend), activation, fp8)

    def torchao(self, variant: str) -> Block:
        """Our layer, capacity 1.0, with torchao's experts: its differentiable grouped operator, which casts rowwise, or
        a Float8Linear after the other with one scale for every tensor, which torchao calls its fastest."""
        if variant == "grouped":
            return self.our_layer("bmm", "", FP8Config(enabled=True, recipe="rowwise"))
        return self.our_layer("loop", "", FP8Config(enabled=True, recipe="tensorwise"))

    def our_layer(self, backend: str, activation: str, fp8: FP8Config | None) -> Block:
        experts = self.experts(activation or "relu2")
        capacity_factor = 0.0 if backend == "grouped" else 1.0
        config = MoEConfig(
            num_experts=self.shape.E,
            top_k=self.shape.k,
            ffn_hidden_size=experts.width,
            capacity_factor=capacity_factor,
            expert_backend=backend,  # type: ignore[arg-type]
        )
        layer, facts = MoELayer(self.shape.D, config, experts.activation), self.facts_of(experts, capacity_factor)
        if fp8 is not None:
            facts |= self.in_fp8(layer, fp8)
        block = self.finish(layer, self.named_as_deepspeed_does(experts), facts, lambda returned: returned[1].dropped)
        refresh_fp8(layer)  # once per optimizer step in a run, so not a part of what is timed
        return block

    def in_fp8(self, layer: MoELayer, config: FP8Config) -> dict[str, Any]:
        """Convert the layer; what its row says of it. Raises RuntimeError if there is nothing to convert."""
        from model.fp8 import apply_fp8  # loads torchao

        emulated = self.device.type != "cuda"
        if apply_fp8(layer, config, emulate=emulated, compiled=False).converted == 0:
            raise RuntimeError(f"no FP8 for matrices of {self.shape.D} x {self.shape.F}: not multiples of {FP8_WIDTHS}")
        return {"fp8": config.recipe, **({"emulated": True} if emulated else {})}

    def deepspeed(self, variant: str) -> Block:
        """DeepSpeed's layer with its own gate: top1gating, top2gating, or for k > 2 topkgating.

        Without random token selection and second choice by sampling, so that it takes the experts that the others take.
        Beyond capacity 1.0 it drops the last second choices (k = 2), or the least probable routes (k > 2); both
        normalise over the routes that are left. deepspeed 0.19.8 needs no process group for ep_size 1.
        """
        experts, dropless = self.experts("relu2"), variant == "stock_dropless"
        T, E, k = self.shape.T, self.shape.E, self.shape.k
        module = MoE(
            self.shape.D,
            Expert(self.shape.D, experts.width),
            num_experts=E,
            k=k,
            capacity_factor=1.0,
            min_capacity=MIN_CAPACITY,
            drop_tokens=not dropless,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        capacity = T if dropless else max(MIN_CAPACITY, math.ceil(T * k / E))
        return self.finish(
            module,
            self.named_as_deepspeed_does(experts),
            self.facts_of(experts, 0.0 if dropless else 1.0),
            lambda returned: (returned[2] - capacity).clamp(min=0).sum(),
        )

    def transformers(self, variant: str) -> Block:
        """The sparse block of Qwen3-MoE, dropless. `variant` is what transformers calls experts_implementation."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        experts = self.experts("swiglu")
        settings: dict[str, Any] = {
            "hidden_size": self.shape.D,
            "moe_intermediate_size": experts.width,
            "num_experts": self.shape.E,
            "num_experts_per_tok": self.shape.k,
            "norm_topk_prob": self.shape.k > 1,
            "hidden_act": "silu",
            "experts_implementation": variant,
        }
        weights = {
            "gate.weight": self.gate_ED,
            "experts.gate_up_proj": experts.w1_ERD,
            "experts.down_proj": experts.w2_EDF,
        }
        return self.finish(
            Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings)), weights, self.facts_of(experts, 0.0), lambda _: 0
        )

    def seed(self, variant: str) -> Block:
        """What the project continues from; dropless, as it was trained."""
        experts = self.experts("relu2")
        module = MaskedLoop(self.shape, experts.width)
        weights = {"gate.weight": self.gate_ED, **named_one_by_one("experts", experts)}
        return self.finish(module, weights, self.facts_of(experts, 0.0), lambda _: 0)

    def dense(self, variant: str) -> Block:
        """No gate, no choice: all tokens through one MLP of the FLOPs of k experts."""
        D, F, k = self.shape.D, self.shape.F, self.shape.k
        weights = {"w1.weight": self.draw("first", k * F, D) * STD, "w2.weight": self.draw("second", D, k * F) * STD}
        flops = 3 * 2 * self.shape.T * 2 * D * (k * F)
        return self.finish(Expert(D, k * F), weights, {"activation": "relu2", "width": k * F, "flops": flops})

    def named_as_deepspeed_does(self, experts: Experts) -> dict[str, Tensor]:
        """The names under which DeepSpeed's layer and ours save their weights."""
        prefix = "deepspeed_moe.experts.deepspeed_experts"
        return {"deepspeed_moe.gate.wg.weight": self.gate_ED, **named_one_by_one(prefix, experts)}


MAKERS: dict[str, Callable[[Case, str], Block]] = {
    "ours": Case.ours,
    "torchao": Case.torchao,
    "deepspeed": Case.deepspeed,
    "transformers": Case.transformers,
    "seed": Case.seed,
    "dense": Case.dense,
}


def named_one_by_one(prefix: str, experts: Experts) -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    for number, (w1, w2) in enumerate(zip(experts.w1_ERD, experts.w2_EDF, strict=True)):
        names |= {f"{prefix}.{number}.w1.weight": w1, f"{prefix}.{number}.w2.weight": w2}
    return names


class Expert(nn.Module):
    """w2(relu(w1(x))^2)"""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.relu(self.w1(x)).square())


class MaskedLoop(nn.Module):
    """Experts one by one, each on the tokens that a boolean mask picks for it."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.top_k = shape.k
        self.gate = nn.Linear(shape.D, shape.E, bias=False)
        self.experts = nn.ModuleList(Expert(shape.D, width) for _ in range(shape.E))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        probs_TE = F.softmax(F.linear(x_TD.to(precise), self.gate.weight.to(precise)), dim=-1)
        gates_TK, expert_TK = probs_TE.topk(self.top_k)
        if self.top_k > 1:
            gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            chosen_TK = expert_TK == number
            mask_T = chosen_TK.any(1)
            gate_T1 = (gates_TK * chosen_TK).sum(1, keepdim=True).to(x_TD.dtype)
            y_TD[mask_T] += gate_T1[mask_T] * expert(x_TD[mask_T])
        return y_TD.view_as(x_BSD)
