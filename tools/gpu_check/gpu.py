"""The GPU, and the software on it."""

from __future__ import annotations

import torch

from launch.gpu_monitor import describe_gpu
from model.flops import peak_flops
from tools.gpu_check.child import Context, Row


def environment(case: str, context: Context) -> None:
    """One row. Where torch sees no GPU it says so, which ends the check."""
    row: Row = {
        "what": "environment",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus_visible": torch.cuda.device_count(),
    }
    if context.device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "peak_flops": peak_flops(properties.name),
            **describe_gpu(str(properties.uuid)),
        }
        row.pop("pci_bus_id", None)
    context.add(row)
