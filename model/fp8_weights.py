"""FP8 copies of weights: cast once per optimizer step instead of in every micro-step, in memory that never moves.

They are right until someone writes the weights, and nothing tells them: DeepSpeed writes through `.data`, which does
not move torch's version counter. So whoever writes calls `refresh_fp8`, and `refuse_stale` compares: train.py does the
former after every optimizer step and every load, the latter before it validates and saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Quantize = Callable[[Tensor], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
Copies = tuple[Tensor, Tensor, Tensor, Tensor]  # forward: values, scales; for the gradient of the input: values, scales


class FP8Weights:
    """The copies of one weight, [N, K] or, of a stack of them, [L, N, K].

    Args:
        quantize: from [L, N, K] to what model/fp8_casts.py's quantize_weights returns.
        compiled: compile it.
    """

    def __init__(self, quantize: Quantize, compiled: bool) -> None:
        self.plain = quantize
        self.quantize = torch.compile(quantize, dynamic=False) if compiled else quantize
        self.copies: Copies | None = None

    def get(self) -> Copies:
        if self.copies is None:
            raise RuntimeError("FP8 weights are used before refresh_fp8(model). Call it when the weights have values.")
        return self.copies

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Raises RuntimeError if the copies are the first ones, and casts are compiled to something else."""
        if self.copies is None or self.copies[0].device != weight.device:
            self._refuse_miscompiled(weight)
            self.copies = self._quantized(weight, self.quantize)
            return
        for copy, values in zip(self.copies, self._quantized(weight, self.quantize), strict=True):
            copy.copy_(values)

    def _refuse_miscompiled(self, weight: Tensor) -> None:
        """Triton 3.6 and 3.7 can lose bytes of FP8 that are written transposed (triton-lang/triton#11111). Seen with
        random numbers: among the first values of a weight, which may be zeros all, no lost byte would show."""
        if self.quantize is self.plain:
            return
        generator = torch.Generator(weight.device).manual_seed(0)
        numbers = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
        if not same_bits(self._quantized(numbers, self.quantize), self._quantized(numbers, self.plain)):
            what, setting = "the head", "run.fp8.lm_head=false"
            if weight.ndim == 3:
                what, setting = "experts", "run.fp8.casts='triton'"
            raise RuntimeError(
                f"compiled, the casts to FP8 of the weights {list(weight.shape)} of {what} give other bits than "
                "uncompiled ones, so this torch or Triton compiles them wrongly. "
                f"Use run.compile.mode='none', or {setting}."
            )

    @torch.no_grad()
    def is_fresh(self, weight: Tensor) -> bool:
        """Whether the copies are those of `weight`, bit for bit. The host waits for the device."""
        return self.copies is not None and same_bits(self.copies, self._quantized(weight, self.quantize))

    def _quantized(self, weight: Tensor, quantize: Quantize) -> Copies:
        weight = weight.detach()
        if weight.ndim == 3:
            forward, backward = quantize(weight)
            return *forward, *backward
        forward, backward = quantize(weight.unsqueeze(0))
        return forward[0][0], forward[1][0], backward[0][0], backward[1][0]


def same_bits(first: Copies, second: Copies) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def with_copies(model: nn.Module) -> Iterator[tuple[str, FP8Weights, Tensor]]:
    """All FP8 copies of a model, with the name and value of the weight that they are copies of."""
    for name, module in model.named_modules():
        for weight, copies in getattr(module, "fp8_weights", {}).items():
            yield f"{name}.{weight}", copies, getattr(module, weight)


def refresh_fp8(model: nn.Module) -> None:
    """Cast the weights again: before the first training step, after every optimizer step, load and other write."""
    for _, copies, weight in with_copies(model):
        copies.refresh(weight)


def refuse_stale(model: nn.Module) -> None:
    """Raise RuntimeError if a weight was written and its FP8 copies were not refreshed."""
    stale = [name for name, copies, weight in with_copies(model) if not copies.is_fresh(weight)]
    if stale:
        raise RuntimeError(
            f"the FP8 copies of {', '.join(stale)} are not those of the weights: something wrote weights and did not "
            "call refresh_fp8(model). What was trained since then was trained with old weights."
        )
