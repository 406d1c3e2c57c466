"""Parameters, FLOPs and MFU of a model, from its configuration alone. Pure arithmetic, no torch.

Tests build the models and compare: these counts are those of the parameters that exist.

    active    = parameters that one token passes through
    inactive  = total - active: the experts that a token does not choose
    matmul    = active parameters that multiply (attention, MLPs or chosen and shared experts, gates, lm_head); no
               embeddings and no norms
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of one model; see the module's docstring for the terms."""

    total: int
    active: int
    inactive: int
    active_matmul: int
    expert: int  # all routed experts of all layers: what expert parallelism divides among ranks


def mlp_parameters(hidden_size: int, ffn_hidden_size: int, activation: str) -> int:
    """Weights of one MLP or one expert: two matrices, three for a gated activation."""
    return (3 if activation == "swiglu" else 2) * hidden_size * ffn_hidden_size


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of `GPT(model)`, over all expert-parallel ranks."""
    D, V = model.hidden_size, model.vocab_size
    kv_size = model.kv_heads * model.head_dim
    matmul = V * D  # lm_head, tied or not: it multiplies
    other = 0 if model.tie_embeddings else V * D  # token embedding
    inactive = expert = 0

    for layer in range(model.num_layers):
        matmul += D * D + 2 * D * kv_size + D * D  # queries, keys and values, output
        if model.has_value_embedding(layer):
            other += V * kv_size
            matmul += model.value_gate_size * model.kv_heads
        if model.moe is not None and model.is_moe_layer(layer):
            one_expert = mlp_parameters(D, model.moe.ffn_hidden_size, model.activation)
            shared = mlp_parameters(D, model.moe.shared_ffn_hidden_size, model.activation)
            matmul += D * model.moe.num_experts + model.moe.top_k * one_expert + shared
            inactive += (model.moe.num_experts - model.moe.top_k) * one_expert
            expert += model.moe.num_experts * one_expert
        else:
            assert model.ffn_hidden_size is not None
            matmul += mlp_parameters(D, model.ffn_hidden_size, model.activation)
        if model.norm_affine:
            other += 2 * D + (2 * model.head_dim if model.qk_norm else 0)
    if model.norm_affine:
        other += D + (D if model.embedding_norm else 0)  # before the head, after the embedding

    active = matmul + other
    return ParameterCounts(active + inactive, active, inactive, matmul, expert)


def flops_per_token(model: ModelConfig) -> int:
    """Training FLOPs (forward and backward) per token: 6 per active matmul parameter, plus attention.

    Attention is counted in full, 12 * hidden_size * attended context per layer, as in PaLM (arXiv 2204.02311,
    appendix B).
    """
    attended_context = model.num_layers * model.seq_len
    return 6 * count_parameters(model).active_matmul + 12 * model.hidden_size * attended_context


# Dense BF16 peak, FLOP/s, from the vendors' data sheets. The first name found in the device's name wins, so the
# narrower name stands first.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H800 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak BF16 FLOP/s of a device by its name; None for a device that the table does not know."""
    return next((peak for name, peak in PEAK_FLOPS if name.lower() in device_name.lower()), None)


def mfu_percent(tok_per_sec_per_gpu: float, flops_per_token: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation in percent of the stated peak; None where the peak is unknown."""
    return None if peak is None else 100.0 * tok_per_sec_per_gpu * flops_per_token / peak
