"""Save a training state so that nothing short of a broken disk loses it, and load it into any topology.

    copy      all ranks copy what they own to the host; training goes on
    write     each rank writes and hashes its file in a thread, in saving_step_00000100/
    publish   when all have, rank 0 writes manifest.json, makes all of it durable, and renames the folder;
              then `latest` names it; then older checkpoints than the last keep_last are removed

A save that is cut short at any point leaves `latest` and what it names as they were. A load checks every byte against
the manifest, reads numbers only, and lets every rank read what it needs, whatever ranks have written it.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import CheckpointError
from model.files import sync_folder, write_durably
from model.manifest import (
    LATEST,
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    Piece,
    RankFacts,
    Stored,
    TensorFacts,
    TrainingState,
    joined,
    read_manifest,
    verify_file,
    write_manifest,
)
from model.partition import MUON_MOMENT, Span, TrainingPartition
from model.phases import reached
from model.tensor_files import DTYPE_NAMES, DTYPES, open_tensors, write_tensors

BUFFER = "buffer"
SAVING, REPLACED = "saving_", "replaced_"  # before a folder's name: being written, and making room for its successor
POLL_SECONDS = 0.02
ALIVE_SECONDS = 5.0  # between signs of life while training waits for a save


# --- saving -----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Saves one checkpoint at a time, in the background where the hosts have memory for the copy.

    Args:
        folder: checkpoints/ of the run folder, which all ranks see.
        keep_last: how many of the newest stay. Those of later steps, of a branch that was abandoned, are not counted.
        off_line: those that did not lead to what is saved: damaged, or of an abandoned branch. They are not counted
            once they are passed either, since no fallback may be one, and go when what is older goes.
    """

    def __init__(self, folder: Path, keep_last: int, off_line: Iterable[str] = ()) -> None:
        self.folder, self.keep_last, self.off_line = folder, keep_last, set(off_line)
        self.current: Save | None = None  # that `wait` has not seen the end of
        self.newest: Save | None = None
        self.stall_s = 0.0  # that training has waited for saves, in all
        self.last_save_s = 0.0  # from the request until `latest` named it, of the last one; on rank 0

    def save(self, partition: TrainingPartition, name: str, state: TrainingState) -> None:
        """Save under folder/name. All ranks call this; it returns when the state may change again.

        Raises what went wrong with the last save or this one, the same on all ranks, OSError for a full disk.
        """
        began = time.monotonic()
        self.wait()
        reached("save: copy")
        spans = list(partition.spans())
        background = prepare_folder(self.folder, name, sum(bytes_of(span) for span in spans))
        tensors, facts = tensors_of(spans, partition.buffers() if dist.get_rank() == 0 else {}, copy=background)
        self.off_line.discard(name)
        steps = sorted(partition.optimizer_steps())
        save = Save(self.folder, name, state, self.keep_last, frozenset(self.off_line), facts, steps, began)
        save.start(tensors)
        self.current = self.newest = save
        if not background:
            self.wait()
        self.stall_s += time.monotonic() - began

    def wait(self) -> None:
        """Until the last save is durable. All ranks call this, and all raise if it failed on one."""
        save = self.current
        if save is None:
            return
        try:
            save.await_event(save.written)
            error = first_error(save.error)
            if error is None:
                save.await_event(save.published)
                error = first_error(save.error)
        finally:  # a peer may be gone: what rank 0 is publishing then is as good as before
            self.current = None
        if error is not None:
            if save.rank == 0:
                shutil.rmtree(save.saving, ignore_errors=True)
            raise error
        self.last_save_s = save.seconds

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the last save has failed; `wait` raises why, on all ranks."""
        return self.current is not None and self.current.error is not None

    def finish_alone(self, timeout_s: float) -> bool:
        """Wait for this rank's part of the last save, on rank 0 until it is published, without the other ranks.

        Returns whether it is done, and without an error: also one that `wait` has raised.
        """
        save = self.newest
        return save is None or (save.published.wait(timeout_s) and save.error is None)


class Save:
    """One save: what a thread of each rank writes, and a thread of rank 0 publishes."""

    def __init__(
        self,
        folder: Path,
        name: str,
        state: TrainingState,
        keep_last: int,
        off_line: frozenset[str],
        facts: dict[str, TensorFacts],
        optimizer_steps: list[float],
        began: float,
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.folder, self.saving, self.name = folder, folder / f"{SAVING}{name}", name
        self.state, self.keep_last, self.off_line = state, keep_last, off_line
        self.facts, self.optimizer_steps = facts, optimizer_steps
        self.began, self.seconds = began, 0.0
        self.written, self.published = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.chunks = 0  # written so far

    def await_event(self, event: threading.Event) -> None:
        """Wait in the main thread, and say that something is being done as long as something is."""
        seen = -1
        while not event.wait(ALIVE_SECONDS):
            if self.chunks != seen:
                seen = self.chunks
                reached("save: wait")

    def note_chunk(self) -> None:
        self.chunks += 1

    def start(self, tensors: dict[str, Tensor]) -> None:
        threading.Thread(target=self._run, args=(tensors,), name="checkpoint", daemon=True).start()

    def _run(self, tensors: dict[str, Tensor]) -> None:
        try:
            reached("save: write")
            file = file_of(self.rank)
            size, sha256 = write_tensors(self.saving / file, tensors, self.note_chunk)
            tensors.clear()
            own = RankFacts(
                file=file, bytes=size, sha256=sha256, tensors=self.facts, optimizer_steps=self.optimizer_steps
            )
            write_durably(self.description(self.rank), own.model_dump_json().encode())
            self.written.set()
            if self.rank == 0:
                self._publish()
            self.seconds = time.monotonic() - self.began
        except BaseException as error:  # of any kind: `wait` raises it
            self.error = error
        finally:
            self.written.set()
            self.published.set()

    def description(self, rank: int) -> Path:
        """What a rank says of its file: with the last of them, all files are there."""
        return self.saving / f"rank_{rank:05d}.json"

    def _publish(self) -> None:
        """Wait for all ranks' files, and make the folder a checkpoint. A rank that fails never describes its file:
        `wait` learns of it, and removes the folder."""
        told = [self.description(rank) for rank in range(self.ranks)]
        while not all(path.exists() for path in told):
            if not self.saving.exists():  # removed by `wait`, which has raised, or by another run in this folder
                raise FileNotFoundError(errno.ENOENT, "removed while it was being written", str(self.saving))
            time.sleep(POLL_SECONDS)
        reached("save: manifest")
        ranks = [RankFacts.model_validate_json(path.read_bytes()) for path in told]
        write_manifest(self.saving, joined(ranks, self.state, datetime.now(UTC).isoformat(timespec="seconds")))
        for path in told:
            path.unlink()
        sync_folder(self.saving)
        publish(self.folder, self.saving, self.name)
        reached("save: retention")
        remove_old(self.folder, self.name, self.keep_last, self.off_line)


def prepare_folder(folder: Path, name: str, size: int) -> bool:
    """Make room and the folder for a save of `size` bytes from this rank; whether the hosts have memory for copies.

    All ranks call this.
    """
    error = None
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, (socket.gethostname(), size, available_memory()))
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)  # the run folder's own files, without which no checkpoint is found
            with suppress(PermissionError):  # a folder that we may not list was not made by this run
                sync_folder(folder.parent.parent)
            clear_leftovers(folder)
            refuse_full_disk(folder, sum(size for _, size, _ in facts))
            (folder / f"{SAVING}{name}").mkdir()
        except OSError as failure:
            error = failure
    raise_on_all_ranks(error)
    for host in {host for host, *_ in facts}:
        needed = sum(size for other, size, _ in facts if other == host)
        available = min(memory for other, _, memory in facts if other == host)
        if 2 * needed > available:
            return False
    return True


def file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def tensors_of(
    spans: list[Span], buffers: dict[str, Tensor], copy: bool
) -> tuple[dict[str, Tensor], dict[str, TensorFacts]]:
    """What this rank saves: tensors by their key in the file, and where they belong.

    Unless copied to the host, they are the engine's own, and must not change until they are written.
    """
    file = file_of(dist.get_rank())
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}

    def add(name: str, kind: str, shape: list[int], start: int, values: Tensor) -> None:
        tensors[key_of(name, kind, start)] = host_copy(values) if copy else values
        kinds = facts.setdefault(name, {"shape": shape, "kinds": {}})["kinds"]
        stored = kinds.setdefault(kind, {"dtype": DTYPE_NAMES[values.dtype], "pieces": []})
        stored["pieces"].append(Piece(file=file, start=start, numel=values.numel()))

    for span in spans:
        values = span.values[span.owned]
        if values.numel():
            add(span.name, span.kind, list(span.shape), span.start + span.owned.start, values)
    for name, buffer in buffers.items():
        add(name, BUFFER, list(buffer.shape), 0, buffer.reshape(-1))
    return tensors, {
        name: TensorFacts(shape=fact["shape"], kinds={kind: Stored(**kinds) for kind, kinds in fact["kinds"].items()})
        for name, fact in facts.items()
    }


def host_copy(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device="cpu").copy_(values)


def bytes_of(span: Span) -> int:
    return (span.owned.stop - span.owned.start) * span.values.element_size()


def key_of(name: str, kind: str, start: int) -> str:
    return f"{name}:{kind}:{start}"


def publish(folder: Path, saving: Path, name: str) -> None:
    """Give the durable folder `saving` its name, in place of a checkpoint of that name, and let `latest` name it."""
    reached("save: rename")
    final, replaced = folder / name, folder / f"{REPLACED}{name}"
    if final.exists():
        final.replace(replaced)
    saving.replace(final)
    sync_folder(folder)
    reached("save: latest")
    write_durably(folder / LATEST, name.encode())
    shutil.rmtree(replaced, ignore_errors=True)


def name_latest(checkpoint: Path) -> None:
    """Let `latest` name another checkpoint that is there: whoever continues the run continues from that one."""
    write_durably(checkpoint.parent / LATEST, checkpoint.name.encode())


def clear_leftovers(folder: Path) -> None:
    """Remove what a save that was cut short has left; a checkpoint that was to be replaced, and was not, stays.

    What cannot be removed yet (a file that is open elsewhere on NFS) is left to the next time.
    """
    for replaced in folder.glob(f"{REPLACED}*"):
        final = folder / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.replace(final)
    for remains in folder.glob(f"{SAVING}*"):
        shutil.rmtree(remains, ignore_errors=True)


def remove_old(folder: Path, newest: str, keep_last: int, off_line: frozenset[str]) -> None:
    """Keep the last keep_last whole checkpoints up to `newest`. A folder goes under another name: never half."""
    names = sorted(path.name for path in folder.glob("step_*") if path.is_dir() and path.name <= newest)
    whole = [name for name in names if name not in off_line and (folder / name / MANIFEST).exists()]
    oldest = whole[-keep_last:][0]
    for name in [name for name in names if name < oldest]:
        (folder / name).replace(folder / f"{SAVING}{name}")
        shutil.rmtree(folder / f"{SAVING}{name}", ignore_errors=True)


def refuse_full_disk(folder: Path, size: int) -> None:
    """Raise OSError (ENOSPC) before anything is written if `size` bytes have no room."""
    free = shutil.disk_usage(folder).free
    if size > free:
        why = f"a checkpoint of {size / 2**30:.2f} GiB does not fit into {free / 2**30:.2f} GiB"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {why}", str(folder))


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise the error of the first rank that has one, on every rank. All ranks call this."""
    first = first_error(error)
    if first is not None:
        raise first


