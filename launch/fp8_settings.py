"""Which FP8 settings a run may use, and which would be impossible, without effect or silently something else."""

from __future__ import annotations

from typing import Any

from launch.zero_settings import zero_stage
from model.config import FP8_WIDTHS, ConfigError, CrossEntropy, FP8Config, ModelConfig


def refuse_fp8_settings(fp8: FP8Config, model: ModelConfig, cross_entropy: CrossEntropy, tree: dict[str, Any]) -> None:
    """Raise ConfigError for FP8 settings that cannot work with this model, loss or ZeRO stage."""
    if not fp8.enabled:
        return
    if zero_stage(tree) == 3:
        raise ConfigError(
            "run.fp8.enabled=true is not supported at zero_optimization.stage=3, which takes weights away between the "
            "passes. Use stage 1 or 2."
        )
    if fp8.experts:
        refuse_expert_settings(fp8, model)
    widths = {"hidden_size": model.hidden_size}
    if fp8.experts and model.moe is not None:
        widths["moe.ffn_hidden_size"] = model.moe.ffn_hidden_size
    if fp8.lm_head:
        widths["vocab_size"] = model.vocab_size
    for name, width in widths.items():
        if width % FP8_WIDTHS:
            raise ConfigError(
                f"run.model.{name}={width} is not a multiple of {FP8_WIDTHS}, which FP8 products need. "
                f"Use {width // FP8_WIDTHS * FP8_WIDTHS + FP8_WIDTHS}, or no run.fp8 for it."
            )
    if fp8.lm_head:
        refuse_head_settings(fp8, cross_entropy)
    widest = max(reduced_widths(fp8, model))
    if widest < fp8.min_reduced_width:
        raise ConfigError(
            f"run.fp8.min_reduced_width={fp8.min_reduced_width} converts nothing: of what is asked for, N*K/(N+K) is "
            f"{widest:.0f} at the most. Use a smaller one, or remove run.fp8."
        )


def reduced_widths(fp8: FP8Config, model: ModelConfig) -> list[float]:
    """N*K/(N+K) of the matrices that are asked for; of a layer's experts that of the narrower of their two."""
    rows_of = 2 if model.activation == "swiglu" else 1

    def mlp(ffn_hidden_size: int) -> list[tuple[int, int]]:
        return [(rows_of * ffn_hidden_size, model.hidden_size), (model.hidden_size, ffn_hidden_size)]

    def reduced(shapes: list[tuple[int, int]]) -> list[float]:
        return [n * k / (n + k) for n, k in shapes]

    found = []
    if fp8.experts and model.moe is not None:
        found.append(min(reduced(mlp(model.moe.ffn_hidden_size))))
    if fp8.dense:
        found += reduced([(model.hidden_size, model.hidden_size), *mlp(model.ffn_hidden_size or model.hidden_size)])
        if model.moe is not None and model.moe.num_shared_experts:
            found += reduced(mlp(model.moe.shared_ffn_hidden_size))
    if fp8.lm_head:
        found += reduced([(model.vocab_size, model.hidden_size)])
    return found


def refuse_expert_settings(fp8: FP8Config, model: ModelConfig) -> None:
    if model.moe is None:
        raise ConfigError(
            "run.fp8.experts=true has no effect without run.model.moe. Set it to false, and run.fp8.dense to true."
        )
    looped, dropless = model.moe.expert_backend == "loop", model.moe.capacity_factor == 0
    if fp8.recipe == "tensorwise" and not looped:
        raise ConfigError(
            "run.fp8.recipe='tensorwise' has no product for all experts at once. Use 'rowwise_with_gw_hp', or "
            "run.model.moe.expert_backend='loop'."
        )
    if fp8.recipe == "rowwise" and dropless and not looped:
        raise ConfigError(
            "run.fp8.recipe='rowwise' with run.model.moe.capacity_factor=0.0: torchao's operator takes "
            f"groups of a multiple of {FP8_WIDTHS} rows, and dropless ones have any size. Use 'rowwise_with_gw_hp', or "
            "a capacity."
        )
    if fp8.casts == "triton" and (looped or fp8.recipe != "rowwise_with_gw_hp"):
        what = "run.model.moe.expert_backend='loop'" if looped else f"run.fp8.recipe={fp8.recipe!r}"
        raise ConfigError(f"run.fp8.casts='triton' has no effect with {what}, where torchao casts. Remove it.")


def refuse_head_settings(fp8: FP8Config, cross_entropy: CrossEntropy) -> None:
    if cross_entropy == "liger":
        raise ConfigError(
            "run.fp8.lm_head=true with run.train.cross_entropy='liger', which multiplies in bf16. Use 'chunked'."
        )
    if cross_entropy == "chunked" and fp8.recipe != "rowwise_with_gw_hp":
        raise ConfigError(
            f"run.fp8.lm_head=true with run.fp8.recipe={fp8.recipe!r} and run.train.cross_entropy='chunked', whose FP8 "
            "products are 'rowwise_with_gw_hp'. Use that recipe, or 'plain'."
        )
