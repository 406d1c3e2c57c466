"""What a checkpoint says of itself: manifest.json, which names its files, their hashes, and where every tensor lies.

    checkpoints/step_00000100/   rank_00000.safetensors, ... one for every rank that saved; manifest.json
    checkpoints/latest           names the newest

A tensor has kinds: the fp32 "weight", the moments of its optimizer, or, if it is no parameter, "buffer". Each is
cut into pieces, consecutive elements of the flattened tensor, that lie in the files under the key NAME:KIND:START.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model.config import CheckpointError
from model.files import write_durably
from model.tensor_files import hash_of_file

MANIFEST, LATEST = "manifest.json", "latest"
FORMAT = "moelab checkpoint 1"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are missing, cut short or changed. An older one may be whole."""


class Facts(BaseModel):
    """Base of what stands in a manifest: nothing is coerced, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TrainingState(Facts):
    """Besides tensors, all that a run must remember, and what it was when it did."""

    step: int  # optimizer steps done
    samples: int  # sequences consumed by all ranks: the position in the data order
    world_size: int
    ep_size: int
    zero_stage: int
    config_hash: str
    data_fingerprint: str
    guard: dict[str, Any] = {}  # what the guard of the gradients remembers


class FileFacts(Facts):
    """Size and hash of a file of tensors."""

    bytes: int
    sha256: str


class Piece(Facts):
    """Consecutive elements of a flattened tensor, and the file that holds them."""

    file: str
    start: int
    numel: int


class Stored(Facts):
    """One kind of a tensor: its type in safetensors' words, and its pieces in their order."""

    dtype: str
    pieces: list[Piece]


class TensorFacts(Facts):
    """A tensor of the whole model."""

    shape: list[int]
    kinds: dict[str, Stored]

    @property
    def numel(self) -> int:
        return prod(self.shape)


class RankFacts(Facts):
    """What one rank has saved."""

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, TensorFacts]
    optimizer_steps: list[float]  # the counts of updates that its parameters have


class Manifest(Facts):
    """A whole checkpoint."""

    format: str = FORMAT
    saved: str  # time, UTC
    state: TrainingState
    optimizer_steps: float  # AdamW's count of updates; less than `step` where some were skipped
    files: dict[str, FileFacts]
    tensors: dict[str, TensorFacts]


def joined(ranks: list[RankFacts], state: TrainingState, saved: str) -> Manifest:
    """The manifest of what all ranks have saved. Raises RuntimeError unless every element was saved once."""
    tensors: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            whole = tensors.setdefault(name, {"shape": tensor.shape, "kinds": {}})
            for kind, own in tensor.kinds.items():
                pieces = whole["kinds"].setdefault(kind, {"dtype": own.dtype, "pieces": []})["pieces"]
                pieces.extend(piece.model_dump() for piece in own.pieces)
    for whole in tensors.values():
        for stored in whole["kinds"].values():
            stored["pieces"].sort(key=lambda piece: piece["start"])
    steps = {count for rank in ranks for count in rank.optimizer_steps}
    if len(steps) > 1:
        raise RuntimeError(f"parameters have had different numbers of updates: {sorted(steps)}")
    manifest = Manifest(
        saved=saved,
        state=state,
        optimizer_steps=steps.pop() if steps else 0.0,
        files={rank.file: FileFacts(bytes=rank.bytes, sha256=rank.sha256) for rank in ranks},
        tensors={name: TensorFacts.model_validate(tensors[name]) for name in sorted(tensors)},
    )
    if gap := incomplete_tensor(manifest):
        raise RuntimeError(f"the ranks have not saved every element once: {gap}")
    return manifest


def incomplete_tensor(manifest: Manifest) -> str | None:
    """The first tensor whose pieces do not cover it exactly, in words."""
    for name, tensor in manifest.tensors.items():
        for kind, stored in tensor.kinds.items():
            end = 0
            for piece in stored.pieces:
                if piece.start != end or piece.file not in manifest.files:
                    return f"{name} ({kind}) at element {end} of {tensor.numel}"
                end += piece.numel
            if end != tensor.numel:
                return f"{name} ({kind}) at element {end} of {tensor.numel}"
    return None


# --- files ------------------------------------------------------------------------------------------------------------


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write manifest.json durably, with a hash of its own content."""
    content = manifest.model_dump(mode="json")
    write_durably(checkpoint / MANIFEST, json.dumps({"sha256": hash_of_json(content), **content}, indent=1).encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises DamagedCheckpoint if it is missing or is not what was written."""
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("sha256")
        if stated != hash_of_json(content):
            raise ValueError("its content is not what its hash says")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format is {content['format']!r}, this version reads {FORMAT!r}.")
        manifest = Manifest.model_validate(content)
    except FileNotFoundError:
        why = f"there is no {MANIFEST}" if checkpoint.is_dir() else "there is no such folder"
        raise DamagedCheckpoint(f"{checkpoint}: {why}. Resume from another step.") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "not as this version writes it" if isinstance(error, ValidationError) else str(error)
        raise DamagedCheckpoint(f"{path}: is damaged ({why}). Resume from another step.") from None
    if gap := incomplete_tensor(manifest):
        raise DamagedCheckpoint(f"{path}: is damaged ({gap}). Resume from another step.")
    return manifest


def verify_file(checkpoint: Path, name: str, facts: FileFacts) -> None:
    """Raise DamagedCheckpoint unless a file of tensors has the size and the hash of the manifest."""
    path = checkpoint / name
    try:
        size = path.stat().st_size
        if size != facts.bytes:
            raise DamagedCheckpoint(
                f"{path}: is damaged ({size:,} bytes instead of {facts.bytes:,}). Resume from another step."
            )
        found = hash_of_file(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror}). Resume from another step.") from None
    if found != facts.sha256:
        raise DamagedCheckpoint(f"{path}: is damaged (SHA-256 {found[:16]}... instead of {facts.sha256[:16]}...). "
                                "Resume from another step.")  # fmt: skip


def hash_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
