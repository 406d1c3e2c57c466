"""Texts become the token files of both splits: by several processes, bit for bit as by one, and in parts.

    files -> chunks of documents, in order -> worker processes: hash, split, encode -> in order -> train.bin, val.bin
                                               after each PART_BYTES of text: fsync, then progress.json

A run that was killed goes on after the last part in progress.json. Every file grows at its end only, so whatever was
written after that part is cut off again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.config import DataError
from model.data import TokenFileWriter, Tokenizer, token_dtype
from model.files import write_durably
from model.text import Document, read_texts

SPLITS = ("train", "val")
PROGRESS_NAME = "progress.json"
CHUNK_CHARS = 1 << 20  # text that a worker encodes at a time
PART_BYTES = 64 << 20  # text between two states that a killed run can go on from


@dataclass(frozen=True)
class Texts:
    """What to encode, and how."""

    files: list[Path]
    text_key: str
    tokenizer: Path
    tokenizer_name: str  # what the user knows it by
    eod_token: str
    val_frac: float


class Place(NamedTuple):
    """The documents before it: those of files [0, file), and the first `document` of that file."""

    file: int
    document: int


START = Place(0, 0)


class Chunk(NamedTuple):
    """Documents that are encoded together."""

    texts: list[str]
    first: str  # the name of the first of them
    end: Place


class Encoded(NamedTuple):
    """Documents of one split, one after the other, each with its end-of-document token."""

    tokens: np.ndarray
    lengths: np.ndarray  # tokens of each document
    num_bytes: int  # UTF-8 bytes of the text


@dataclass
class Progress:
    """How far the token files of a folder have come."""

    place: Place = START
    done: bool = False
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # UTF-8 bytes of the text


def read_progress(folder: Path) -> Progress:
    """Where encoding into `folder` stopped; its start if it has not begun."""
    path = folder / PROGRESS_NAME
    if not path.is_file():
        return Progress()
    content = json.loads(path.read_bytes())
    return Progress(**{**content, "place": Place(*content["place"])})


def encode_splits(
    texts: Texts, folder: Path, workers: int, on_bytes: Callable[[int], None], on_part: Callable[[Progress], None]
) -> Progress:
    """Write train and val into `folder`, from where an earlier call stopped. Raises DataError as the readers do.

    `on_bytes` is told the bytes of text of every chunk that is written, `on_part` how far it is at every part saved.
    """
    progress = read_progress(folder)
    dtype = token_dtype(Tokenizer(texts.tokenizer, texts.eod_token).vocab_size)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                TokenFileWriter(folder / split, dtype, (progress.documents[split], progress.tokens[split]))
            )
            for split in SPLITS
            if not (folder / f"{split}.bin").exists()  # it has that name once nothing is left to do
        }
        if not progress.done:
            _encode_rest(texts, folder, writers, progress, workers, on_bytes, on_part)
    return progress


def _encode_rest(
    texts: Texts,
    folder: Path,
    writers: dict[str, TokenFileWriter],
    progress: Progress,
    workers: int,
    on_bytes: Callable[[int], None],
    on_part: Callable[[Progress], None],
) -> None:
    def save() -> None:
        for split, writer in writers.items():
            progress.documents[split], progress.tokens[split] = writer.sync()
        write_durably(folder / PROGRESS_NAME, json.dumps(asdict(progress)).encode("utf-8"))
        on_part(progress)

    bytes_in_part = 0
    with closing(_in_order(texts, progress.place, workers)) as chunks:  # its processes end with it, also on a fault
        for place, encoded in chunks:
            for split, found in encoded.items():
                writers[split].add_documents(found.tokens, found.lengths)
                progress.bytes[split] += found.num_bytes
            progress.place = place
            num_bytes = sum(found.num_bytes for found in encoded.values())
            on_bytes(num_bytes)
            bytes_in_part += num_bytes
            if bytes_in_part >= PART_BYTES:
                save()
                bytes_in_part = 0
    progress.done = True
    save()


def _chunks(texts: Texts, start: Place) -> Iterator[Chunk]:
    """The documents from `start` on that are not empty, in chunks of at least one."""
    chunk: list[str] = []
    first = ""
    num_chars = 0
    for file in range(start.file, len(texts.files)):
        for document, text in enumerate(read_texts(texts.files[file], texts.text_key)):
            if not text or (file == start.file and document < start.document):
                continue
            if not chunk:
                first = f"{texts.files[file]}, document {document + 1}"
            chunk.append(text)
            num_chars += len(text)
            if num_chars >= CHUNK_CHARS:
                yield Chunk(chunk, first, Place(file, document + 1))
                chunk, num_chars = [], 0
    if chunk:
        yield Chunk(chunk, first, Place(len(texts.files), 0))


def _in_order(texts: Texts, start: Place, workers: int) -> Generator[tuple[Place, dict[str, Encoded]]]:
    """Every chunk from `start` on, encoded, in order. At most two chunks a worker are waiting, each of them one
    document at least: memory grows with the longest, which MAX_DOCUMENT_BYTES bounds."""
    if workers == 1:
        encoder = Encoder(texts)
        for chunk in _chunks(texts, start):
            yield chunk.end, encoder.encode(chunk)
        return
    settings = replace(texts, files=[])  # workers get texts, not files
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (settings,))
    waiting: deque[tuple[Place, Future[dict[str, Encoded]]]] = deque()
    try:
        for chunk in _chunks(texts, start):
            waiting.append((chunk.end, pool.submit(_encode, chunk)))
            if len(waiting) == 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BaseException as fault:  # also Ctrl-C, and the end of whoever reads this
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # first: what they are at would be waited for below
        if isinstance(fault, BrokenProcessPool):
            raise DataError(
                "a worker process was killed, perhaps for want of memory. Run the same command with fewer --workers: "
                "it goes on after the last part that was finished."
            ) from fault
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Encoder:
    """Documents to token ids; what each worker process holds."""

    def __init__(self, texts: Texts) -> None:
        self.tokenizer = Tokenizer(texts.tokenizer, texts.eod_token)
        self.tokenizer_name = texts.tokenizer_name
        self.val_frac = texts.val_frac
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> dict[str, Encoded]:
        """Raises DataError if the first document does not come back: one in every chunk, for the time it takes."""
        documents = [Document.of(text) for text in chunk.texts]
        by_split: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for document in documents:
            by_split[document.split(self.val_frac)].append(document)
        encoded = {split: self._encode_split(members) for split, members in by_split.items()}
        found = encoded[documents[0].split(self.val_frac)]
        ids = found.tokens[: found.lengths[0] - 1].tolist()
        _refuse_loss(self.tokenizer_name, chunk.first, chunk.texts[0], self.tokenizer.decode(ids))
        return encoded

    def _encode_split(self, documents: list[Document]) -> Encoded:
        batch = self.tokenizer.encode_batch([document.text for document in documents])
        lengths = np.array([len(ids) + 1 for ids in batch], dtype=np.int32)
        tokens = np.empty(lengths.sum(), dtype=self.dtype)
        end = 0
        for ids in batch:
            start, end = end, end + len(ids) + 1
            tokens[start : end - 1] = ids
            tokens[end - 1] = self.tokenizer.eod_id
        return Encoded(tokens, lengths, sum(document.num_bytes for document in documents))


def _refuse_loss(tokenizer: str, document: str, text: str, decoded: str) -> None:
    """A space in front may come or go: many tokenizers put one there, so that a first word is like any other.

    And composed characters may take the place of decomposed ones (NFC, as Qwen's tokenizers do): no text is lost by it.
    """
    text, decoded = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", decoded)
    if text in (decoded, f" {decoded}") or decoded == f" {text}":
        return
    skipped = decoded.startswith(" ") and not text.startswith(" ")  # the space that was put there
    found = decoded[skipped:]
    pairs = enumerate(zip(text, found, strict=False))
    same = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(text), len(found)))
    lost = f"loses character {same} ({text[same]!r})" if same < len(text) else f"adds {found[same:][:8]!r} at its end"
    raise DataError(
        f"{tokenizer} {lost} of {document}: its tokens must give back the whole text, because val/bpb divides by the "
        "text's bytes. Take a byte-level tokenizer, or train one with --vocab_size."
    )


_encoder: Encoder | None = None  # of this process, if it is a worker: loading the tokenizer for each chunk is slow


def _start_worker(texts: Texts) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(texts)


def _end_with_parent() -> None:
    """A parent that is killed leaves workers that wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> dict[str, Encoded]:
    assert _encoder is not None
    return _encoder.encode(chunk)
