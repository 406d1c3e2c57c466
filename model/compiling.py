"""torch.compile, block by block: one graph for every kind of block, and a count that says when it is compiled again.

    static    every shape is a constant: with a fixed capacity, or dropless on one rank, shapes never change
    dynamic   sizes are symbols, for shapes that do change
    none      nothing is compiled

Blocks are compiled in place, one at a time, so that state-dict keys stay, blocks of a kind share one graph, and the
gradients of a block reach ZeRO while the block before it still runs backwards. Embeddings, head and loss stay eager.
"""

from __future__ import annotations

import time

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from model.config import CompileMode


def compile_blocks(blocks: nn.ModuleList, mode: CompileMode) -> None:
    """Let every block compile itself when it first runs, forwards with and without gradients, and backwards."""
    # Past its limit (8) dynamo runs code uncompiled without a word, as it did in the experiment that this project
    # continues. Kinds of blocks times passes are few, and so are the shapes of matrices that Muon's update, which
    # DeepSpeed compiles in any mode, is made for; if they grow all the same, the run fails and says why.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if mode == "none":
        return
    # torch 2.9's analysis of how to tile fused loops fails on some symbolic sizes.
    options = {"triton.coalesce_tiling_analysis": False} if mode == "dynamic" else None
    for block in blocks:
        block.compile(dynamic=mode == "dynamic", options=options)


class CompileWatch:
    """Compilations of this process, and the seconds they took. Of all code that dynamo sees, Muon's update included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.graphs: list[str] = []  # "forward 0/1", "backward 0/1" ...: the frame, and how many graphs it had before
        self.recompiles = 0
        self._began = 0.0
        self._at_last_look = 0
        self._seen: set[str] = set()
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, _: CallbackArgs) -> None:
        self._began = time.perf_counter()

    def _end(self, args: CallbackArgs) -> None:
        self.seconds += time.perf_counter() - self._began
        backward = args.callback_trigger is CallbackTrigger.LAZY_BACKWARD
        self.graphs.append(f"{'backward' if backward else 'forward'} {args.compile_id}")

    def look(self, phase: str) -> list[str]:
        """After a phase ("training step", "validation"): the graphs made in it, unless it is the first of its kind."""
        new, self._at_last_look = self.graphs[self._at_last_look :], len(self.graphs)
        if phase not in self._seen:
            self._seen.add(phase)
            return []
        self.recompiles += len(new)
        return new

    def close(self) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
