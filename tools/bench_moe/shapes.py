"""Which shapes, precisions and blocks can be asked for, by name. No torch: a command line is refused in no time."""

from __future__ import annotations

import re
from typing import NamedTuple

from model.config import ConfigError


class Shape(NamedTuple):
    """One block: T tokens of width D, E experts of width F (two matrices), k of them for every token."""

    T: int
    D: int
    F: int
    E: int
    k: int

    def __str__(self) -> str:
        return ",".join(f"{name}{value}" for name, value in self._asdict().items())

    @property
    def gated_width(self) -> int:
        """Width of an expert with three matrices (SwiGLU) and the FLOPs of two of width F: the nearest multiple of 8.

        8 bf16 numbers are the 16 bytes to which the rows of a grouped matrix product are aligned.
        """
        return max(8, round(self.F * 2 / 3 / 8) * 8)


def rows_per_expert(E: int, C: int, K: int, N: int, top_k: int) -> Shape:
    """The block whose experts, at capacity 1.0, each multiply C rows by a K x N and an N x K matrix: C = T * k / E."""
    return Shape(T=E * C // top_k, D=K, F=N, E=E, k=top_k)


SETS: dict[str, tuple[Shape, ...]] = {
    "cpu": (
        Shape(T=4096, D=256, F=512, E=8, k=2),
        Shape(T=4096, D=256, F=128, E=64, k=6),  # fine-grained experts
    ),
    "gpu": (
        rows_per_expert(8, 4096, 768, 1536, top_k=2),  # ds_configs/moe_d12.json: 16 sequences of 1024 tokens
        rows_per_expert(8, 4096, 2048, 4096, top_k=2),
        rows_per_expert(64, 1536, 2048, 1408, top_k=6),
        rows_per_expert(8, 4096, 4096, 14336, top_k=2),
        rows_per_expert(1, 32768, 768, 1536, top_k=1),  # one rank of moe_d12 at ep_size 8
    ),
}
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}  # what is measured by default

STOCK, FLOOR = "deepspeed/stock", "dense/iso_flop"
BLOCKS = (
    "ours/bmm",
    "ours/grouped",
    "ours/loop",
    "ours/grouped+swiglu",
    "ours/fp8",
    "ours/fp8_grouped",
    "torchao/grouped",
    "torchao/loop",
    STOCK,
    "deepspeed/stock_dropless",
    "transformers/eager",
    "transformers/grouped_mm",
    "seed/loop",
    FLOOR,
)
# As a run compiles them: the minutes that compiling the peers takes are spent with --compile.
ALSO_COMPILED = ("ours/bmm+static", f"{FLOOR}+static")
SUFFIXES = ("swiglu", "static", "dynamic")  # ours with gated experts; any block, compiled


def parse_shapes(texts: list[str]) -> tuple[Shape, ...]:
    """Named sets and shapes such as T4096,D256,F512,E8,k2. Raises ConfigError."""
    shapes: list[Shape] = []
    for text in texts:
        shapes += SETS[text] if text in SETS else [parse_shape(text)]
    return tuple(dict.fromkeys(shapes))


def parse_shape(text: str) -> Shape:
    found = re.fullmatch(r"T([0-9]+),D([0-9]+),F([0-9]+),E([0-9]+),k([0-9]+)", text)
    if not found or "0" in found.groups():
        raise ConfigError(
            f"--shapes {text}: not a shape. Write one as {SETS['cpu'][0]}, or name a set: {', '.join(SETS)}."
        )
    shape = Shape(*map(int, found.groups()))
    if shape.k > shape.E:
        raise ConfigError(f"--shapes {text}: k{shape.k} of E{shape.E} experts. Use a k of at most {shape.E}.")
    return shape


def parse_blocks(names: list[str], compiled: bool) -> tuple[str, ...]:
    """The blocks to measure, each also as NAME+static if `compiled`. Raises ConfigError."""
    for name in names:
        base, *suffixes = name.split("+")
        ours = base.startswith("ours/")
        if base not in BLOCKS or not set(suffixes) <= set(SUFFIXES[not ours :]) or len(set(suffixes)) < len(suffixes):
            raise ConfigError(
                f"--blocks {name}: no such block. Use {', '.join(BLOCKS)}; +static or +dynamic for one that is "
                "compiled, +swiglu for one of ours with gated experts."
            )
        if {"static", "dynamic"} <= set(suffixes):
            raise ConfigError(f"--blocks {name}: static and dynamic contradict each other. Use one of them.")
    also = [f"{name}+static" for name in names if compiled and not {"static", "dynamic"} & set(name.split("+"))]
    return tuple(dict.fromkeys([*names, *also]))
