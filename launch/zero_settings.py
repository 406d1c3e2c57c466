"""Which of DeepSpeed's ZeRO settings a run may use, and what the rest of moelab asks about them.

    stage  partitioned among the ranks that hold a copy       with experts
    0      nothing                                            refused: wrong gradient norm
    1      optimizer states                                   yes
    2      and gradients                                      yes
    3      and weights, gathered block by block when needed   refused: DeepSpeed's MoE layer does not run under it

offload_optimizer moves optimizer states and their update to the host (stages 1 to 3), offload_param the weights (3).
"""

from __future__ import annotations

import json
from typing import Any

from model.config import ActivationCheckpointing, ConfigError

LIMITS = (
    "stage3_max_live_parameters max_live_parameters stage3_max_reuse_distance max_reuse_distance"  # two names each
).split()


def zero_stage(deepspeed: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


def offloads(deepspeed: dict[str, Any], section: str = "offload_optimizer") -> bool:
    """Whether `section` (offload_optimizer or offload_param) of a DeepSpeed configuration moves it off the device."""
    return deepspeed.get("zero_optimization", {}).get(section, {}).get("device", "none") != "none"


def refuse_zero_settings(tree: dict[str, Any], moe: bool, activation_checkpointing: ActivationCheckpointing) -> None:
    """Refuse ZeRO settings that DeepSpeed would ignore, get wrong or end with a traceback in this run."""
    stage = zero_stage(tree)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={json.dumps(stage)}: should be 0, 1, 2 or 3.")
    if stage == 0 and moe:
        raise ConfigError(
            "zero_optimization.stage=0 averages the ranks' gradient norms, so with experts the norm and its clipping "
            "depend on their placement (deepspeed 0.19.8). Use 1 or 2."
        )
    if stage == 3 and moe:
        raise ConfigError(
            "zero_optimization.stage=3 is not supported: DeepSpeed's MoE layer does not run under ZeRO-3. Use 1 or 2."
        )
    for name in ("contiguous_gradients", "reduce_scatter"):
        if moe and tree.get("zero_optimization", {}).get(name) is False:
            raise ConfigError(
                f"zero_optimization.{name}=false is not supported with experts: deepspeed 0.19.8 then trains shared "
                "experts on wrong gradients, or refuses. Remove it."
            )
    if stage == 3:
        refuse_at_stage_3(tree, activation_checkpointing)
    refuse_offload(tree, stage)


def refuse_at_stage_3(tree: dict[str, Any], activation_checkpointing: ActivationCheckpointing) -> None:
    if activation_checkpointing == "selective":
        # Seen with models of more than stage3_max_live_parameters: the second pass gathers and splits other weights
        # than the first, and torch's selective checkpointing allows no operator that the first pass did not apply.
        raise ConfigError(
            "run.train.activation_checkpointing='selective' is not supported at zero_optimization.stage=3: ZeRO-3 "
            "gathers weights while a block is computed again. Use 'block' or 'none', or stage 1 or 2."
        )
    for name in ("stage3_module_granularity_threshold", "module_granularity_threshold"):
        threshold = tree["zero_optimization"].get(name, 0)
        if threshold:
            raise ConfigError(
                f"zero_optimization.{name}={json.dumps(threshold)} is not supported: the backward pass of a module "
                "that is gathered as a whole fails (deepspeed 0.19.8). Remove it."
            )
    for name in LIMITS:
        limit = tree["zero_optimization"].get(name, 0)
        if type(limit) not in (int, float) or limit < 0:
            raise ConfigError(f"zero_optimization.{name}={json.dumps(limit)}: should be a number of parameters.")


def refuse_offload(tree: dict[str, Any], stage: int) -> None:
    for name, lowest_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        if not offloads(tree, name):
            continue
        device = tree["zero_optimization"][name]["device"]
        setting = f"zero_optimization.{name}.device={json.dumps(device)}"
        if device == "nvme":
            raise ConfigError(f"{setting} is not supported: DeepSpeed compiles its disk access. Use 'cpu'.")
        if device != "cpu":
            raise ConfigError(f"{setting}: should be 'cpu' or 'none'.")
        if stage < lowest_stage:
            others = "1, 2 or 3" if lowest_stage == 1 else "3"
            raise ConfigError(
                f"{setting} has no effect at zero_optimization.stage={stage}. Remove it, or use stage {others}."
            )
    if offloads(tree) and tree.get("zero_force_ds_cpu_optimizer", True) is not False:
        raise ConfigError(
            'zero_optimization.offload_optimizer.device="cpu": DeepSpeed would insist on its own Adam, which it '
            'compiles at start-up; the optimizer here is torch\'s. State "zero_force_ds_cpu_optimizer": false.'
        )
    dtype = tree.get("data_types", {}).get("grad_accum_dtype")
    if offloads(tree) and stage == 1 and dtype is not None:
        raise ConfigError(
            f"data_types.grad_accum_dtype={json.dumps(dtype)} has no effect with offload_optimizer at "
            "zero_optimization.stage=1 (deepspeed 0.19.8). Remove it, or use stage 2."
        )
