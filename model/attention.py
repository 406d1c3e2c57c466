"""Causal self-attention with rotary positions, QK norm, grouped key-value heads and value embeddings.

Shapes: B batch, S sequence, D hidden_size, N query heads, M key-value heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from model.config import ModelConfig

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x), times a weight if affine (Zhang & Sennrich, arXiv 1910.07467). Normalises the last dimension."""

    def __init__(self, size: int, affine: bool) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, NORM_EPS)


def rotary_tables(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, H/2] of rotary position embedding (Su et al., arXiv 2104.09864), in fp32."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotate channel i with channel i + H/2, as the Hugging Face models do; computed in fp32."""
    cos, sin = cos_SR[None, :, None, :], sin_SR[None, :, None, :]
    first, second = x_BSNH.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSNH.dtype)


def attention_backend(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> str:
    """Name of the implementation that torch takes for this model's attention in training.

    The order in which it tries them is torch's own: since 2.11 cuDNN first on Hopper and the data-centre Blackwells,
    elsewhere FlashAttention, then the memory-efficient one, then the formula. Nothing is put before it here, since
    torch keeps cuDNN back where that is too old to be right (up to 9.15.0; pytorch/pytorch#169849).
    """
    B, S, N, M, H = 1, config.seq_len, config.num_attention_heads, config.kv_heads, config.head_dim
    q_BNSH, k_BMSH = (
        torch.empty(B, S, heads, H, dtype=dtype, device=device, requires_grad=True).transpose(1, 2) for heads in (N, M)
    )
    choice = torch._fused_sdp_choice(q_BNSH, k_BMSH, k_BMSH, is_causal=True, enable_gqa=M != N)
    return SDPBackend(choice).name


class Attention(nn.Module):
    """x_BSD -> [B, S, D]. With a value embedding, value heads get `gate * embedding[token]` added (as in nanochat)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        self.num_heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, H
        self.q_proj = nn.Linear(D, self.num_heads * H, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * H, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * H, bias=False)
        self.o_proj = nn.Linear(self.num_heads * H, D, bias=False)
        self.q_norm = RMSNorm(H, config.norm_affine) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(H, config.norm_affine) if config.qk_norm else nn.Identity()
        if config.has_value_embedding(layer):
            self.value_embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, self.kv_heads * H)
            self.value_gate = nn.Linear(config.value_gate_size, self.kv_heads, bias=False)
        else:
            self.value_embedding = None

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        B, S, _ = x_BSD.shape
        q_BSNH = self.q_proj(x_BSD).view(B, S, self.num_heads, self.head_dim)
        k_BSMH = self.k_proj(x_BSD).view(B, S, self.kv_heads, self.head_dim)
        v_BSMH = self.v_proj(x_BSD).view(B, S, self.kv_heads, self.head_dim)
        if self.value_embedding is not None:
            # A zero gate weight gives 1: the embedding counts from the first step, and the gate learns to open or shut.
            gate_BSM = 2 * torch.sigmoid(self.value_gate(x_BSD[..., : self.value_gate.in_features]))
            v_BSMH = v_BSMH + gate_BSM.unsqueeze(-1) * self.value_embedding(tokens_BS).view_as(v_BSMH)
        q_BSNH, k_BSMH = rotate(self.q_norm(q_BSNH), *rotary), rotate(self.k_norm(k_BSMH), *rotary)
        y_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BSMH.transpose(1, 2),
            v_BSMH.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.kv_heads != self.num_heads,
        )
        return self.o_proj(y_BNSH.transpose(1, 2).reshape(B, S, -1))
