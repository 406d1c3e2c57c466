"""Save and load a training state through the DeepSpeed engine, so that a resumed run continues bit for bit.

checkpoints/step_00000100/   DeepSpeed's files, and moelab.json, written last: without it the folder is incomplete
checkpoints/latest           names the newest whole one; replaced after it is whole
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.config import CheckpointError
from model.data import write_durably

DESCRIPTION = "moelab.json"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says of itself. Besides weights and optimizer, `samples` is all that a run must remember."""

    step: int  # optimizer steps done
    samples: int  # sequences consumed by all ranks: the position in the data order
    world_size: int
    ep_size: int
    zero_stage: int
    data_fingerprint: str


def save_checkpoint(engine: Any, folder: Path, name: str, state: TrainingState, keep_last: int) -> None:
    """Save under folder/name, point `latest` at it, and keep the newest keep_last. All ranks call this.

    The folder gets its name when it is whole, so that a save that is cut short harms neither `latest` nor a checkpoint
    of the same name. Checkpoints of later steps (left by a branch that was abandoned) are not touched.
    """
    rank, unfinished = dist.get_rank(), f"saving_{name}"
    if rank == 0:
        for remains in folder.glob("saving_*"):
            shutil.rmtree(remains)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=unfinished, save_latest=False)
    dist.barrier()
    if rank == 0:
        write_durably(folder / unfinished / DESCRIPTION, (json.dumps(asdict(state), indent=2) + "\n").encode())
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        (folder / unfinished).replace(folder / name)
        write_durably(folder / "latest", name.encode())
        for old in [whole for whole in whole_checkpoints(folder) if whole <= name][:-keep_last]:
            shutil.rmtree(folder / old)
    dist.barrier()


def check_checkpoint(checkpoint: Path, expected: TrainingState) -> TrainingState:
    """Read what a checkpoint says of itself and refuse it unless this run can continue it. Loads nothing.

    Args:
        expected: the running topology, ZeRO stage and data; its step and samples are not compared.

    Raises CheckpointError if the checkpoint is incomplete or was saved under another topology: DeepSpeed would load
    another expert placement without an error and continue with the wrong expert weights (deepspeed 0.19.8).
    """
    state = read_description(checkpoint)
    for key, rule in (
        ("world_size", "Resume with as many ranks"),
        ("ep_size", "Resume with --set run.launch.ep_size="),
        ("zero_stage", "Resume with --set zero_optimization.stage="),
        ("data_fingerprint", "Restore the token files it was trained on"),
    ):
        saved, running = getattr(state, key), getattr(expected, key)
        if saved != running:
            way_out = f"{rule}{saved}" if rule.endswith("=") else rule
            raise CheckpointError(
                f"{checkpoint}: was saved with {key}={saved}, this run has {key}={running}. {way_out}."
            )
    return state


def load_checkpoint(engine: Any, folder: Path, name: str) -> None:
    """Load folder/name, which check_checkpoint accepted, into the engine. All ranks call this."""
    loaded, _ = engine.load_checkpoint(str(folder), tag=name)
    if loaded is None:
        raise CheckpointError(f"{folder / name}: DeepSpeed found nothing to load. Use another --resume step.")


def read_description(checkpoint: Path) -> TrainingState:
    """The state that a checkpoint folder describes; raises CheckpointError if it is missing or incomplete."""
    try:
        content = json.loads((checkpoint / DESCRIPTION).read_text(encoding="utf-8"))
        return TrainingState(**{field.name: content[field.name] for field in fields(TrainingState)})
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint}: has no {DESCRIPTION}, so its save was cut short. Resume from another step."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / DESCRIPTION}: is damaged ({error}). Resume from another step.") from None


def whole_checkpoints(folder: Path) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    return sorted(path.parent.name for path in folder.glob(f"step_*/{DESCRIPTION}"))
