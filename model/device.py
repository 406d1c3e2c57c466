"""The device that this process computes on, and how torch was built and set for it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def on_gpu() -> bool:
    """Whether this run computes on a GPU; a machine with GPUs may run on its CPU (DS_ACCELERATOR=cpu)."""
    return deepspeed.get_accelerator().device_name() == "cuda"


def own_gpu() -> dict[str, str]:
    """This rank's GPU: name and UUID."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "uuid": str(properties.uuid)}


def torch_settings() -> dict[str, Any]:
    """Of torch's build and settings those that move numbers or speed. What this build lacks is absent."""
    nccl = on_gpu() and dist.is_nccl_available()
    settings = {
        "git_version": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    return {name: value for name, value in settings.items() if value is not None}
