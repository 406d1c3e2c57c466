"""Check a checkpoint without a run, and write it anew in as many files as another topology has ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import SAVING, Reader, key_of
from model.config import CheckpointError
from model.files import sync_folder
from model.manifest import (
    Manifest,
    Piece,
    RankFacts,
    Stored,
    TensorFacts,
    joined,
    read_manifest,
    verify_file,
    write_manifest,
)
from model.tensor_files import DTYPES, write_tensors

EXPERTS = ".deepspeed_moe.experts."  # in the names of stacks [E, ...]


def verify(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint all of whose bytes are what it says; raises CheckpointError for one that is not."""
    manifest = read_manifest(checkpoint)
    for name, facts in sorted(manifest.files.items()):
        verify_file(checkpoint, name, facts)
    return manifest


def reshard(source: Path, out: Path, ranks: int, ep_size: int = 1, zero_stage: int | None = None) -> Manifest:
    """Write the checkpoint `source` to the new folder `out`, a file for each of `ranks`, and compare every tensor.

    Experts go to the files of the ranks that hold them under ep_size; all else is split evenly. zero_stage is what the
    new manifest says, by default what the old one does. Raises CheckpointError, and leaves nothing behind.
    """
    manifest = verify(source)
    refuse_topology(manifest, ranks, ep_size)
    if out.exists():
        raise CheckpointError(f"--out {out}: exists. Name a new folder.")
    topology = {"world_size": ranks, "ep_size": ep_size}
    topology |= {} if zero_stage is None else {"zero_stage": zero_stage}
    unfinished = out.with_name(SAVING + out.name)
    unfinished.mkdir(parents=True)
    try:
        with Reader(source, manifest) as reader:
            facts = [write_rank(reader, unfinished, rank, ranks, ep_size) for rank in range(ranks)]
        written = joined(facts, manifest.state.model_copy(update=topology), manifest.saved)
        write_manifest(unfinished, written)
        refuse_difference(source, unfinished)
        unfinished.replace(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written


def refuse_topology(manifest: Manifest, ranks: int, ep_size: int) -> None:
    if ranks < 1 or ep_size < 1 or ranks % ep_size:
        raise CheckpointError(f"--ep_size {ep_size} does not divide --ranks {ranks}. Use one that does.")
    for name, tensor in manifest.tensors.items():
        if EXPERTS in name and tensor.shape[0] % ep_size:
            raise CheckpointError(
                f"--ep_size {ep_size} does not divide the {tensor.shape[0]} experts of {name}. Use one that does."
            )


def write_rank(reader: Reader, folder: Path, rank: int, ranks: int, ep_size: int) -> RankFacts:
    """Write one rank's share of everything that `reader` has."""
    file = f"rank_{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    facts: dict[str, TensorFacts] = {}
    for name, tensor in reader.manifest.tensors.items():
        start, end = share(tensor, rank, ranks, ep_size if EXPERTS in name else 1)
        kinds = {}
        for kind, stored in tensor.kinds.items():
            if start < end:
                tensors[key_of(name, kind, start)] = values = torch.empty(end - start, dtype=DTYPES[stored.dtype])
                reader.read(name, kind, start, values)
                kinds[kind] = Stored(dtype=stored.dtype, pieces=[Piece(file=file, start=start, numel=end - start)])
        if kinds:
            facts[name] = TensorFacts(shape=tensor.shape, kinds=kinds)
    size, sha256 = write_tensors(folder / file, tensors)
    steps = [reader.manifest.optimizer_steps]
    return RankFacts(file=file, bytes=size, sha256=sha256, tensors=facts, optimizer_steps=steps)


def share(tensor: TensorFacts, rank: int, ranks: int, ep_size: int) -> tuple[int, int]:
    """First and end element: an even part of what the rank's expert-parallel group of ranks has in common."""
    whole = tensor.numel // ep_size
    begin, part, parts = rank % ep_size * whole, rank // ep_size, ranks // ep_size
    return begin + part * whole // parts, begin + (part + 1) * whole // parts


def refuse_difference(source: Path, written: Path) -> None:
    """Raise CheckpointError unless two checkpoints have the same tensors, bit for bit."""
    old, new = verify(source), verify(written)
    with Reader(source, old) as reader, Reader(written, new) as other:
        for name, tensor in old.tensors.items():
            for kind, stored in tensor.kinds.items():
                ours, theirs = (torch.empty(tensor.numel, dtype=DTYPES[stored.dtype]) for _ in range(2))
                reader.read(name, kind, 0, ours)
                other.read(name, kind, 0, theirs)
                if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                    raise CheckpointError(f"{written}: {name} ({kind}) differs from {source}. Nothing was written.")
