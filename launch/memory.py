"""How much memory one rank needs: an estimate from the configuration alone, good enough to choose an ep_size.

weights and gradients   2 bytes each in bf16, 4 in fp32; a rank holds its share of the experts
optimizer               12 bytes per parameter (fp32 master and two moments), divided among the ranks that hold a copy
activations             what the backward pass keeps per token and layer, plus the logits in fp32
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from launch.run_config import Run
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
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    width = 2 if run.deepspeed.get("bf16", {}).get("enabled") else 4

    def state_bytes(parameters: int, copies: int) -> float:
        gradients = width / copies if stage >= 2 else width
        optimizer = 12 / copies if stage >= 1 else 12
        return parameters * (width + gradients + optimizer)

    dense = counts.total - counts.expert
    states = state_bytes(dense, ranks) + state_bytes(counts.expert // ep_size, max(1, ranks // ep_size))
    return MemoryEstimate(int(states), activation_bytes(run, width))


def activation_bytes(run: Run, width: int) -> int:
    """Activations that a training step of one micro-batch keeps, without checkpointing."""
    model = run.model
    tokens = run.micro_batch_size * model.seq_len
    per_token = 0.0
    for layer in range(model.num_layers):
        per_token += 8 * model.hidden_size  # norms, queries, keys, values, attention output, residuals
        if model.moe is not None and model.is_moe_layer(layer):
            routes = model.moe.top_k * max(1.0, model.moe.capacity_factor)
            per_token += routes * (2 * model.hidden_size + 3 * model.moe.ffn_hidden_size)
        else:
            per_token += 2 * model.hidden_size + 3 * (model.ffn_hidden_size or 0)
    logits = 3 * 4 * model.vocab_size  # logits, their softmax and gradient, in fp32
    return int(tokens * (width * per_token + logits))


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
