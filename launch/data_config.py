"""`run.data`: which tokens a run trains on and validates with, by name. model/splits.py opens what is named here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import PurePath
from typing import Any, NamedTuple

from pydantic import model_validator

from model.config import ConfigError, Section

BUILT_IN_DATA = ("builtin", "synthetic")
WEIGHTED = 'a list such as [[0.7, "data/a/train"], [0.3, "builtin"]]'


class WeightedPrefix(NamedTuple):
    """An entry of a weighted list. What counts is a weight's share of their sum."""

    weight: float
    prefix: str


TrainNames = str | tuple[WeightedPrefix, ...]
ValNames = str | dict[str, str] | tuple[WeightedPrefix, ...] | None


class DataConfig(Section):
    """`run.data`: a prefix of a .bin/.idx pair, "builtin" (State of the Union speeches), "synthetic", or several.

    val is by default that of train where train is built in, and "none" elsewhere: no validation.
    """

    train: TrainNames = "builtin"  # [[weight, prefix], ...]: every sample from one of them, in proportion to weight
    val: ValNames = None  # {name: prefix}: val/NAME/loss, /bpb, and all pooled; [[weight, prefix], ...]: weighted means

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        train = section.get("train", "builtin")
        val = section.get("val", train if train in BUILT_IN_DATA else None)
        return {**section, "train": parse_train(train), "val": parse_val(val)}

    @property
    def prefixes(self) -> list[str]:
        """All that is named, for training and for validation."""
        found: list[str] = []
        for named in (self.train, self.val):
            if isinstance(named, str):
                found.append(named)
            elif isinstance(named, dict):
                found.extend(named.values())
            elif named is not None:
                found.extend(prefix for _, prefix in named)
        return found


def parse_train(value: object) -> TrainNames:
    if isinstance(value, list | tuple):
        return parse_weighted("train", value)
    if isinstance(value, str):
        return parse_prefix("train", value)
    raise ConfigError(f"train={json.dumps(value)}: should be a prefix, 'builtin', 'synthetic' or {WEIGHTED}.")


def parse_val(value: object) -> ValNames:
    if value is None or value == "none":  # "none" for --set, where null deletes the key and the default comes back
        return None
    if isinstance(value, list | tuple):
        return parse_weighted("val", value)
    if isinstance(value, dict):
        return parse_named("val", value)
    if isinstance(value, str):
        return parse_prefix("val", value)
    raise ConfigError(
        f"val={json.dumps(value)}: should be a prefix, 'builtin', 'synthetic', 'none', "
        f'an object such as {{"a": "data/a/val"}} or {WEIGHTED}.'
    )


def parse_prefix(key: str, value: object, among_others: bool = False) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}={json.dumps(value)}: should be a string that is not empty.")
    if among_others and value == "synthetic":
        raise ConfigError(
            f"{key}='synthetic' has no place beside other data: its tokens are made up. Use it alone, or remove it."
        )
    return value


def parse_weighted(key: str, entries: list[Any] | tuple[Any, ...]) -> tuple[WeightedPrefix, ...]:
    if not entries:
        raise ConfigError(f"{key}=[]: should be {WEIGHTED}.")
    parsed = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ConfigError(f"{key}.{number}={json.dumps(entry)}: should be [weight, prefix].")
        weight, prefix = entry
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= sys.float_info.max:
            raise ConfigError(f"{key}.{number}.0={json.dumps(weight)}: should be a weight, a finite number above 0.")
        parsed.append(WeightedPrefix(float(weight), parse_prefix(f"{key}.{number}.1", prefix, among_others=True)))
    refuse_twice(key, [prefix for _, prefix in parsed], "Give it one entry with the sum of its weights")
    return tuple(parsed)


def parse_named(key: str, entries: dict[str, Any]) -> dict[str, str]:
    if not entries:
        raise ConfigError(f"{key}={{}} names nothing to validate with. Name a prefix, or use run.data.{key}='none'.")
    for name, prefix in entries.items():
        if not re.fullmatch("[A-Za-z0-9_-]+", name) or name in ("loss", "bpb"):
            raise ConfigError(
                f"{key}.{name}={json.dumps(prefix)}: the name becomes the metric val/{name}/loss. Use letters, digits, "
                "_ and -, and neither 'loss' nor 'bpb'."
            )
        parse_prefix(f"{key}.{name}", prefix, among_others=True)
    refuse_twice(key, list(entries.values()), "Name it once")
    return entries


def refuse_twice(key: str, prefixes: list[str], way_out: str) -> None:
    paths = [PurePath(prefix) for prefix in prefixes]
    for prefix, path in zip(prefixes, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"{key}: {prefix!r} stands in it twice. {way_out}.")
