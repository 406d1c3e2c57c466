"""What run.data names becomes two splits and this rank's batches of them, checked against the model and each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import DataError, ModelConfig
from model.data import (
    SyntheticTokens,
    TokenFile,
    Tokenizer,
    TokenSource,
    TrainBatches,
    ValBatches,
    builtin_dir,
    data_fingerprint,
    read_manifest,
)

SYNTHETIC_TRAIN_TOKENS = 2**24
SYNTHETIC_VAL_SEQUENCES = 64
SCAN_TOKENS = 2**24  # read at once when looking for the largest id


@dataclass(frozen=True)
class Split:
    """Tokens to train on or to validate with, and what is known of them."""

    source: TokenSource
    fingerprint: str
    tokenizer: Tokenizer | None
    tokenizer_hash: str | None
    eod_id: int
    figures: dict[str, Any]  # the manifest's entry: tokens, bytes, unigram_bits_per_byte ...; empty where unknown


@dataclass(frozen=True)
class Data:
    """Both splits, and this rank's batches of them."""

    train: Split
    val: Split | None
    batches: TrainBatches
    val_batches: ValBatches | None


def open_data(
    train_name: str,
    val_name: str | None,
    model: ModelConfig,
    *,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Data:
    """Open run.data.train and run.data.val: "builtin", "synthetic" or the prefix of a .bin/.idx pair.

    Raises DataError if token files are missing, damaged, too short, or do not fit the model or each other.
    """
    shape = {"seq_len": model.seq_len, "micro_batch_size": micro_batch_size}
    place = {"rank": rank, "world_size": world_size}
    train = open_split("train", train_name, model, seed)
    batches = TrainBatches(train.source, seed=seed, **shape, **place)
    if val_name is None:
        return Data(train, None, batches, None)
    val = open_split("val", val_name, model, seed)
    if train.tokenizer_hash is not None and val.tokenizer_hash not in (None, train.tokenizer_hash):
        raise DataError(
            f"run.data.val={val_name}: has another tokenizer than run.data.train={train_name}. "
            "Prepare both with one tokenizer (--tokenizer)."
        )
    return Data(train, val, batches, ValBatches(val.source, eod_id=val.eod_id, **shape, **place))


def open_split(split: str, name: str, model: ModelConfig, seed: int) -> Split:
    """Open one split. Raises DataError if its files are missing or damaged, or hold ids that the model lacks."""
    if name == "synthetic":
        seed += split == "val"
        count = SYNTHETIC_TRAIN_TOKENS if split == "train" else SYNTHETIC_VAL_SEQUENCES * model.seq_len
        source = SyntheticTokens(count, model.vocab_size, seed)
        return Split(source, f"synthetic-{seed}-{count}-{model.vocab_size}", None, None, 0, {})

    prefix = builtin_dir(model.vocab_size) / split if name == "builtin" else Path(name)
    file, manifest = TokenFile(prefix), read_manifest(prefix)
    if manifest is None:  # written by another tool, which leaves no word on its ids
        if (largest := largest_id(file)) >= model.vocab_size:
            raise DataError(
                f"run.data.{split}={name}: holds the id {largest}, run.model.vocab_size is {model.vocab_size}. "
                f"Raise it to at least {largest + 1}."
            )
        return Split(file, data_fingerprint(prefix), None, None, 0, {})

    described = manifest.get("tokenizer", {})
    if not {"vocab_size", "eod_id", "file", "sha256"} <= described.keys():
        raise DataError(f"{prefix.parent / 'manifest.json'}: does not describe its tokenizer. Prepare the data again.")
    if described["vocab_size"] > model.vocab_size:
        raise DataError(
            f"run.data.{split}={name}: its tokenizer has {described['vocab_size']} tokens, run.model.vocab_size is "
            f"{model.vocab_size}. Raise it, or prepare the data with a smaller vocabulary."
        )
    return Split(
        file,
        data_fingerprint(prefix),
        Tokenizer(prefix.parent / described["file"]),
        described["sha256"],
        described["eod_id"],
        manifest["splits"].get(prefix.name, {}),
    )


def largest_id(source: TokenSource) -> int:
    """The largest token id of a whole source."""
    starts = range(0, source.num_tokens, SCAN_TOKENS)
    return max(int(source.tokens(first, min(SCAN_TOKENS, source.num_tokens - first)).max()) for first in starts)
