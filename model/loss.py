"""The head of the model, and three ways to the cross-entropy of its logits that differ in memory, speed and rounding.

    plain    all logits of a micro-batch at once, T x V, in the model's type and again and again in fp32
    chunked  the logits of one chunk of tokens at a time, in the forward and in the backward pass
    liger    liger-kernel's fused kernels (arXiv 2410.10989): chunks too, on a GPU

d loss / d logits = (softmax - one-hot) / num_targets is known as soon as the logits are. So chunked forms the gradients
of the head's input and weight chunk by chunk in the forward pass, as liger does, and forgets the logits; the backward
pass multiplies these gradients by what comes from above.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import CROSS_ENTROPY_CHUNK, ConfigError, CrossEntropy
from model.data import IGNORED_TARGET


class Head(nn.Linear):
    """x [..., D] -> logits [..., V], at least fp32; or, given targets [...], their mean cross-entropy in nats.

    The loss is computed inside the module, so that ZeRO-3 gathers the weight for it as for any other.
    """

    def __init__(self, hidden_size: int, vocab_size: int, softcap: float | None, cross_entropy: CrossEntropy) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.softcap = softcap
        ways: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked, "liger": liger}
        self.cross_entropy = ways[cross_entropy]

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return bend(F.linear(x, self.weight), self.softcap)
        return self.cross_entropy(x.flatten(0, -2), self.weight, targets.flatten(), self.softcap)


def bend(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits as the softmax gets them, at least fp32: softcap * tanh(logits / softcap) where there is a softcap."""
    logits = logits.to(at_least_fp32(logits.dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def plain(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float | None,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """The definition. A target of IGNORED_TARGET counts nowhere; without any other the loss is 0."""
    logits_TV = bend(linear(x_TD, weight_VD), softcap)
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_TARGET, reduction="sum")
    return total / (targets_T != IGNORED_TARGET).sum().clamp(min=1)


class Products:
    """The products with the head's weight that the chunks need; model/fp8.py has them in FP8."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    def logits(self, x_TD: Tensor) -> Tensor:
        return x_TD @ self.weight_VD.t()

    def input_gradient(self, grad_TV: Tensor) -> Tensor:
        return grad_TV @ self.weight_VD


def chunked(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float | None, products: Products | None = None
) -> Tensor:
    """`plain` to rounding, CROSS_ENTROPY_CHUNK tokens at a time."""
    products = products or Products(weight_VD.detach())
    return ChunkedCrossEntropy.apply(x_TD, weight_VD, targets_T, softcap, products, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens; without gradients to record, the loss alone.

    Matrix products are in the model's type, softmax and sums in fp32, and so is the weight's gradient while chunks are
    added to it: in bf16, with 8 bits, a sum stops growing once a chunk is below 1/256 of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        softcap: float | None,
        products: Products,
        with_gradients: bool,
    ) -> Tensor:
        wide = at_least_fp32(x_TD.dtype)
        num_targets = (targets_T != IGNORED_TARGET).sum().clamp(min=1)
        total = x_TD.new_zeros((), dtype=wide)
        if with_gradients:
            grad_x_TD, grad_weight_VD = torch.empty_like(x_TD), torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, len(x_TD), CROSS_ENTROPY_CHUNK):
            rows = slice(start, start + CROSS_ENTROPY_CHUNK)
            log_probs_TV, slope_TV = log_softmax_of_logits(products.logits(x_TD[rows]), softcap)
            total += F.nll_loss(log_probs_TV, targets_T[rows], ignore_index=IGNORED_TARGET, reduction="sum")
            if with_gradients:
                grad_TV = gradient_of_logits(log_probs_TV, slope_TV, targets_T[rows], num_targets).to(x_TD.dtype)
                grad_x_TD[rows] = products.input_gradient(grad_TV)
                grad_weight_VD += grad_TV.t() @ x_TD[rows]
                del grad_TV
            del log_probs_TV, slope_TV  # before the next chunk takes its memory
        if with_gradients:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD.to(weight_VD.dtype))
        return total / num_targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD * grad, grad_weight_VD * grad, None, None, None, None


def log_softmax_of_logits(logits_TV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [T, V], and d bent logit / d logit = 1 - tanh(logit / softcap)^2 where there is a softcap."""
    logits_TV = bend(logits_TV, softcap)
    slope_TV = None if softcap is None else 1 - (logits_TV / softcap).square()
    return logits_TV.log_softmax(-1), slope_TV


def gradient_of_logits(log_probs_TV: Tensor, slope_TV: Tensor | None, targets_T: Tensor, num_targets: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy, in the memory of log_probs_TV."""
    real_T = targets_T != IGNORED_TARGET
    index_T1 = targets_T.where(real_T, 0).unsqueeze(1)
    grad_TV = log_probs_TV.exp_()
    share_T1 = (real_T.to(grad_TV.dtype) / num_targets).unsqueeze(1)
    grad_TV *= share_T1
    grad_TV.scatter_add_(1, index_T1, -share_T1)
    return grad_TV if slope_TV is None else grad_TV.mul_(slope_TV)


def liger(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float | None) -> Tensor:
    """liger-kernel's. The host waits for the device twice in a micro-step: for num_targets and the upstream gradient.

    Its chunks have as many tokens as make their logits about as large as x, and hold them in the model's type.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss, _z_loss, _accuracy, _predictions = LigerFusedLinearCrossEntropyFunction.apply(
        x_TD,
        weight_VD,
        targets_T,
        None,  # bias
        None,  # ce_weight, of each class
        IGNORED_TARGET,
        0.0,  # lse_square_scale
        0.0,  # label_smoothing
        "mean",
        softcap,
        False,  # return_z_loss
        torch.float32,  # accum_dtype, of the weight's gradient; by default the weight's own
    )
    return loss


def refuse_cross_entropy(cross_entropy: CrossEntropy, on_gpu: bool) -> None:
    """Raise ConfigError for a way that this process cannot go."""
    if cross_entropy != "liger":
        return
    if not on_gpu:
        raise ConfigError(
            "run.train.cross_entropy='liger' has kernels for GPUs only, and this run is on the CPU. Use 'chunked'."
        )
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "run.train.cross_entropy='liger' needs liger-kernel, which is not installed. "
            "Run pip install -c constraints.txt -e '.[gpu]', or use 'chunked'."
        )
