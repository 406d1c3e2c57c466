"""Token files, the order in which a run reads them, and the tokenizer that belongs to them.

A dataset NAME is a folder (tools/prepare_data makes one); data/NAME/train is called a prefix:

    data/NAME/  train.bin train.idx   val.bin val.idx   tokenizer.json   manifest.json

.bin is all tokens of a split, document after document; .idx says where each document starts. The format is that of
megatron-core 0.16.1 (core/datasets/indexed_dataset.py), so datasets made by Megatron's own tools open as they are:

    .idx    9 bytes MMIDIDX\\0\\0   uint64 version   uint8 dtype code   uint64 sequences   uint64 document ends
            int32[sequences] lengths   int64[sequences] byte offsets into .bin   int64[document ends] 0 ... sequences

No object here has state that moves: training batches are a pure function of the number of samples consumed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

import numpy as np
import tokenizers

from model.config import DataError
from model.files import write_durably

if TYPE_CHECKING:
    from torch import Tensor

EOD_TOKEN = "<|endoftext|>"
IGNORED_TARGET = -1  # the y of padding: cross-entropy must skip it
MANIFEST_NAME = "manifest.json"
FINGERPRINT_BLOCKS = 1000  # of a .bin without a manifest
FINGERPRINT_BLOCK_BYTES = 4096

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPE_NAMES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_TOKEN_DTYPES = {code: np.dtype(name) for code, name in _DTYPE_NAMES.items() if "int" in name}
_DTYPE_CODES = {dtype: code for code, dtype in _TOKEN_DTYPES.items()}

_MASK64 = 2**64 - 1
_FEISTEL_ROUNDS = 6
_SYNTHETIC_RUN = 8


class TokenSource(Protocol):
    """A stream of tokens that can be read at any place: a file, or a rule that makes one up."""

    @property
    def num_tokens(self) -> int: ...

    def tokens(self, start: int, length: int) -> np.ndarray: ...


class Samples(Protocol):
    """An endless order of samples to train on, in which every sample has a number."""

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [len(numbers), seq_len + 1]: the tokens of these samples."""
        ...


class TokenFile:
    """One split of a dataset, read through a memory map as one stream of `num_tokens` tokens.

    Everything that the index claims is checked on opening. Raises DataError naming the file and both sizes.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.path = Path(prefix)
        bin_path, idx_path = _with_suffix(self.path, ".bin"), _with_suffix(self.path, ".idx")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise DataError(f"{path} is missing. Prepare the data: {_prepare_command(self.path)}.")
        self.dtype, self.num_tokens, self.num_documents = _read_index(idx_path, self.path)
        expected = self.num_tokens * self.dtype.itemsize
        if bin_path.stat().st_size != expected:
            raise DataError(
                f"{bin_path} holds {bin_path.stat().st_size} bytes, its index says {expected} "
                f"({self.num_tokens} tokens of {self.dtype}). {_damaged(self.path)}"
            )
        if self.num_tokens == 0:
            raise DataError(f"{bin_path} holds 0 tokens. Prepare it from texts: {_prepare_command(self.path)}.")
        self._stream = np.memmap(bin_path, dtype=self.dtype, mode="r")

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream as int64. Documents follow each other without a gap."""
        assert 0 <= start <= self.num_tokens - length, (start, length, self.num_tokens)
        return self._stream[start : start + length].astype(np.int64)


