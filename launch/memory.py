"""How much memory one rank needs: an estimate from the configuration alone, good enough to choose an ep_size.

weights and gradients   2 bytes each in bf16, 4 in fp32; a rank holds its share of the experts
FP8 copies              2 bytes for every weight of the experts and of a head in chunks: one for each orientation
optimizer               12 bytes per parameter (fp32 master and two moments; too many for Muon, which has one), divided
                        among the ranks that hold a copy; nothing where it is offloaded to the host, whose memory is not
                        counted
activations             what the backward pass keeps per token and layer, plus the logits, and beside them the
                        gradients that a forward pass in chunks forms early (model/loss.py)

ZeRO-2 divides gradients too, and ZeRO-3 weights; what ZeRO-3 has gathered at a time is counted beside them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from launch.run_config import Run
from launch.zero_settings import offloads, zero_stage
from model.config import CROSS_ENTROPY_CHUNK, ModelConfig
from model.flops import count_parameters

GIB = 2**30
ASSUMED_GPU_BYTES = 80 * GIB  # where no GPU can be asked
USABLE_FRAC = 0.85  # the rest is for the allocator, the communication library and the estimate's error


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.activations


def estimate_memory(run: Run, ranks: int, ep_size: int) -> MemoryEstimate:
    """Estimate the bytes that one rank of this run needs at this ep_size."""
    counts = count_parameters(run.model)
    stage = zero_stage(run.deepspeed)
    width = 2 if run.deepspeed.get("bf16", {}).get("enabled") else 4

    def state_bytes(parameters: int, copies: int) -> float:
        weights = width / copies if stage >= 3 else width
        gradients = width / copies if stage >= 2 else width
        optimizer = 12 / copies if stage >= 1 else 12
        if offloads(run.deepspeed, "offload_param"):
            weights = 0
        if offloads(run.deepspeed):
            optimizer = 0
        return parameters * (weights + gradients + optimizer)

    dense = counts.total - counts.expert
    states = state_bytes(dense, ranks) + state_bytes(counts.expert // ep_size, max(1, ranks // ep_size))
    if stage >= 3:
        states += width * min(counts.total, gathered_at_once(run))
    return MemoryEstimate(int(states) + fp8_bytes(run, counts.expert // ep_size), activation_bytes(run, width))


def fp8_bytes(run: Run, expert_parameters: int) -> int:
    """What is kept in FP8 beside the weights of this rank; torchao's own ways cast anew and keep nothing."""
    fp8, moe = run.fp8, run.model.moe
    if not fp8.enabled or fp8.recipe != "rowwise_with_gw_hp":
        return 0
    weights = expert_parameters if fp8.experts and moe is not None and moe.expert_backend != "loop" else 0
    if fp8.lm_head and run.train.cross_entropy == "chunked":
        weights += run.model.vocab_size * run.model.hidden_size
    return 2 * weights


def gathered_at_once(run: Run) -> int:
    """Parameters that ZeRO-3 keeps whole at a time: it gathers ahead up to one of these limits and frees beyond the
    other. Under their defaults, a billion each, a smaller model is whole in memory in every step."""
    zero = run.deepspeed["zero_optimization"]
    return max(
        zero.get(f"stage3_{name}", zero.get(name, 1_000_000_000))
        for name in ("max_live_parameters", "max_reuse_distance")
    )


def activation_bytes(run: Run, width: int) -> int:
    """Activations at the peak of a training step of one micro-batch: what all blocks keep, and one block in full."""
    model, how = run.model, run.train.activation_checkpointing
    layers = range(model.num_layers)
    in_full = [elements_in_full(model, layer) for layer in layers]
    if how == "none":
        per_token = sum(in_full)
    elif how == "block":
        per_token = model.num_layers * model.hidden_size + max(in_full)
    else:
        per_token = sum(elements_kept_selectively(model, layer) for layer in layers) + max(in_full)
    return int(run.micro_batch_size * model.seq_len * width * per_token) + cross_entropy_bytes(run, width)


def cross_entropy_bytes(run: Run, width: int) -> int:
    """The head and the loss of one micro-batch, at the peak."""
    tokens, V, D = run.micro_batch_size * run.model.seq_len, run.model.vocab_size, run.model.hidden_size
    logits = 3 * 4 * V  # of one token: logits, their softmax and gradient, in fp32
    gradients = width * tokens * D + (4 + width) * V * D  # of the head's input and weight; the latter is summed in fp32
    if run.train.cross_entropy == "plain":
        return tokens * logits
    if run.train.cross_entropy == "chunked":
        return min(tokens, CROSS_ENTROPY_CHUNK) * logits + gradients
    return 2 * tokens * D * width + gradients  # chunks of at most twice the elements of the head's input


def elements_in_full(model: ModelConfig, layer: int) -> float:
    """Elements per token that a block's backward pass needs."""
    attention = 8 * model.hidden_size  # norms, queries, keys, values, attention output, residuals
    if model.moe is not None and model.is_moe_layer(layer):
        routes = model.moe.top_k * max(1.0, model.moe.capacity_factor)
        shared = 3 * model.moe.shared_ffn_hidden_size
        return attention + shared + routes * (2 * model.hidden_size + 3 * model.moe.ffn_hidden_size)
    return attention + 2 * model.hidden_size + 3 * (model.ffn_hidden_size or 0)


def elements_kept_selectively(model: ModelConfig, layer: int) -> float:
    """Elements per token of a block's input and of the results of its matrix products, attention and all-to-alls."""
    up = 2 if model.activation == "swiglu" else 1
    attention = 4 * model.hidden_size + 2 * model.kv_heads * model.head_dim
    if model.moe is not None and model.is_moe_layer(layer):
        routes = model.moe.top_k * max(1.0, model.moe.capacity_factor)
        shared = up * model.moe.shared_ffn_hidden_size
        return attention + shared + routes * (2 * model.hidden_size + up * model.moe.ffn_hidden_size)
    return attention + model.hidden_size + up * (model.ffn_hidden_size or 0)


def query_gpus() -> list[int]:
    """Total bytes of each visible GPU, from nvidia-smi; empty on a machine without GPUs.

    CUDA_VISIBLE_DEVICES is for the caller to apply: nvidia-smi lists all that the machine has.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return []
    return [int(line) * 2**20 for line in listing.split() if line.isdigit()]
