"""A decoder-only transformer, dense or with mixture-of-experts layers.

x = norm(embed(tokens));  every block: x += attention(norm(x));  x += mlp_or_experts(norm(x))
logits = softcap(lm_head(norm(x)))
loss = cross-entropy + sum over MoE layers of (aux_loss_coeff * aux + z_loss_coeff * z)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Attention, RMSNorm, rotary_tables
from model.config import ActivationCheckpointing, CrossEntropy, ModelConfig
from model.data import IGNORED_TARGET
from model.experts import MLP, StackedExperts
from model.loss import Head
from model.moe import MoELayer
from model.profile import BLOCK, OTHER, part
from model.recompute import run_keeping
from model.router import RoutingStats


class Stats(NamedTuple):
    """What a forward pass learned about one micro-batch of one rank. M = number of MoE layers; all without gradient."""

    cross_entropy: Tensor  # scalar, nats per target
    num_targets: Tensor  # int64 scalar
    aux_loss_M: Tensor  # fp32, 1.0 when the load is uniform
    z_loss_M: Tensor  # fp32
    entropy_M: Tensor  # fp32, nats: the router's, mean over tokens
    tokens_per_expert_ME: Tensor  # int64, before any route is dropped
    dropped_M: Tensor  # int64, routes without a slot


class Block(nn.Module):
    """Pre-norm transformer block; `mlp` is an MLP or an MoELayer, beside which `shared_mlp` may hold shared experts.

    They are one MLP of their joint width, which is the sum of theirs; and not in the MoELayer: deepspeed 0.19.8 treats
    what is in it as routed.
    """

    def __init__(
        self, config: ModelConfig, layer: int, ep_size: int, activation_checkpointing: ActivationCheckpointing
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_affine)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_affine)
        self.mlp: MLP | MoELayer
        self.shared_mlp: MLP | None = None
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp = MoELayer(config.hidden_size, config.moe, config.activation, ep_size)
            if config.moe.num_shared_experts:
                self.shared_mlp = MLP(config.hidden_size, config.moe.shared_ffn_hidden_size, config.activation)
        else:
            assert config.ffn_hidden_size is not None
            self.mlp = MLP(config.hidden_size, config.ffn_hidden_size, config.activation)

    def forward(
        self, x_BSD: Tensor, tokens_BS: Tensor, rotary: tuple[Tensor, Tensor], earlier_E: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        return run_keeping(self.activation_checkpointing, self._forward, x_BSD, tokens_BS, rotary, earlier_E)

    def _forward(
        self, x_BSD: Tensor, tokens_BS: Tensor, rotary: tuple[Tensor, Tensor], earlier_E: Tensor | None
    ) -> tuple[Tensor, RoutingStats | None]:
        with part("attention"):
            x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), tokens_BS, rotary)
        if not isinstance(self.mlp, MoELayer):
            with part("mlp"):
                return x_BSD + self.mlp(self.mlp_norm(x_BSD)), None
        with part(OTHER):
            input_BSD = self.mlp_norm(x_BSD)
        y_BSD, stats = self.mlp(input_BSD, earlier_E)
        if self.shared_mlp is not None:
            with part("mlp"):
                y_BSD = y_BSD + self.shared_mlp(input_BSD)
        with part(OTHER):
            return x_BSD + y_BSD, stats


class GPT(nn.Module):
    """The model of `run.model`. Weights are a function of (config, seed) alone, whatever ep_size and ep_rank are.

    Args:
        ep_size: ranks that share the experts; this rank holds num_experts / ep_size of them.
        ep_rank: this rank's place among them, `rank % ep_size` as DeepSpeed groups ranks.
        seed: of the weights.
        activation_checkpointing: what blocks keep for the backward pass (model/recompute.py); the results are equal.
        cross_entropy: how the loss is computed (model/loss.py); the results are equal to rounding.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        ep_size: int = 1,
        ep_rank: int = 0,
        seed: int = 0,
        activation_checkpointing: ActivationCheckpointing = "none",
        cross_entropy: CrossEntropy = "chunked",
    ) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = (
            RMSNorm(config.hidden_size, config.norm_affine) if config.embedding_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            Block(config, layer, ep_size, activation_checkpointing) for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_affine)
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.logit_softcap, cross_entropy)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        cos_SR, sin_SR = rotary_tables(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("rotary_cos", cos_SR, persistent=False)
        self.register_buffer("rotary_sin", sin_SR, persistent=False)
        initialize_weights(self, seed, ep_rank)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, earlier_ME: Tensor | None = None) -> tuple[Tensor, Stats]:
        """Training loss and statistics of tokens and their next tokens, both int64 [B, S], S <= seq_len.

        earlier_ME: this rank's tokens per expert, by MoE layer, over the earlier micro-steps of the optimizer step, for
        moe.aux_loss_scope "global_batch". An argument and not a state: what is computed again counts nothing twice.
        """
        x_BSD, routing = self._hidden(tokens_BS, earlier_ME)
        with part("head and loss"):
            loss = self.lm_head(x_BSD, targets_BS)
        stats = collect_stats(loss, (targets_BS != IGNORED_TARGET).sum(), routing)
        moe = self.config.moe
        if moe is not None and moe.has_aux_loss:
            loss = loss + moe.aux_loss_coeff * torch.stack([layer.aux_loss for layer in routing]).sum()
        if moe is not None and moe.z_loss_coeff:
            loss = loss + moe.z_loss_coeff * torch.stack([layer.z_loss for layer in routing]).sum()
        return loss, stats

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of every next token, fp32."""
        return self.lm_head(self._hidden(tokens_BS)[0])

    def _hidden(self, tokens_BS: Tensor, earlier_ME: Tensor | None = None) -> tuple[Tensor, list[RoutingStats]]:
        S = tokens_BS.shape[1]
        if S > self.config.seq_len:
            raise ValueError(f"{S} tokens exceed seq_len={self.config.seq_len}, for which the rotary tables are made")
        rotary = (self.rotary_cos[:S], self.rotary_sin[:S])
        x_BSD = self.embedding_norm(self.token_embedding(tokens_BS))
        routing: list[RoutingStats] = []
        for block in self.blocks:
            earlier_E = None
            if earlier_ME is not None and isinstance(block.mlp, MoELayer):
                earlier_E = earlier_ME[len(routing)]
            with part(BLOCK):
                x_BSD, stats = block(x_BSD, tokens_BS, rotary, earlier_E)
            if stats is not None:
                routing.append(stats)
        return self.final_norm(x_BSD), routing

    @torch.no_grad()
    def generate(
        self, prompt: list[int], num_tokens: int, seed: int, temperature: float = 0.8, top_k: int = 50
    ) -> list[int]:
        """Sample `num_tokens` after `prompt`; the context slides when it exceeds seq_len.

        Always the same number of forward passes, so that expert-parallel ranks that call it together stay in step.
        """
        device = self.token_embedding.weight.device
        generator = torch.Generator(device="cpu").manual_seed(seed)
        tokens = list(prompt)
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-self.config.seq_len :]], device=device)
            scores, candidates = (self.logits(context)[0, -1].cpu() / temperature).topk(
                min(top_k, self.config.vocab_size)
            )
            choice = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            tokens.append(int(candidates[choice]))
        return tokens[len(prompt) :]


def collect_stats(cross_entropy: Tensor, num_targets: Tensor, routing: list[RoutingStats]) -> Stats:
    """Stack the layers' statistics; a dense model has none and gets empty tensors."""
    if not routing:
        empty = num_targets.new_zeros(0)
        return Stats(
            cross_entropy.detach(),
            num_targets,
            aux_loss_M=empty.float(),
            z_loss_M=empty.float(),
            entropy_M=empty.float(),
            tokens_per_expert_ME=empty.view(0, 0),
            dropped_M=empty,
        )
    return Stats(
        cross_entropy.detach(),
        num_targets,
        torch.stack([layer.aux_loss.detach() for layer in routing]),
        torch.stack([layer.z_loss.detach() for layer in routing]),
        torch.stack([layer.entropy for layer in routing]),
        torch.stack([layer.tokens_per_expert_E for layer in routing]),
        torch.stack([layer.dropped for layer in routing]),
    )