class TokenFileWriter:
    """Writes one split; both files appear, durable, when the `with` block ends without a fault.

    Memory stays bounded, whatever the size of the split: lengths go to a file of their own until the index is written.
    `sync` says how far the split has come; a later writer that is given this as `resume_at` goes on from there. After a
    fault the files of a writer that never got so far are deleted. Nothing is added to a document: its end-of-document
    token is the caller's.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, resume_at: tuple[int, int] = (0, 0)) -> None:
        self.path = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_documents, self.num_tokens = resume_at
        self._is_synced = self.num_documents > 0
        self._bin_path = _with_suffix(self.path, ".bin.tmp")
        self._lengths_path = _with_suffix(self.path, ".lengths.tmp")
        self._bin = _open_at(self._bin_path, self.num_tokens * self.dtype.itemsize)  # closed by __exit__
        self._lengths = _open_at(self._lengths_path, self.num_documents * 4)

    def add_document(self, tokens: np.ndarray) -> None:
        self.add_documents(tokens, np.array([tokens.size]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents one after the other in `tokens`; `lengths` says how many tokens each has."""
        assert lengths.sum() == tokens.size, (lengths, tokens.size)
        limits = np.iinfo(self.dtype)
        if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise DataError(
                f"{self.path}: token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype} "
                f"({limits.min}..{limits.max}). Write with a wider dtype."
            )
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.write(lengths.astype(np.int32).tobytes())
        self.num_documents += lengths.size
        self.num_tokens += tokens.size

    def sync(self) -> tuple[int, int]:
        """Makes all documents so far durable; returns their number and that of their tokens."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())
        self._is_synced = True
        return self.num_documents, self.num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.sync()
        self._bin.close()
        self._lengths.close()
        if kind is None:
            write_durably(_with_suffix(self.path, ".idx"), self._index())
            self._bin_path.replace(_with_suffix(self.path, ".bin"))  # last: where a .bin is, nothing is left to do
            self._lengths_path.unlink()
        elif not self._is_synced:
            self._bin_path.unlink()
            self._lengths_path.unlink()

    def _index(self) -> bytes:
        lengths = np.fromfile(self._lengths_path, dtype=np.int32)
        ends = np.arange(lengths.size + 1, dtype=np.int64)  # one sequence a document
        header = _HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[self.dtype], lengths.size, ends.size)
        return header + lengths.tobytes() + _contiguous_offsets(lengths, self.dtype).tobytes() + ends.tobytes()


def _open_at(path: Path, size: int) -> BinaryIO:
    """Opens `path` to write from byte `size` on; what lies beyond is cut off. Raises DataError if it is shorter."""
    stream = open(path, "r+b" if size else "wb")
    if (found := stream.seek(0, os.SEEK_END)) < size:
        stream.close()
        raise DataError(f"{path} holds {found} bytes, {size} were written. Delete {path.parent} and start again.")
    stream.truncate(size)
    stream.seek(size)
    return stream


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that megatron-core writes and that holds the ids 0 .. vocab_size - 1."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # Path.with_suffix would cut the prefix data/v1.5 to data/v1


def _contiguous_offsets(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Byte offset of each sequence when they follow each other without a gap."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    return np.concatenate([np.zeros(1, dtype=np.int64), ends])[:-1]


def _read_index(path: Path, prefix: Path) -> tuple[np.dtype, int, int]:
    """(dtype, tokens, documents) of a dataset whose index `path` is sound."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{path} holds {size} bytes, a token index at least {_HEADER.size}. {_damaged(prefix)}")
    magic, version, code, num_sequences, num_ends = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{path} is not a token index: it starts with {magic!r}, not {_MAGIC!r}. {_damaged(prefix)}")
    if version != _VERSION:
        raise DataError(f"{path} has format version {version}, this reader knows {_VERSION}. {_damaged(prefix)}")
    if code not in _TOKEN_DTYPES:
        known = ", ".join(f"{known} {dtype}" for known, dtype in _TOKEN_DTYPES.items())
        found = _DTYPE_NAMES.get(code, "unknown")
        raise DataError(f"{path} has dtype code {code} ({found}), tokens are one of {known}. {_damaged(prefix)}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_ends
    if size != expected:
        raise DataError(
            f"{path} holds {size} bytes, its header says {expected} "
            f"({num_sequences} sequences, {num_ends} document ends). {_damaged(prefix)}"
        )
    # The header makes 34 bytes, so the arrays lie unaligned in the file: views of a byte map, as megatron-core does.
    body = np.memmap(path, mode="r")[_HEADER.size :]
    lengths = body[: 4 * num_sequences].view(np.int32)
    offsets = body[4 * num_sequences : 12 * num_sequences].view(np.int64)
    ends = body[12 * num_sequences :].view(np.int64)
    dtype = _TOKEN_DTYPES[code]
    if num_sequences and lengths.min() < 0:
        raise DataError(f"{path} has a sequence of length {lengths.min()}. {_damaged(prefix)}")
    apart = np.flatnonzero(offsets != _contiguous_offsets(lengths, dtype))
    if apart.size:
        raise DataError(
            f"{path}: sequence {apart[0]} starts at byte {offsets[apart[0]]} of the .bin, "
            f"{_contiguous_offsets(lengths, dtype)[apart[0]]} expected: sequences must follow each other without a "
            f"gap. {_damaged(prefix)}"
        )
    if num_ends == 0 or ends[0] != 0 or ends[-1] != num_sequences:
        span = f"{ends[0]}..{ends[-1]}" if num_ends else "nothing"
        raise DataError(f"{path}: document ends cover {span}, 0..{num_sequences} expected. {_damaged(prefix)}")
    return dtype, int(lengths.sum(dtype=np.int64)), int(num_ends) - 1


def builtin_dir(vocab_size: int) -> Path:
    """Where the built-in corpus lives once it is prepared."""
    return Path(__file__).resolve().parents[1] / "data" / f"builtin-{vocab_size}"


def _prepare_command(prefix: Path) -> str:
    vocab_size = prefix.parent.name.removeprefix("builtin-")
    if vocab_size.isdigit() and prefix.resolve().parent == builtin_dir(int(vocab_size)):
        return f"python -m tools.prepare_data --builtin --vocab_size {vocab_size}"
    return "python -m tools.prepare_data --help"


def _damaged(prefix: Path) -> str:
    """The way out of a dataset that cannot be used."""
    return f"Copy it anew, or delete {prefix.parent} and prepare it again: {_prepare_command(prefix)}."


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest of the dataset that `prefix` belongs to, or None where another tool made the dataset.

    Raises DataError if the manifest is damaged or tells other counts than the token file has.
    """
    prefix = Path(prefix)
    path = prefix.parent / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as fault:  # bad JSON and bad UTF-8 alike
        raise DataError(f"{path} is not JSON: {fault}. {_damaged(prefix)}") from fault
    splits = manifest.get("splits") if isinstance(manifest, dict) else None
    split = splits.get(prefix.name) if isinstance(splits, dict) else None
    if not isinstance(split, dict):
        raise DataError(f"{path} describes no split {prefix.name!r}. Move {prefix.name}.* to a folder of their own.")
    token_file = TokenFile(prefix)
    for name, actual in (("tokens", token_file.num_tokens), ("documents", token_file.num_documents)):
        if split.get(name) != actual:
            raise DataError(
                f"{path} says {split.get(name)} {name} for {prefix.name!r}, its index says {actual}. {_damaged(prefix)}"
            )
    return manifest


def data_fingerprint(prefix: str | Path) -> str:
    """16 hex digits that identify the tokens of a split; cheap, also for a large dataset without a manifest.

    With a manifest it is the start of the .bin's recorded sha256. Otherwise it is that of a sha256 over the .idx, the
    size of the .bin and FINGERPRINT_BLOCKS blocks of the .bin: all of it where it is small, else evenly from its first
    bytes to its last, so that tokens that were changed between two blocks are not noticed.
    """
    prefix = Path(prefix)
    manifest = read_manifest(prefix)
    if manifest is not None:
        return str(manifest["splits"][prefix.name]["bin_sha256"])[:16]
    TokenFile(prefix)  # refuses a damaged or missing file with the usual words
    found = hashlib.sha256(_with_suffix(prefix, ".idx").read_bytes())
    with open(_with_suffix(prefix, ".bin"), "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        found.update(struct.pack("<Q", size))
        last = max(0, size - FINGERPRINT_BLOCK_BYTES)
        blocks = min(FINGERPRINT_BLOCKS, math.ceil(size / FINGERPRINT_BLOCK_BYTES))
        for block in range(blocks):
            stream.seek(last * block // max(1, blocks - 1))
            found.update(stream.read(FINGERPRINT_BLOCK_BYTES))
    return found.hexdigest()[:16]


def mix64(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on uint64: every bit of x moves all of the result."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash64(seed: int, number: int) -> int:
    """A number in 0 .. 2^64 - 1 that depends on every bit of both."""
    return int(mix64(mix64(np.array([seed & _MASK64], dtype=np.uint64)) ^ np.uint64(number & _MASK64))[0])


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `index` lands in a shuffle of 0 .. size - 1 that belongs to (seed, epoch): a bijection without a table.

    A Feistel network on 2h bits, h the least with 4^h >= size. With key_r = mix64(mix64(mix64(seed) xor epoch) + r),

        (left, right) <- (right, left xor (mix64(right xor key_r) mod 2^h))      for r = 0, 1, ...

    permutes 0 .. 4^h - 1; a result of `size` or more goes in again until it is below (cycle walking: Black and
    Rogaway, CT-RSA 2002), fewer than four times on average. `index` and `epoch` are int arrays of one shape.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    key = mix64(mix64(np.array([seed & _MASK64], dtype=np.uint64)) ^ epoch.astype(np.uint64))
    round_keys = [mix64(key + np.uint64(r)) for r in range(_FEISTEL_ROUNDS)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return (left << half_bits) | right

    landed = network(index.astype(np.uint64))
    while (outside := landed >= np.uint64(size)).any():
        landed = np.where(outside, network(landed), landed)
    return landed.astype(np.int64)


class SyntheticTokens:
    """Tokens that are a pure function of (seed, position): runs that count up by one (mod vocab_size) from a hash.

    All but one token in a run follow from the token before, so a model that learns shows it in its loss.
    """

    def __init__(self, num_tokens: int, vocab_size: int, seed: int) -> None:
        self.num_tokens = num_tokens
        self.vocab_size = vocab_size
        self.seed = seed

    def tokens(self, start: int, length: int) -> np.ndarray:
        assert 0 <= start <= self.num_tokens - length, (start, length, self.num_tokens)
        position = np.arange(start, start + length, dtype=np.uint64)
        run, place = np.divmod(position, np.uint64(_SYNTHETIC_RUN))
        first = mix64(mix64(np.array([self.seed & _MASK64], dtype=np.uint64)) ^ run) % np.uint64(self.vocab_size)
        return ((first + place) % np.uint64(self.vocab_size)).astype(np.int64)


class ShuffledSamples:
    """The samples of one source, epoch after epoch, each epoch in an order of its own.

    An epoch has N = (num_tokens - 1) // seq_len samples. Sample i is window w = permute(i mod N) of epoch i // N: the
    seq_len + 1 tokens from w * seq_len on, of which the first seq_len are read and the last seq_len predicted.
    """

    def __init__(self, source: TokenSource, *, seq_len: int, seed: int) -> None:
        if source.num_tokens < seq_len + 1:
            raise DataError(
                f"{_name(source)} has {source.num_tokens} tokens, one sample of seq_len={seq_len} needs {seq_len + 1}. "
                f"Use a seq_len of at most {source.num_tokens - 1}, or more text."
            )
        self.source = source
        self.seq_len = seq_len
        self.seed = seed
        self.samples_per_epoch = (source.num_tokens - 1) // seq_len

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [len(numbers), seq_len + 1]: the tokens of these samples."""
        epoch, index = np.divmod(numbers, self.samples_per_epoch)
        windows = permute(index, self.samples_per_epoch, self.seed, epoch)
        return np.stack([self.source.tokens(int(w) * self.seq_len, self.seq_len + 1) for w in windows])


class TrainBatches:
    """Micro-batches for one rank. The order of samples depends on seed and data, never on the number of ranks.

    Nothing here changes by reading: a run's place in its data is one integer, the samples that all ranks consumed.
    """

    def __init__(self, samples: Samples, *, micro_batch_size: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.samples_per_micro_step = micro_batch_size * world_size

    def micro_batch(self, first_sample: int) -> tuple[Tensor, Tensor]:
        """(x_BS, y_BS), int64, of this rank in the micro-step over all ranks whose first sample is `first_sample`."""
        first = first_sample + self.rank * self.micro_batch_size
        rows = self.samples.read(np.arange(first, first + self.micro_batch_size))
        return _as_tensors(rows[:, :-1], rows[:, 1:])


class ValBatches:
    """One pass over a whole split for one rank: every token of it is predicted exactly once, over all ranks.

    The first token is predicted from end-of-document, x = [eod, t_0, t_1, ...], y = [t_0, t_1, t_2, ...], and both are
    cut into windows of seq_len. The end is padded (x = eod, y = IGNORED_TARGET) until every rank has as many batches
    of the same shape as any other: expert parallelism needs equal calls.
    """

    def __init__(
        self, source: TokenSource, *, seq_len: int, micro_batch_size: int, rank: int, world_size: int, eod_id: int
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.source = source
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.eod_id = eod_id

    def __len__(self) -> int:
        """Batches of one rank, the same for each."""
        return math.ceil(self.source.num_tokens / (self.seq_len * self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_BS, y_BS), int64."""
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.micro_batch_size
            rows = [self._window(first + row) for row in range(self.micro_batch_size)]
            yield _as_tensors(np.stack([x for x, _ in rows]), np.stack([y for _, y in rows]))

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        x_S = np.full(self.seq_len, self.eod_id, dtype=np.int64)
        y_S = np.full(self.seq_len, IGNORED_TARGET, dtype=np.int64)
        start = window * self.seq_len
        length = min(self.seq_len, self.source.num_tokens - start)
        if length > 0:
            y_S[:length] = self.source.tokens(start, length)
            x_S[1:length] = y_S[: length - 1]
            if start > 0:
                x_S[0] = self.source.tokens(start - 1, 1)[0]
        return x_S, y_S


def _as_tensors(*arrays: np.ndarray) -> Any:
    import torch  # here and not above: tools/prepare_data runs at the start of runs, without the seconds torch takes

    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _name(source: TokenSource) -> str:
    return str(source.path) if isinstance(source, TokenFile) else type(source).__name__


class Tokenizer:
    """Text to ids and back: a tokenizer.json of the `tokenizers` library that has an end-of-document token.

    Text that happens to spell a special token is text; the ids that come out have no special token among them.
    """

    def __init__(self, path: str | Path, eod_token: str = EOD_TOKEN) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"{path} is missing. A tokenizer is made with the data: python -m tools.prepare_data --help."
            )
        self._tokenizer, self.eod_id = parse_tokenizer(path.read_bytes(), path, eod_token)
        self.eod_token = eod_token
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As encode, on all cores unless TOKENIZERS_PARALLELISM says otherwise."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def parse_tokenizer(content: bytes, name: str | Path, eod_token: str) -> tuple[tokenizers.Tokenizer, int]:
    """The tokenizer of a tokenizer.json, set to take any text as text, and the id of `eod_token`.

    Raises DataError, with `name` in it, if the tokenizer cannot be used.
    """
    try:
        described = json.loads(content)
    except ValueError as fault:
        raise DataError(f"{name} is not JSON: {fault}. Use a tokenizer.json of the tokenizers library.") from fault
    if not isinstance(described, dict) or "model" not in described:
        raise DataError(f"{name} has no key 'model'. Use a tokenizer.json of the tokenizers library.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as fault:  # tokenizers 0.23 raises nothing narrower
        raise DataError(
            f"{name} is not read by tokenizers {tokenizers.__version__}: {fault}. Use a tokenizer.json of that library."
        ) from fault
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # files in the wild may say to cut long texts, or to pad short ones
    tokenizer.no_padding()
    eod_id = tokenizer.token_to_id(eod_token)
    if eod_id is None:
        special = [repr(each.content) for each in tokenizer.get_added_tokens_decoder().values() if each.special]
        raise DataError(
            f"{name} has no token {eod_token!r}. Name the one that ends a document with --eod_token "
            f"(its special tokens: {', '.join(special[:8]) or 'none'}), or add it to the file as a special token."
        )
    tokenizer.add_special_tokens([eod_token])  # it keeps its id; some files have it as an ordinary token
    if eod_id in tokenizer.encode(eod_token, add_special_tokens=False).ids:
        raise DataError(
            f"{name} takes the text {eod_token!r} for the token itself: it would end a document. Name another token "
            "with --eod_token."
        )
    return tokenizer, eod_id
