"""Files of named tensors in the safetensors format: they hold numbers and names, and nothing that could be executed.

Written here in one pass, which hashes what it writes and leaves the interpreter free for the training thread meanwhile
(the package's own writer holds it); read by the package, piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], note_chunk: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write tensors, durably, and call `note_chunk` after each. Returns the file's bytes and its SHA-256.

    Those of a GPU come to the host one by one.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned to its type
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    start: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    with open(path, "wb") as file:
        for chunk in chain(start, (bytes_of(tensor) for _, tensor in ordered)):
            file.write(chunk)
            digest.update(chunk)
            note_chunk()
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The file as safetensors' reader. Raises CheckpointError if it cannot be read as one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Resume from another step.") from None


def hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