# --- weights --------------------------------------------------------------------------------------------------------

LOCAL_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")


def global_name(name: str, ep_rank: int, num_local_experts: int) -> str:
    """A parameter's name with its expert counted over all ranks instead of this one."""
    return LOCAL_EXPERT.sub(lambda found: f".deepspeed_experts.{ep_rank * num_local_experts + int(found[1])}.", name)


@torch.no_grad()
def initialize_weights(model: GPT, seed: int, ep_rank: int) -> None:
    """Give every parameter its first value, a function of (seed, its global name, its shape) and of nothing else.

    So neither the order of modules, nor the number of ranks, nor how experts are stored changes a weight, and no two
    experts start equal (deepspeed 0.19.8 moe/experts.py copies one expert).
    """
    num_local = next((m.num_local_experts for m in model.modules() if isinstance(m, MoELayer)), 0)
    for name, parameter in named_matrices(model):
        key = f"{seed}/{global_name(name, ep_rank, num_local)}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        initialize(name, parameter, model.config, generator)


def named_matrices(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name; of stacked experts each expert's part (a view), by the name it has in a state dict."""
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, StackedExperts)}
    for name, parameter in model.named_parameters():
        parent, _, kind = name.rpartition(".")
        if parent in stacks:
            yield from zip(stacks[parent].names(f"{parent}.", kind), parameter, strict=True)
        else:
            yield name, parameter


def initialize(name: str, parameter: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Output projections and gates start at zero: every block is the identity and routing is even at step 0. Other
    matrices have variance 1/fan_in, embeddings 1, as in nanochat."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("o_proj", "w2", "wg", "value_gate"):
        parameter.zero_()
    elif kind in ("q_proj", "k_proj", "v_proj", "w1"):
        bound = (3 / parameter.shape[1]) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif kind == "value_embedding":
        bound = (3 / config.hidden_size) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif kind == "token_embedding":
        # A tied matrix is also the head: a token's logit for itself starts at std * hidden_size, and must be small.
        parameter.normal_(0.0, 1 / config.hidden_size if config.tie_embeddings else 1.0, generator=generator)
    elif kind == "lm_head":
        parameter.normal_(0.0, 0.001, generator=generator)
    else:
        assert kind.endswith("norm"), f"no rule for the first value of {name}"
        parameter.fill_(1.0)
