"""The attention back-end that a run's log names is the one that its model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import Attention, attention_backend, rotary_tables
from model.config import ModelConfig

FLASH_ON_CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class Operators(TorchDispatchMode):
    """Names of the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("allowed", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_back_end_that_is_named_is_the_one_that_runs(allowed: SDPBackend, kv_heads: int) -> None:
    B, S = 2, 8
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=32,
        num_attention_heads=4,
        num_kv_heads=kv_heads,
        seq_len=S,
        vocab_size=16,
    )
    attention = Attention(config, layer=0)
    tokens_BS, rotary = torch.zeros(B, S, dtype=torch.int64), rotary_tables(S, config.head_dim, config.rope_theta)
    with sdpa_kernel(allowed), Operators() as ran:
        assert attention_backend(config, torch.float32, "cpu") == allowed.name
        attention(torch.randn(B, S, 32), tokens_BS, rotary)
    assert (FLASH_ON_CPU in ran.names) == (allowed == SDPBackend.FLASH_ATTENTION)
