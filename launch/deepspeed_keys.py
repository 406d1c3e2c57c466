"""The keys that DeepSpeed 0.19.8 reads from its JSON file, so that a misspelt one is refused before torch is imported.

DeepSpeed itself ignores an unknown key at the top level: `gradient_cliping` trains without the clipping that was asked
for. A test compares these tables with the installed DeepSpeed; an upgrade that adds or drops a key fails there.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, NoReturn

from model.config import ConfigError

# A key is a value (None) or a section: an object with its own keys. The inside of ANY_SECTION is not tabulated.
Keys = dict[str, "Keys | None"]
ANY_SECTION: Keys = {}


def values(names: str) -> Keys:
    """Keys that hold a value: a number, string, boolean or list."""
    return dict.fromkeys(names.split())


OFFLOAD_PARAM = values("device nvme_path buffer_count buffer_size max_in_cpu pin_memory")
OFFLOAD_OPTIMIZER = values(
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
    "cpuadam_cores_perc"
)
ZENFLOW = values(
    "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio full_warm_up_rounds "
    "pt_reserved_cores_perc steps_per_epoch"
)
ZERO_OPTIMIZATION: Keys = {
    **values(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
        "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
        "elastic_checkpoint sub_group_size cpu_offload cpu_offload_param cpu_offload_use_pin_memory "
        "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory stage3_gather_fp16_weights_on_model_save"
    ),
    # each of these has a second name
    **values(
        "prefetch_bucket_size stage3_prefetch_bucket_size "
        "param_persistence_threshold stage3_param_persistence_threshold "
        "model_persistence_threshold stage3_model_persistence_threshold "
        "max_live_parameters stage3_max_live_parameters "
        "max_reuse_distance stage3_max_reuse_distance "
        "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
        "module_granularity_threshold stage3_module_granularity_threshold "
        "use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params "
        "allgather_sequential stage3_allgather_sequential"
    ),
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ZENFLOW,
    "leaf_module": values("classes names name_suffixes"),
}
BF16 = values("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states")
FP16 = values(
    "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads"
)
EXPERT_PARALLEL = values(
    "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
    "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale "
    "score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin "
    "comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff "
    "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
    "shared_experts_pattern shared_experts_gate_pattern expert_activation"
)
CHECKPOINT: Keys = {
    **values("tag_validation checkpoint_serialization load_universal use_node_local_storage"),
    "parallel_write": values("pipeline_stage"),
    "writer": values("type decoupled io_buffer_size io_buffer_double show_statistics data_parallel io_multiplier"),
}
COMPILE = values(
    "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
    "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters "
    "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
    "keep_all_input_tensors passes"
)

KNOWN_KEYS: Keys = {
    **values(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
        "gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op communication_data_type "
        "seq_parallel_communication_data_type disable_allgather zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level "
        "disable_python_gc dataloader_drop_last vocabulary_size use_data_before_expert_parallelism "
        "data_parallel_size sequence_parallel_size"
    ),
    "zero_optimization": ZERO_OPTIMIZATION,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "torch_autocast": values("enabled dtype lower_precision_safe_modules"),
    "data_types": values("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "optimizer": {**values("type legacy_fusion"), "params": ANY_SECTION},
    "scheduler": {**values("type"), "params": ANY_SECTION},
    "activation_checkpointing": values(
        "partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary "
        "profile cpu_checkpointing"
    ),
    "checkpoint": CHECKPOINT,
    "compile": COMPILE,
    "expert_parallel": EXPERT_PARALLEL,
    "aio": values("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "timers": {"throughput": values("enabled synchronized")},
    "flops_profiler": values("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    "comms_logger": values("enabled prof_all prof_ops verbose debug"),
    "tensorboard": values("enabled output_path job_name"),
    "csv_monitor": values("enabled output_path job_name"),
    "wandb": values("enabled group team project"),
    "comet": values(
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"
    ),
    "autotuning": ANY_SECTION,
    "data_efficiency": ANY_SECTION,
    "datastates_ckpt": ANY_SECTION,
    "hybrid_engine": ANY_SECTION,
    "pipeline": ANY_SECTION,
    "tensor_parallel": ANY_SECTION,
    "weight_quantization": ANY_SECTION,
}

# Keys that DeepSpeed 0.19.8 itself refuses, with a traceback, because their feature is gone.
REMOVED_KEYS = (
    "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients zero_optimization.mics_shard_size "
    "zero_optimization.mics_hierarchical_params_gather zero_optimization.zeropp_loco_param"
).split()

# Old names that DeepSpeed still reads. Two names for one setting: the rest of moelab looks at one. An old name that is
# switched off says nothing, and stands in many files; beside the new name deepspeed 0.19.8 fails, whatever it says.
RENAMED_KEYS = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}

# Keys that DeepSpeed reads and that would do nothing here, or something that the rest of moelab does not know of. A
# section of these that is switched off may stay.
UNSUPPORTED_KEYS = {
    "activation_checkpointing": "run.train.activation_checkpointing says what blocks keep",
    "compile": "engine.compile is not called, so it would have no effect",
    "data_types.buffer_dtype": "it would round the rotary tables, which stay in fp32",
    "data_types.param_dtype": "bf16 says the precision",
    "aio": "nothing is moved to NVMe, so it would have no effect",
    "weight_quantization": "it is for models that DeepSpeed serves",
    "seq_parallel_communication_data_type": "sequences are not split among ranks",
    "zero_optimization.leaf_module": "it is for models with experts under ZeRO-3",
    "gradient_allreduce_op": "gradients are averaged over the ranks",
    "managed_gradient_accumulation": "accumulation is DeepSpeed's to count",
    "optimizer.legacy_fusion": "the optimizer is torch's AdamW, so it would have no effect",
    "torch_autocast": "bf16 says the precision",
    "autotuning": "it starts runs of its own",
    "data_efficiency": "batches come from run.data, so it would have no effect",
    "dataloader_drop_last": "batches come from run.data, so it would have no effect",
    "data_parallel_size": "it follows from the number of ranks",
    "hybrid_engine": "it is for models that DeepSpeed generates with",
    "pipeline": "the model has no pipeline stages, so it would have no effect",
    "sequence_parallel_size": "sequences are not split among ranks",
    "tensor_parallel": "layers are not split among ranks",
    "use_data_before_expert_parallelism": "expert-parallel groups are neighbouring ranks",
    "vocabulary_size": "run.model.vocab_size says it",
    **{
        f"zero_optimization.{section}.{name}": "nothing is moved to NVMe, so it would have no effect"
        for section, names in (
            ("offload_optimizer", "nvme_path buffer_count pipeline_read pipeline_write fast_init"),
            ("offload_param", "nvme_path buffer_count buffer_size max_in_cpu"),
        )
        for name in names.split()
    },
    **{
        f"zero_optimization.{name}": "it needs DeepSpeed's own CPU Adam, and the optimizer is torch's"
        for name in (
            "zenflow",
            "offload_optimizer.ratio",
            "offload_optimizer.super_offload",
            "offload_optimizer.cpuadam_cores_perc",
        )
    },
    **{
        f"zero_optimization.{name}": "communication in fewer bits would be another experiment"
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    },
    "zero_optimization.compute_grad_norm": "every run logs its gradient norm, and skips an update if it is not finite",
    "zero_optimization.legacy_stage1": "deepspeed 0.19.8 has no other stage 1",
}

# Keys that may say what they would say by default, and why nothing else.
DEFAULT_ONLY: dict[str, tuple[Any, str]] = {
    **{
        name: (default, "gradients are averaged over the ranks, and ZeRO-1 would ignore it")
        for name, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0))
    },
    "disable_allgather": (False, "weights are gathered by ZeRO"),
    "bf16.check_grad_overflow": (True, "an update that is not finite would be applied"),
    **{
        f"bf16.{name}": (False, "the optimizer keeps weights and moments in fp32")
        for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    },
    "checkpoint.load_universal": (False, "DeepSpeed's universal checkpoints do not hold experts"),
    "checkpoint.use_node_local_storage": (False, "a checkpoint is one folder that all ranks see"),
    "zero_optimization.elastic_checkpoint": (False, "deepspeed 0.19.8 saves with it what it cannot resume"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, "ZeRO-1 and 2 keep it there anyway"),
}
BOOLEANS = [
    *"disable_python_gc dump_state memory_breakdown wall_clock_breakdown zero_allow_untested_optimizer".split(),
    *(
        f"zero_optimization.{name}"
        for name in (
            "allgather_partitions contiguous_gradients ignore_unused_parameters load_from_fp32_weights overlap_comm "
            "reduce_scatter round_robin_gradients use_multi_rank_bucket_allreduce"
        ).split()
    ),
]
SIZES = ["steps_per_print", "zero_optimization.allgather_bucket_size", "zero_optimization.reduce_bucket_size"]
DTYPE_KEYS, DTYPES = ("communication_data_type", "data_types.grad_accum_dtype"), ("fp32", "float32", "bf16", "bfloat16")


def check_deepspeed_keys(tree: dict[str, Any], our_keys: tuple[str, ...]) -> None:
    """Refuse keys of `tree`, DeepSpeed's part of a run file, that DeepSpeed does not read or a run cannot use.

    `our_keys` may stand beside DeepSpeed's. Raises ConfigError, one line, that names the key by its full path.
    """
    known: Keys = {**dict.fromkeys(our_keys, ANY_SECTION), **KNOWN_KEYS}
    check_section(tree, known, parent="")


def check_section(section: dict[str, Any], known: Keys, parent: str) -> None:
    for name, value in section.items():
        key = f"{parent}.{name}" if parent else name
        if key in REMOVED_KEYS:
            raise ConfigError(f"{key} is refused by deepspeed 0.19.8: its feature was removed. Remove it.")
        if name not in known:
            refuse_unknown(key, list(known))
        if key in RENAMED_KEYS and not (is_switched_off(value) and new_names(key).isdisjoint(section)):
            raise ConfigError(f"{key} is an old name. Use {RENAMED_KEYS[key]}.")
        if key in UNSUPPORTED_KEYS and not (isinstance(value, dict) and is_switched_off(value)):
            raise ConfigError(f"{key} is not supported: {UNSUPPORTED_KEYS[key]}. Remove it.")
        inner = known[name]
        if inner is None and isinstance(value, dict):
            raise ConfigError(f"{key}={json.dumps(value)}: should be a value, not an object.")
        if inner is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}={json.dumps(value)}: should be an object. Remove it, or write {{...}}.")
        if inner:
            check_section(value, inner, key)


def check_deepspeed_values(tree: dict[str, Any], parent: str = "") -> None:
    """Refuse values of known keys that DeepSpeed would end with a traceback for, or that a run cannot use."""
    for name, value in tree.items():
        key = f"{parent}.{name}" if parent else name
        stated = f"{key}={json.dumps(value)}"
        if isinstance(value, dict):
            check_deepspeed_values(value, key)
        if key in DEFAULT_ONLY and value != DEFAULT_ONLY[key][0]:
            default, why = DEFAULT_ONLY[key]
            raise ConfigError(f"{stated} is not supported: {why}. Remove it, or use {json.dumps(default)}.")
        if key in BOOLEANS and not isinstance(value, bool):
            raise ConfigError(f"{stated}: should be true or false.")
        if key in SIZES and not (is_number(value) and value >= 1):
            raise ConfigError(f"{stated}: should be a number of at least 1.")
        if key in DTYPE_KEYS and value not in DTYPES:
            raise ConfigError(f"{stated}: should be 'fp32' or 'bf16'.")


def new_names(key: str) -> set[str]:
    """What may stand for an old key in its own section; a ZeRO-3 setting also has a name without its prefix."""
    name = RENAMED_KEYS[key].rpartition(".")[2]
    return {name, name.removeprefix("stage3_")}


def is_switched_off(value: object) -> bool:
    """Whether a setting asks for nothing: false, null, or a section that is not enabled or holds nothing else."""
    if isinstance(value, dict):
        return value.get("enabled") is False or (bool(value) and all(map(is_switched_off, value.values())))
    return value is False or value is None


def refuse_unknown(key: str, known: list[str]) -> NoReturn:
    """Refuse an unknown key, with the nearest known name or the list of them."""
    parent, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        hint = f"Did you mean {parent}.{near[0]}?" if parent else f"Did you mean {near[0]}?"
    elif parent:
        hint = f"Known here: {', '.join(sorted(known))}."
    else:
        hint = "DeepSpeed has none of that name; what is moelab's own stands under run."
    raise ConfigError(f"{key} is not a known key. {hint}") from None


def stated(section: dict[str, Any], name: str, way_out: str, parent: str = "") -> Any:
    """The value of a key that has no default here."""
    if section.get(name) is None:
        raise ConfigError(f"{parent}{name} is missing. {way_out}")
    return section[name]


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
