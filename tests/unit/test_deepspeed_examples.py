"""Files in the shape of DeepSpeed's own examples are accepted as they are; most run with a `run` section added.

Written after the configurations of DeepSpeedExamples (cifar, Hugging Face with ZeRO-2 and 3), Megatron-DeepSpeed (GPT
and MoE) and DeepSpeed's documentation of monitors, profilers and Muon, with numbers of our own.
"""

from __future__ import annotations

import copy
from typing import Any

import deepspeed.runtime.config as ds_config
import pytest

from launch.deepspeed_keys import check_deepspeed_keys
from launch.run_config import resolve

LOSS_SCALING = {
    "loss_scale": 0,
    "loss_scale_window": 500,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "initial_scale_power": 11,
}
BUCKETS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 50_000_000,
    "reduce_scatter": True,
    "reduce_bucket_size": 50_000_000,
    "overlap_comm": True,
    "contiguous_gradients": True,
}
ADAMW = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}

# With a batch of 8 in micro-batches of 2, clipping, AdamW, no scheduler, and nothing that moelab lacks.
RUNS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "steps_per_print": 2000,
        "prescale_gradients": False,
        "bf16": {"enabled": False},
        "fp16": {
            "enabled": False,
            "fp16_master_weights_and_grads": False,
            "loss_scale": 0,
            "loss_scale_window": 500,
            "hysteresis": 2,
            "min_loss_scale": 1,
            "initial_scale_power": 15,
        },
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 0,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 50_000_000,
            "reduce_bucket_size": 50_000_000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "cpu_offload": False,
        },
    },
    "megatron_moe": {
        "steps_per_print": 10,
        "zero_optimization": {"stage": 1, "elastic_checkpoint": False, **BUCKETS},
        "prescale_gradients": False,
        "fp16": {"enabled": False, **LOSS_SCALING},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
        "data_efficiency": {
            "enabled": False,
            "seed": 1234,
            "data_routing": {"enabled": False, "random_ltd": {"enabled": False}},
        },
    },
    "megatron_zero2": {
        "steps_per_print": 1,
        "zero_optimization": {"stage": 2, **BUCKETS, "round_robin_gradients": True, "ignore_unused_parameters": True},
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "memory_breakdown": False,
        "dump_state": False,
        "activation_checkpointing": {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
            "number_checkpoints": None,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    },
    "huggingface_zero2": {
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, **BUCKETS, "cpu_offload": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 100,
        "wall_clock_breakdown": False,
        "torch_autocast": {"enabled": False},
    },
    "monitors_and_profilers": {
        "zero_optimization": {"stage": 1},
        "bfloat16": {"enabled": False},
        "tensorboard": {"enabled": False, "output_path": "runs/tensorboard/", "job_name": "moe"},
        "csv_monitor": {"enabled": False, "output_path": "runs/csv/", "job_name": "moe"},
        "wandb": {"enabled": False, "group": "ablation", "project": "moe"},
        "comet": {"enabled": False, "project": "moe"},
        "flops_profiler": {
            "enabled": False,
            "profile_step": 5,
            "module_depth": -1,
            "top_modules": 3,
            "detailed": True,
            "output_file": None,
        },
        "autotuning": {"enabled": False, "results_dir": "autotuning_results", "exps_dir": "autotuning_exps"},
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1},
        "checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False},
    },
}
for example in RUNS.values():
    example |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}
    example["optimizer"] = ADAMW

# What moelab refuses later for what it says, never for a key that it does not know.
KEYS_ONLY: dict[str, dict[str, Any]] = {
    "cifar10_with_its_scheduler": {
        **RUNS["cifar10"],
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
        },
    },
    "megatron_fp16": {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 10,
        "zero_optimization": {"stage": 0, "elastic_checkpoint": True},
        "gradient_clipping": 1.0,
        "prescale_gradients": True,
        "fp16": {"enabled": True, **LOSS_SCALING},
        "bf16": {"enabled": False},
        "wall_clock_breakdown": False,
    },
    "huggingface_zero2_offload": {
        "fp16": {"enabled": True, **LOSS_SCALING},
        "optimizer": ADAMW,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 1000, "warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 100},
        },
        "zero_optimization": {"stage": 2, **BUCKETS, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
    },
    "huggingface_zero3": {
        "bf16": {"enabled": True},
        "optimizer": ADAMW,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1_000_000_000,
            "reduce_bucket_size": 1_000_000,
            "stage3_prefetch_bucket_size": 900_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_clipping": 1.0,
        "steps_per_print": 2000,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "wall_clock_breakdown": False,
    },
    "muon": {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {
            "type": "Muon",
            "params": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "muon_lr": 0.02, "adam_lr": 3e-4},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_scatter": False},
    },
}
RUN_SECTION = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_len": 16,
        "vocab_size": 64,
    },
    "data": {"train": "synthetic"},
    "train": {"num_steps": 10},
}


@pytest.mark.parametrize("name", [*RUNS, *KEYS_ONLY])
def test_an_example_of_deepspeed_is_accepted_as_it_is(name: str) -> None:
    example = copy.deepcopy((RUNS | KEYS_ONLY)[name])
    check_deepspeed_keys(example, our_keys=())
    ds_config.DeepSpeedConfig(example)  # and it is one: the installed DeepSpeed reads it


@pytest.mark.parametrize("name", RUNS)
def test_an_example_is_a_run_file_with_nothing_but_a_run_section_added(name: str) -> None:
    example = copy.deepcopy(RUNS[name])
    run = resolve({**example, "run": RUN_SECTION})
    assert run.num_steps == 10
    assert run.deepspeed == example, "and DeepSpeed gets what the file says"
