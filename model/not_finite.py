"""Where a step stopped being finite: its micro-steps once more, and the first layer or gradient that is not.

Only for a step whose update was skipped, so that weights are what they were; and only when the run is about to end for
it: nothing here costs a healthy run anything. All ranks take part in everything, since their experts are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from model.gpt import GPT
from model.phases import reached

MOST_NAMES = 3  # of tensors in one line


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite."""


def locate(model: GPT, batches: list[tuple[Tensor, ...]]) -> str:
    """Where the first value that is not finite comes from, in a phrase. All ranks call this, and get the same.

    Args:
        batches: this rank's of every micro-step of the step.
    """
    poisoned = in_words(not_finite_tensors(model))
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled runs no hooks
            found = first_in_micro_steps(model, batches)
    except torch.OutOfMemoryError:  # what is not compiled takes more; the run is over for another reason
        found = "not located: memory ran out"
    finally:
        model.zero_grad()
    parts = [f"not finite before the step: {poisoned}"] if poisoned else []
    return "; ".join([*parts, found or "not reproduced: computed again, all losses and gradients are finite"])


def first_in_micro_steps(model: GPT, batches: list[tuple[Tensor, ...]]) -> str | None:
    moe = model.config.moe
    earlier: Tensor | None = None
    for number, batch in enumerate(batches, 1):
        of_all = f"in micro-step {number} of {len(batches)}"
        reached("forward")
        outputs: list[tuple[int, str]] = []
        with watched_outputs(model, outputs):
            counts = () if earlier is None else (earlier,)
            loss, stats = model(*batch, *counts)
        found = first_output(outputs, loss)
        if (where := earliest_of_ranks(found)) is not None:
            return f"first in the forward pass: {where}, {of_all}"
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # it has no gradient of its own
            return "not in the forward pass; ZeRO-3's backward pass cannot be looked into"
        reached("backward")
        found = first_gradient(model, loss)
        if (where := earliest_of_ranks(found)) is not None:
            return f"first in the backward pass: the gradient of {where}, {of_all}"
        if moe is not None and moe.aux_over_global_batch:
            tokens = stats.tokens_per_expert_ME.double()
            earlier = tokens if earlier is None else earlier + tokens
    return None


@contextmanager
def watched_outputs(model: nn.Module, found: list[tuple[int, str]]) -> Iterator[None]:
    """Note the modules whose output is not finite, inner ones first, with their place in the order of all."""
    place = 0

    def hook_of(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            nonlocal place
            place += 1
            if not all(is_finite(each) for each in tree_leaves(outputs)):
                found.append((place, name))

        return look

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_output(found: list[tuple[int, str]], loss: Tensor) -> tuple[int, str] | None:
    """The first block, or module outside the blocks, that returned what is not finite, and within it the first module.

    Not simply the first module: experts may return rows that nobody asked for, and what these hold means nothing.
    """
    for _, name in found:
        if re.fullmatch(r"blocks\.\d+|[^.]+", name):
            place, first = next(each for each in found if f"{each[1]}.".startswith(f"{name}."))
            return place, f"the output of {with_layer(first)}"
    return None if is_finite(loss) else (1 << 30, "the loss itself")


def first_gradient(model: nn.Module, loss: Tensor) -> tuple[int, str] | None:
    """The first parameter, in the order of the backward pass, whose gradient is not finite.

    torch.autograd.grad hands gradients to nobody else: DeepSpeed's hooks wait for what is added up in a parameter.
    """
    found: list[tuple[int, str]] = []
    place = 0

    def hook_of(name: str) -> Any:
        def look(gradient: Tensor) -> Tensor:
            nonlocal place
            place += 1
            if not is_finite(gradient):
                found.append((place, with_layer(name)))
            return gradient.new_zeros(()).expand_as(gradient)  # so that they are not all in memory at once

        return look

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(hook_of(name)) for name, parameter in named]
    try:
        torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def earliest_of_ranks(found: tuple[int, str] | None) -> str | None:
    """What comes first in the order that all ranks share, and the ranks that found it. All ranks call this."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    known = [each for each in of_ranks if each is not None]
    if not known:
        return None
    first = min(known)
    return f"{first[1]} on {ranks_in_words([rank for rank, each in enumerate(of_ranks) if each == first])}"


def not_finite_tensors(model: nn.Module) -> dict[str, list[int]]:
    """Parameters and buffers that hold what is not finite, and the ranks on which. All ranks call this."""
    named = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in named if not is_finite(getattr(tensor, "ds_tensor", tensor))]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, bad)
    found: dict[str, list[int]] = {}
    for rank, names in enumerate(of_ranks):
        for name in names:
            found.setdefault(name, []).append(rank)
    return found


def refuse_not_finite_weights(model: nn.Module, step: int) -> None:
    """Raise NotFinite on every rank alike if a weight or buffer is not finite: a save would push out one that is."""
    found = not_finite_tensors(model)
    if found:
        raise NotFinite(f"not saved after step {step}: not finite are {in_words(found)}")


# --- words ------------------------------------------------------------------------------------------------------------


def is_finite(value: object) -> bool:
    """Of a tensor; anything else is, and so is FP8. Takes no memory of the tensor's size. The host waits for the
    device."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.element_size() == 1 or not value.numel():
        return True
    return bool(torch.isfinite(torch.linalg.vector_norm(value.detach(), torch.inf)))


def with_layer(name: str) -> str:
    layer = re.match(r"blocks\.(\d+)\b", name)
    return f"{name} (layer {layer[1]})" if layer else name


def in_words(found: dict[str, list[int]]) -> str:
    names = [f"{name} on {ranks_in_words(ranks)}" for name, ranks in list(found.items())[:MOST_NAMES]]
    more = len(found) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def ranks_in_words(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