def first_error(error: BaseException | None) -> BaseException | None:
    """The error of the first rank that has one, on every rank. All ranks call this."""
    if error is not None and not isinstance(error, OSError | CheckpointError):  # it may not travel
        error = RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((first for first in errors if first is not None), None)


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this host could still give, within the limit of this container if there is one.

    What a container uses includes the pages of files that it has read and written, which the kernel gives back.
    """
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024.0 * int(line.split()[1])
    limit = cgroup / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, float(limit.read_text()) - used)
    return available


# --- loading ----------------------------------------------------------------------------------------------------------


def choose_checkpoint(folder: Path, names: list[str], expected: TrainingState) -> tuple[str, Manifest, list[str]]:
    """The first of `names` that is whole, its manifest, and a line for each that is not. All ranks call this.

    Every file is read once, by one of the ranks, and compared with its hash.

    Args:
        names: checkpoints in the order of preference.
        expected: this run's data and configuration; the topology may differ.

    Raises CheckpointError, the same on all ranks, if none is whole, or the first that is belongs to other data.
    """
    damaged: list[str] = []
    refusal = None
    if dist.get_rank() == 0:
        try:
            clear_leftovers(folder)  # which may be a checkpoint that was about to be replaced
        except OSError as failure:
            refusal = CheckpointError(f"{folder}: cannot be written to ({failure}). Give this user access to it.")
    raise_on_all_ranks(refusal)
    for name in names:
        error, manifest = None, None
        try:
            manifest = read_manifest(folder / name)
            if name != f"step_{manifest.state.step:08d}":
                raise DamagedCheckpoint(f"{folder / name}: holds step {manifest.state.step}. Give it its name back.")
            refuse_foreign(folder / name, manifest, expected)
            for i, (file, facts) in enumerate(sorted(manifest.files.items())):
                if i % dist.get_world_size() == dist.get_rank():
                    verify_file(folder / name, file, facts)
        except CheckpointError as failure:
            error = failure
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        first = next((each for each in errors if each is not None), None)
        if first is None:
            assert manifest is not None
            return name, manifest, damaged
        if not isinstance(first, DamagedCheckpoint):
            raise first
        damaged.append(str(first))
    if len(damaged) == 1:
        raise DamagedCheckpoint(damaged[0])
    raise DamagedCheckpoint(
        f"{folder}: no checkpoint is whole. {' '.join(damaged)} Restore one, or use another --run_dir to begin afresh."
    )


def refuse_foreign(checkpoint: Path, manifest: Manifest, expected: TrainingState) -> None:
    """Raise CheckpointError if a checkpoint was saved by a run with other data or another configuration."""
    for key, way_out in (
        ("data_fingerprint", "Restore the token files it was trained on"),
        ("config_hash", "It belongs to another run: use its own --run_dir"),
    ):
        saved, running = getattr(manifest.state, key), getattr(expected, key)
        if saved != running:
            raise CheckpointError(
                f"{checkpoint}: was saved with {key}={saved}, this run has {key}={running}. {way_out}."
            )


def load_checkpoint(partition: TrainingPartition, checkpoint: Path, manifest: Manifest) -> None:
    """Load a verified checkpoint into the engine, whatever topology saved it. All ranks call this.

    Raises CheckpointError if its tensors are not those of the model.
    """
    refuse_other_tensors(partition, checkpoint, manifest)
    kinds = {name: set(tensor.kinds) for name, tensor in manifest.tensors.items()}
    muon = {tensor.kinds[MUON_MOMENT].dtype for tensor in manifest.tensors.values() if MUON_MOMENT in tensor.kinds}
    partition.make_moments(kinds, DTYPES[muon.pop()] if muon else None, manifest.optimizer_steps)
    with Reader(checkpoint, manifest) as reader, partition.only_parts(), torch.no_grad():
        for span in (*partition.spans(), *partition.model_weights()):
            reached("load")
            reader.read(span.name, span.kind, span.start, span.values)
        for name, buffer in partition.buffers().items():
            reader.read(name, BUFFER, 0, buffer.view(-1))


def refuse_other_tensors(partition: TrainingPartition, checkpoint: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless the checkpoint has the model's tensors, in its shapes, and no other."""
    model = {place.name: list(place.shape) for place in partition.places.values()}
    model |= {name: list(buffer.shape) for name, buffer in partition.buffers().items()}
    for name in sorted(model.keys() | manifest.tensors.keys()):
        saved = manifest.tensors[name].shape if name in manifest.tensors else None
        if saved != model.get(name):
            raise CheckpointError(
                f"{checkpoint}: {name} has the shape {saved} there and {model.get(name)} in this model. "
                "Resume with the run file that it was saved with."
            )


