"""What a model is: the `run.model` section of a run file, and the errors that users meet.

Only pydantic and the standard library are imported, so that a head node can read, count and refuse a model without
torch.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

ActivationCheckpointing = Literal["none", "block", "selective"]  # what they mean stands in model/recompute.py
CompileMode = Literal["static", "dynamic", "none"]  # what they mean stands in model/compiling.py
CrossEntropy = Literal["plain", "chunked", "liger"]  # what they mean stands in model/loss.py
FP8Recipe = Literal["rowwise_with_gw_hp", "rowwise", "tensorwise"]  # torchao's; what they mean stands in model/fp8.py
FP8Casts = Literal["torch", "triton"]  # model/fp8_casts.py, model/fp8_kernels.py
AuxLossScope = Literal["micro_batch", "sequence", "global_batch"]  # what they mean stands in model/router.py
FP8_WIDTHS = 16  # the FP8 products take matrices whose both sides are multiples of this
CROSS_ENTROPY_CHUNK = 1024  # tokens whose logits are in memory at a time under "chunked"


class ConfigError(ValueError):
    """A run file or command line that cannot work. The message names key=value, the rule and the way out."""


class DataError(ValueError):
    """Token files, manifests or tokenizers that are missing, damaged or do not belong together."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, or belongs to another run or topology."""


