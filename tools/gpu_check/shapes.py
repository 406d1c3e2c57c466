"""The shapes of experts that are measured, by name: E experts with C rows each, a K x N matrix, then an N x K one."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """E experts, C rows of each, matrices K x N (hidden size, width of an expert)."""

    E: int
    C: int
    K: int
    N: int

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items())

    @property
    def rows(self) -> int:
        return self.E * self.C

    @property
    def flops(self) -> int:
        """Of one product of all rows with one matrix of their expert."""
        return 2 * self.rows * self.K * self.N


SHAPES = {
    "seed": Shape(8, 4096, 768, 1536),  # ds_configs/moe_d12.json, 16 sequences of 1024 tokens, capacity 1.0
    "2048": Shape(8, 4096, 2048, 4096),
    "E64": Shape(64, 1536, 2048, 1408),
    "14336": Shape(8, 4096, 4096, 14336),
    "ep8": Shape(1, 32768, 768, 1536),  # what one rank of moe_d12 sees at ep_size 8
}
TOP_K = {"E64": 6, "ep8": 1}  # of the block that such experts come from; else 2
DRY_SHAPE = Shape(2, 32, 32, 48)


def shape_named(name: str, dry_run: bool) -> Shape:
    return DRY_SHAPE if dry_run else SHAPES[name]