class Reader:
    """Reads elements of a checkpoint's tensors, out of whichever files hold them."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self.files: dict[str, Any] = {}
        self.opened = ExitStack()

    def __enter__(self) -> Reader:
        for name in self.manifest.files:
            self.files[name] = self.opened.enter_context(open_tensors(self.checkpoint / name))
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

    def read(self, name: str, kind: str, start: int, into: Tensor) -> None:
        """Fill the 1-d tensor `into` with elements start, start + 1, ... of a flattened tensor, in its own type."""
        filled = 0
        for piece in self.manifest.tensors[name].kinds[kind].pieces:
            first, last = max(start, piece.start), min(start + into.numel(), piece.start + piece.numel)
            if first < last:
                saved = self.files[piece.file].get_slice(key_of(name, kind, piece.start))
                into[first - start : last - start] = saved[first - piece.start : last - piece.start]
                filled += last - first
        assert filled == into.numel(), f"{name} ({kind}): {filled} of {into.numel()} elements from {start}"


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, values) of everything in a checkpoint, whole tensors in fp32 or the type of the moment."""
    manifest = read_manifest(checkpoint)
    with Reader(checkpoint, manifest) as reader:
        for name, tensor in manifest.tensors.items():
            for kind, stored in tensor.kinds.items():
                values = torch.empty(tensor.numel, dtype=DTYPES[stored.dtype])
                reader.read(name, kind, 0, values)
                yield name, kind, values.view(tensor.shape)
