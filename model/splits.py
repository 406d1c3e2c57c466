"""What run.data names becomes open splits and this rank's batches of them, checked against the model and each other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from model.blend import BlendedSamples, seed_of_source, shares_of
from model.config import DataError, ModelConfig
from model.data import (
    EOD_TOKEN,
    ShuffledSamples,
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
SCAN_TOKENS = 2**24  # read at once when looking for ids that no model has

Weighted = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Split:
    """Tokens to train on or to validate with, and what is known of them."""

    key: str  # where the run file names it: run.data.train, run.data.val.web ...
    name: str  # what stands there
    source: TokenSource
    fingerprint: str
    tokenizer: Tokenizer | None
    tokenizer_hash: str | None
    eod_id: int
    figures: dict[str, Any]  # the manifest's entry: tokens, bytes, unigram_bits_per_byte ...; empty where unknown


@dataclass(frozen=True)
class TrainData:
    """What run.data.train names: one source, or several that take turns by their shares of all samples."""

    splits: list[Split]
    shares: list[Fraction]
    samples: list[ShuffledSamples]
    batches: TrainBatches

    @property
    def fingerprint(self) -> str:
        """Of all that the samples depend on besides the seed; of a single source its own."""
        if len(self.splits) == 1:
            return self.splits[0].fingerprint
        parts = [(str(share), split.fingerprint) for share, split in zip(self.shares, self.splits, strict=True)]
        return "blend-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def text_split(self) -> Split:
        """The first split with a tokenizer, which is then that of all; without any, the first."""
        return next((split for split in self.splits if split.tokenizer is not None), self.splits[0])

    def epochs(self, num_samples: int) -> list[float]:
        """How often the first num_samples samples go through each source."""
        pairs = zip(self.shares, self.samples, strict=True)
        return [float(share * num_samples / samples.samples_per_epoch) for share, samples in pairs]


@dataclass(frozen=True)
class ValData:
    """What run.data.val names: one split, splits with names of their own, or splits with weights."""

    splits: list[Split]
    batches: list[ValBatches]
    names: list[str]  # for the metrics of each; empty where the run file gives none
    shares: list[Fraction] | None  # of the weights, where the run file gives any

    def metrics(self, nats: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
        """val/loss and val/bpb, of all splits and of each that has a name.

        Args:
            nats, targets: of every split the sum of its losses, and over how many tokens.

        Bits per byte are absent where the bytes of the text are not known.
        """
        bits = [split_nats / math.log(2) for split_nats in nats]
        num_bytes = [split.figures["bytes"] for split in self.splits if "bytes" in split.figures]
        metrics = {"val/loss": mean(nats, targets, self.shares)}
        if len(num_bytes) == len(self.splits):
            metrics["val/bpb"] = mean(bits, num_bytes, self.shares)
        for place, name in enumerate(self.names):
            metrics[f"val/{name}/loss"] = nats[place] / targets[place]
            if "bytes" in self.splits[place].figures:
                metrics[f"val/{name}/bpb"] = bits[place] / self.splits[place].figures["bytes"]
        return metrics


def mean(sums: Sequence[float], counts: Sequence[float], shares: Sequence[Fraction] | None) -> float:
    """Of all that was counted, each the same; with shares, of the parts' means, weighted."""
    if shares is None:
        return sum(sums) / sum(counts)
    return sum(float(share) * part / count for share, part, count in zip(shares, sums, counts, strict=True))


@dataclass(frozen=True)
class Data:
    """What a run reads, on this rank."""

    train: TrainData
    val: ValData | None

    def fingerprints(self) -> dict[str, Any]:
        """Of every split by the name that the run file gives it, of one that stands alone just that; and tokenizer."""
        found: dict[str, Any] = {"train": named_fingerprints(self.train.splits, []), "val": None}
        if self.val is not None:
            found["val"] = named_fingerprints(self.val.splits, self.val.names)
        return {**found, "tokenizer": self.train.text_split.tokenizer_hash}


def named_fingerprints(splits: Sequence[Split], names: Sequence[str]) -> str | dict[str, str]:
    if len(splits) == 1 and not names:
        return splits[0].fingerprint
    return {name: split.fingerprint for name, split in zip(names or [s.name for s in splits], splits, strict=True)}