class Section(BaseModel):
    """Base of every section under `run`: unknown keys are refused, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def without_effect(self) -> dict[str, str]:
        """Keys that nothing reads, given the other keys, and why. To state one is refused; a dump leaves them out."""
        return {}

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> Self:
        for name, why in self.without_effect().items():
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)} has no effect {why}")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self.without_effect()
        return {name: value for name, value in dump(self).items() if name not in unused}


class MoEConfig(Section):
    """`run.model.moe`: which blocks have experts, how tokens reach them, how their load is balanced."""

    num_experts: int = Field(ge=1)  # in a layer, over all ranks
    top_k: int = Field(default=2, ge=1)  # experts that a token goes to
    layer_freq: int = Field(default=1, ge=1)  # every layer_freq-th block has experts, the last block of each such run
    ffn_hidden_size: int = Field(ge=1)  # width of an expert
    num_shared_experts: int = Field(default=0, ge=0)  # of that width, for every token, beside those it is routed to
    score_func: Literal["softmax", "sigmoid"] = "softmax"  # what makes scores of the router's logits
    norm_topk_prob: bool = True  # gates: scores over the sum of the chosen; default with top_k 1: false
    routed_scaling_factor: float = Field(default=1.0, gt=0)  # of the gates
    num_groups: int = Field(default=1, ge=1)  # of num_experts / num_groups experts in order
    top_k_groups: int = Field(default=1, ge=1)  # groups that a token's experts come from
    capacity_factor: float = Field(default=1.0, ge=0)  # slots of an expert over tokens * top_k / experts; 0: dropless
    eval_capacity_factor: float = Field(default=0.0, ge=0)  # 0: val/bpb must not depend on the batch around it
    min_capacity: int = Field(default=4, ge=1)  # slots of an expert at the least
    drop_policy: Literal["position", "probability"] = "position"  # who stays: the first tokens, or the largest gates
    expert_backend: Literal["bmm", "grouped", "loop"] = "bmm"  # how experts compute; default when dropless: grouped
    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"  # what keeps the load of the experts even
    aux_loss_coeff: float = Field(default=0.02, ge=0)  # weight of the sum of the layers' auxiliary losses; with bias: 0
    aux_loss_scope: AuxLossScope = "micro_batch"  # whose load: a micro-batch's, each sequence's, all ranks' step so far
    bias_update_rate: float = Field(default=1e-3, gt=0)  # of the selection bias, once per step (arXiv 2412.19437)
    z_loss_coeff: float = Field(default=0.0, ge=0)  # weight of the sum of the layers' z-losses (arXiv 2202.08906)
    force_balanced: bool = False  # for benchmarks: experts in turn, whatever the scores; results say so

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_other_keys(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            return stated
        defaults = {
            "expert_backend": "grouped" if stated.get("capacity_factor") == 0 else "bmm",
            "norm_topk_prob": stated.get("top_k") != 1,
        }
        if stated.get("balance") == "bias":
            defaults["aux_loss_coeff"] = 0.0
        return stated | {name: value for name, value in defaults.items() if stated.get(name) is None}

    @property
    def shared_ffn_hidden_size(self) -> int:
        """Width of the shared experts together."""
        return self.num_shared_experts * self.ffn_hidden_size

    @property
    def has_aux_loss(self) -> bool:
        return self.balance != "none" and self.aux_loss_coeff > 0

    @property
    def aux_over_global_batch(self) -> bool:
        """Whether a micro-step's loss needs the load of the step's earlier ones."""
        return self.has_aux_loss and self.aux_loss_scope == "global_batch"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"top_k={self.top_k} exceeds num_experts={self.num_experts}. Use a top_k of at most {self.num_experts}."
            )
        if self.top_k == 1 and self.norm_topk_prob:
            raise ConfigError(
                "norm_topk_prob=true with top_k=1 divides every gate by itself: it is 1, and the loss does not reach "
                "the router. Use norm_topk_prob=false, or a larger top_k."
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}. "
                f"Use one of {divisors(self.num_experts, self.num_experts)}."
            )
        if self.top_k_groups > self.num_groups:
            raise ConfigError(
                f"top_k_groups={self.top_k_groups} exceeds num_groups={self.num_groups}. Use at most {self.num_groups}."
            )
        if self.num_groups > 1 and self.top_k % self.top_k_groups:
            raise ConfigError(
                f"top_k_groups={self.top_k_groups} does not divide top_k={self.top_k}: a group is judged by its "
                f"top_k / top_k_groups best experts. Use one of {divisors(self.top_k, self.num_groups)}, "
                "or another top_k."
            )
        in_a_group = self.num_experts // self.num_groups
        if self.top_k > self.top_k_groups * in_a_group:
            raise ConfigError(
                f"top_k={self.top_k} exceeds the {self.top_k_groups * in_a_group} experts of "
                f"top_k_groups={self.top_k_groups} of num_groups={self.num_groups}. "
                "Use more top_k_groups, or fewer groups."
            )
        if self.expert_backend == ("bmm" if self.capacity_factor == 0 else "grouped"):
            needs, use = ("a capacity", "grouped") if self.capacity_factor == 0 else ("dropless routing", "bmm")
            raise ConfigError(
                f"expert_backend={self.expert_backend!r} needs {needs}, and capacity_factor={self.capacity_factor}. "
                f"Use {use!r} or 'loop', or another capacity_factor."
            )
        return self

    def without_effect(self) -> dict[str, str]:
        unused = {}
        if self.balance == "none":
            unused["aux_loss_coeff"] = "with balance='none'. Remove it, or use balance='aux_loss'."
        if not self.has_aux_loss:
            unused["aux_loss_scope"] = "without an auxiliary loss. Remove it, or set aux_loss_coeff."
        if self.balance != "bias":
            unused["bias_update_rate"] = f"with balance={self.balance!r}. Remove it, or use balance='bias'."
        if self.capacity_factor == 0 and self.eval_capacity_factor == 0:
            unused |= dict.fromkeys(
                ("drop_policy", "min_capacity"), "where nothing is dropped. Remove it, or set a capacity_factor."
            )
        if self.num_groups == 1:
            unused["top_k_groups"] = "with num_groups=1. Remove it, or divide the experts into num_groups."
        return unused


def divisors(of: int, at_most: int) -> str:
    return ", ".join(str(n) for n in range(1, min(of, at_most) + 1) if of % n == 0)


class ModelConfig(Section):
    """`run.model`: a decoder-only transformer, dense when `moe` is absent."""

    num_layers: int = Field(ge=1)  # transformer blocks
    hidden_size: int = Field(ge=1)  # width of the residual stream
    ffn_hidden_size: int | None = Field(default=None, ge=1)  # width of dense MLPs; required where there are any
    num_attention_heads: int = Field(ge=1)  # of hidden_size / num_attention_heads channels each
    num_kv_heads: int | None = Field(default=None, ge=1)  # default: num_attention_heads
    seq_len: int = Field(ge=1)  # tokens in a sequence
    vocab_size: int = Field(ge=2)  # token ids; at least those of the data
    activation: Literal["relu2", "swiglu"] = "relu2"  # of MLPs and experts: relu squared or SwiGLU
    norm_affine: bool = False  # RMSNorm with a weight per channel
    embedding_norm: bool = True  # RMSNorm right after the token embedding
    qk_norm: bool = True  # RMSNorm of queries and keys
    value_embeddings: bool = False  # of tokens, added to the values in every second block
    logit_softcap: float | None = Field(default=None, gt=0)  # logits bent into (-softcap, softcap) by tanh
    tie_embeddings: bool = False  # the head is the token embedding
    rope_theta: float = Field(default=10000.0, gt=0)  # base of the rotary frequencies
    moe: MoEConfig | None = None  # without it the model is dense

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def value_gate_size(self) -> int:
        """Channels of the block's input that the value-embedding gate reads (nanochat's 32, fewer in tiny models)."""
        return min(32, self.hidden_size)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) has experts: with layer_freq 2 these are blocks 1, 3, 5 ..."""
        return self.moe is not None and (layer + 1) % self.moe.layer_freq == 0

    def has_value_embedding(self, layer: int) -> bool:
        """Every second block has a value embedding, the last one included."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_moe_layer(layer)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}. "
                f"Use a hidden_size such as {self.hidden_size // heads * heads + heads}, or other heads."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} over num_attention_heads={heads} gives heads of {self.head_dim}; "
                "rotary embedding rotates pairs. Use an even head size."
            )
        if heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_attention_heads={heads}. "
                f"Use one of {divisors(heads, heads)}."
            )
        if self.moe is not None and not self.moe_layers:
            raise ConfigError(
                f"moe.layer_freq={self.moe.layer_freq} leaves none of the num_layers={self.num_layers} blocks with "
                f"experts. Use a layer_freq of at most {self.num_layers}, or remove moe."
            )
        dense_layers = self.num_layers - len(self.moe_layers)
        if dense_layers and self.ffn_hidden_size is None:
            raise ConfigError(
                f"ffn_hidden_size is missing, but {dense_layers} of {self.num_layers} blocks have a dense MLP. "
                "State its width."
            )
        if not dense_layers and self.ffn_hidden_size is not None:
            raise ConfigError(
                f"ffn_hidden_size={self.ffn_hidden_size} has no effect: every block has experts "
                f"(moe.layer_freq=1). Remove it, or set moe.ffn_hidden_size for the width of an expert."
            )
        return self


class FP8Config(Section):
    """`run.fp8`: which matrix products are in FP8. Router, norms and embeddings never are, nor is validation."""

    enabled: bool = False  # whether any is
    experts: bool = True  # those of the experts
    dense: bool = False  # attention projections, dense MLPs and shared experts
    lm_head: bool = False  # the head, where the loss is computed
    recipe: FP8Recipe = "rowwise_with_gw_hp"  # of scales and types; rowwise: torchao's grouped operator for experts
    casts: FP8Casts = "torch"  # of the experts: plain torch, to be compiled, or Triton kernels for a GPU
    min_reduced_width: float = Field(default=0.0, ge=0)  # of an N x K matrix: it stays in bf16 if N*K/(N+K) is below

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enabled and not (self.experts or self.dense or self.lm_head):
            raise ConfigError(
                "enabled=true converts nothing: experts, dense and lm_head are false. Ask for one, or remove it."
            )
        return self

    def without_effect(self) -> dict[str, str]:
        if not self.enabled:
            off = "with enabled=false. Remove it, or set enabled to true."
            return {name: off for name in FP8Config.model_fields if name != "enabled"}
        if not self.experts:
            return {"casts": "with experts=false. Remove it, or set experts to true."}
        return {}
