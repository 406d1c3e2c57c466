"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again (arXiv 1604.06174).

    none       every intermediate result is kept
    block      a block's inputs alone are kept; its forward pass runs a second time
    selective  inputs and the results of expensive operators are kept; norms, activations, rotary positions, gathers and
               the router's bookkeeping run a second time (the idea of arXiv 2205.05198, chosen by operator)

The second pass applies the same operators to the same values, so losses, gradients and statistics are those of "none"
(compiled, in bf16, gradients to rounding: other kernels are fused).
Statistics are those that the first pass returned; what the second pass returns is thrown away, so nothing counts twice.
Ranks that share experts repeat their collectives in step: all of them run the same blocks backwards in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import ops
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import model.fp8_matmul
import model.moe  # noqa: F401  defines moelab::all_to_all
from model.config import ActivationCheckpointing

# What "selective" keeps: operators whose time grows with a weight's size, with the square of the sequence, or with the
# network between ranks. All others move each byte once or twice, which costs less than the memory to keep their result.
KEPT_OPERATORS = [
    ops.aten.mm.default,
    ops.aten.addmm.default,
    ops.aten.bmm.default,
    ops.aten.baddbmm.default,
    ops.aten._scaled_mm.default,
    ops.aten._scaled_grouped_mm.default,
    ops.aten._scaled_dot_product_flash_attention.default,
    ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ops.aten._scaled_dot_product_efficient_attention.default,
    ops.aten._scaled_dot_product_cudnn_attention.default,
    ops.moelab.grouped_linear.default,
    ops.moelab.scaled_matmul.default,
    ops.moelab.all_to_all.default,
    ops.moelab.sum_over_ranks.default,
    # Not for its time: what is kept lies in the order of the first pass's routing. A compiled second pass may round the
    # scores otherwise, and where two of them nearly tie, a token that goes elsewhere would move the rows of all others.
    ops.aten.topk.default,
    ops.aten.sort.stable,  # by gates, where these decide who is dropped
]


def selective() -> Any:
    return create_selective_checkpoint_contexts(KEPT_OPERATORS)


def run_keeping(how: ActivationCheckpointing, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, a block's forward pass, which keeps for its backward pass what `how` says.

    Called within what is compiled, where inductor recomputes the same: around a compiled block torch sees its inputs
    only. No block draws random numbers, so there is no generator to restore (a copy from the device on every block).
    """
    if how == "none":
        return function(*inputs)
    if how == "block":
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=selective)