def open_data(
    train: str | Weighted,
    val: str | Mapping[str, str] | Weighted | None,
    model: ModelConfig,
    *,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Data:
    """Open run.data.train and run.data.val: "builtin", "synthetic" or the prefix of a .bin/.idx pair, or several.

    Raises DataError if token files are missing, damaged, too short, or do not fit the model or each other.
    """
    place = {"micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
    train_data = open_train(train, model, seed, place)
    val_data = None if val is None else open_val(val, model, seed, place)
    refuse_other_tokenizers([*train_data.splits, *(val_data.splits if val_data is not None else [])])
    return Data(train_data, val_data)


def open_train(named: str | Weighted, model: ModelConfig, seed: int, place: dict[str, int]) -> TrainData:
    weights = [1.0] if isinstance(named, str) else [weight for weight, _ in named]
    splits = [open_split("train", key, name, model, seed) for key, name in keys_and_names("run.data.train", named)]
    shares = shares_of(weights)
    samples = [
        ShuffledSamples(split.source, seq_len=model.seq_len, seed=seed_of_source(seed, number))
        for number, split in enumerate(splits)
    ]
    return TrainData(splits, shares, samples, TrainBatches(BlendedSamples(samples, shares, seed), **place))


def open_val(
    named: str | Mapping[str, str] | Weighted, model: ModelConfig, seed: int, place: dict[str, int]
) -> ValData:
    splits = [open_split("val", key, name, model, seed) for key, name in keys_and_names("run.data.val", named)]
    batches = [ValBatches(split.source, seq_len=model.seq_len, eod_id=split.eod_id, **place) for split in splits]
    if isinstance(named, str):
        return ValData(splits, batches, [], None)
    if isinstance(named, Mapping):
        return ValData(splits, batches, list(named), None)
    return ValData(splits, batches, [], shares_of([weight for weight, _ in named]))


def keys_and_names(key: str, named: str | Mapping[str, str] | Weighted) -> list[tuple[str, str]]:
    """Every name of data with its place in the run file."""
    if isinstance(named, str):
        return [(key, named)]
    if isinstance(named, Mapping):
        return [(f"{key}.{name}", prefix) for name, prefix in named.items()]
    return [(f"{key}.{number}", prefix) for number, (_, prefix) in enumerate(named)]


def refuse_other_tokenizers(splits: Sequence[Split]) -> None:
    """Raise DataError unless all tokenizers that are known are one, used alike: other ids would be other text."""
    known = [split for split in splits if split.tokenizer_hash is not None]
    for split in known[1:]:
        if split.tokenizer_hash != known[0].tokenizer_hash:
            raise DataError(
                f"{split.key}={split.name}: has another tokenizer than {known[0].key}={known[0].name}. "
                "Prepare both with one tokenizer (--tokenizer)."
            )
        if split.tokenizer is not None and known[0].tokenizer is not None and split.eod_id != known[0].eod_id:
            raise DataError(
                f"{split.key}={split.name}: ends documents with {split.tokenizer.eod_token!r}, "
                f"{known[0].key}={known[0].name} with {known[0].tokenizer.eod_token!r}. "
                "Prepare both with one --eod_token."
            )


def open_split(split: str, key: str, name: str, model: ModelConfig, seed: int) -> Split:
    """Open one split. Raises DataError if its files are missing or damaged, or hold ids that the model lacks."""
    if name == "synthetic":
        seed += split == "val"
        count = SYNTHETIC_TRAIN_TOKENS if split == "train" else SYNTHETIC_VAL_SEQUENCES * model.seq_len
        source = SyntheticTokens(count, model.vocab_size, seed)
        return Split(key, name, source, f"synthetic-{seed}-{count}-{model.vocab_size}", None, None, 0, {})

    prefix = builtin_dir(model.vocab_size) / split if name == "builtin" else Path(name)
    file, manifest = TokenFile(prefix), read_manifest(prefix)
    if manifest is None:  # written by another tool, which leaves no word on its ids
        smallest, largest = id_bounds(file, model.vocab_size)
        if smallest < 0:
            raise DataError(
                f"{key}={name}: holds the id {smallest}, ids count from 0. Write it anew with the ids of its tokenizer."
            )
        if largest >= model.vocab_size:
            raise DataError(
                f"{key}={name}: holds the id {largest}, run.model.vocab_size is {model.vocab_size}. "
                f"Raise it to at least {largest + 1}."
            )
        return Split(key, name, file, data_fingerprint(prefix), None, None, 0, {})

    described = manifest.get("tokenizer", {})
    if not {"vocab_size", "eod_id", "file", "sha256"} <= described.keys():
        raise DataError(f"{prefix.parent / 'manifest.json'}: does not describe its tokenizer. Prepare the data again.")
    if described["vocab_size"] > model.vocab_size:
        raise DataError(
            f"{key}={name}: its tokenizer has {described['vocab_size']} tokens, run.model.vocab_size is "
            f"{model.vocab_size}. Raise it, or prepare the data with a smaller vocabulary."
        )
    return Split(
        key,
        name,
        file,
        data_fingerprint(prefix),
        Tokenizer(prefix.parent / described["file"], described.get("eod_token", EOD_TOKEN)),
        described["sha256"],
        described["eod_id"],
        manifest["splits"].get(prefix.name, {}),
    )


def id_bounds(file: TokenFile, vocab_size: int) -> tuple[int, int]:
    """The smallest and the largest token id of a file, or, where any of its dtype is below vocab_size, of its dtype."""
    limits = np.iinfo(file.dtype)
    if 0 <= limits.min and limits.max < vocab_size:
        return int(limits.min), int(limits.max)  # nothing else can be in there: no need to read it
    smallest, largest = limits.max, limits.min
    for first in range(0, file.num_tokens, SCAN_TOKENS):
        tokens = file.tokens(first, min(SCAN_TOKENS, file.num_tokens - first))
        smallest, largest = min(smallest, tokens.min()), max(largest, tokens.max())
    return int(smallest), int(largest)
