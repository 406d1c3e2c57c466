"""Which part of the training state lies on this rank, by tensor name and place: what a checkpoint saves and loads.

The optimizer of a DeepSpeed engine keeps fp32 master weights and moments in flat buffers, cut into equal parts for the
ranks (ZeRO-1, -2), parameter by parameter (ZeRO-3), or whole on every rank (stage 0). Here each of these becomes a list
of spans: "elements start .. start + n of the flattened tensor NAME". Spans say nothing of ranks and stages, so that
a state that was saved by one topology is loaded by any other.

A stack of local experts [L, ...] is rows ep_rank * L ... of one tensor [E, ...]; so is a list of expert modules.
Attributes of the optimizers are those of deepspeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

WEIGHT = "weight"  # the fp32 master
ADAMW_MOMENTS, MUON_MOMENT = ("exp_avg", "exp_avg_sq"), "momentum_buffer"  # as torch and deepspeed name them
LISTED_EXPERT = re.compile(r"deepspeed_experts\.(\d+)\.(w1|w2)\.weight$")


@dataclass(frozen=True)
class Place:
    """Where a parameter of this rank lies in the tensor of the whole model."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # of the parameter's first element in the flattened tensor
    numel: int  # of the parameter


@dataclass(frozen=True)
class Span:
    """Consecutive elements of one flattened tensor of the training state, as they lie on this rank."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # 1-d view of what the engine uses; writing to it changes the state
    owned: slice  # the part of `values` that this rank saves: every element of the tensor is owned by one rank


@dataclass(frozen=True)
class Part:
    """Elements first ... first + size of a parameter, which lie at `begin` of a buffer."""

    place: Place
    first: int
    size: int
    begin: int
    owned: slice | None = None  # of these elements; None: all

    def span(self, kind: str, buffer: Tensor) -> Span:
        values = buffer.view(-1)[self.begin : self.begin + self.size]
        start = self.place.start + self.first
        return Span(self.place.name, kind, self.place.shape, start, values, self.owned or slice(0, self.size))


class TrainingPartition:
    """The training state on this rank, of an engine whose model has `ep_size` expert-parallel ranks."""

    def __init__(self, engine: Any, ep_size: int) -> None:
        self.model: nn.Module = engine.module
        self.optimizer = engine.optimizer
        self.torch_optimizer: torch.optim.Optimizer = engine.basic_optimizer
        self.parameters = list(self.model.parameters())
        assert all(parameter.requires_grad for parameter in self.parameters), "what is not trained would be lost"
        self.places = {
            id(parameter): place_of(name, parameter, ep_size, dist.get_rank() % ep_size)
            for name, parameter in self.model.named_parameters()
        }

    def spans(self) -> Iterator[Span]:
        """Master weights, and the moments that exist by now."""
        for buffer, parts in self._buffers():
            yield from (part.span(WEIGHT, buffer.data) for part in parts)
            state = self.torch_optimizer.state.get(buffer, {})
            for kind in ADAMW_MOMENTS:
                if kind in state:
                    yield from (part.span(kind, state[kind]) for part in parts)
            if MUON_MOMENT in state:
                yield from (part.span(MUON_MOMENT, state[MUON_MOMENT]) for part in self._muon_parts(buffer, parts))

    def optimizer_steps(self) -> set[float]:
        """The numbers of updates that the parameters here have had, as AdamW counts them: one number, or none yet."""
        states = [self.torch_optimizer.state.get(buffer, {}) for buffer, parts in self._buffers() if parts]
        return {float(state["step"]) for state in states if "step" in state}

    def make_moments(self, kinds: dict[str, set[str]], muon_dtype: torch.dtype | None, steps: float) -> None:
        """Give a new optimizer the moments, zeros, that it would have after an update.

        Args:
            kinds: what each tensor has, by name.
            muon_dtype: of Muon's momentum, unless it is offloaded: that of the gradients. All else has that of the
                master weights.
            steps: AdamW's count of updates.
        """
        fused = any(group.get("fused") for group in self.torch_optimizer.param_groups)
        for buffer, parts in self._buffers():
            wanted = set().union(*(kinds[part.place.name] for part in parts))
            state: dict[str, Tensor] = {}
            if ADAMW_MOMENTS[0] in wanted:
                device = buffer.device if fused else "cpu"  # where torch 2.11 and 2.13 have it
                state["step"] = torch.tensor(steps, dtype=torch.float32, device=device)
                state |= {kind: torch.zeros_like(buffer.data) for kind in ADAMW_MOMENTS}
            if MUON_MOMENT in wanted:
                muon_parts = self._muon_parts(buffer, parts)
                numel = buffer.numel() if muon_parts is parts else sum(part.size for part in muon_parts)
                dtype = buffer.dtype if muon_parts is parts else muon_dtype
                state[MUON_MOMENT] = torch.zeros(numel, dtype=dtype, device=buffer.device)
            if state:
                self.torch_optimizer.state[buffer] = state

    def model_weights(self) -> Iterator[Span]:
        """The weights that the model computes with, in their own type: copies of the masters, owned by nobody."""
        for parameter in self.parameters:
            place = self.places[id(parameter)]
            held, first, size = parameter.data, 0, place.numel
            if hasattr(parameter, "ds_tensor"):
                held = parameter.ds_tensor.data
                first, size = share_of_stage_3(parameter, place)
            if size:
                yield Part(place, first, size, 0, owned=slice(0, 0)).span(WEIGHT, held)

    @contextmanager
    def only_parts(self) -> Iterator[None]:
        """Within this, ZeRO-3 keeps no parameter whole, so that what is written to the parts is all there is."""
        is_stage_3 = isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3)
        if is_stage_3:
            self.optimizer.checkpoint_event_prologue()
        yield
        if is_stage_3:
            self.optimizer.checkpoint_event_epilogue()

    def buffers(self) -> dict[str, Tensor]:
        """What the model remembers besides its parameters, the same on all ranks: the selection biases."""
        return {
            f"{prefix}.{name}": buffer
            for prefix, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }

    # --- the buffers of DeepSpeed's optimizers ----------------------------------------------------------------------

    def _buffers(self) -> Iterator[tuple[Tensor, list[Part]]]:
        """Every tensor that the torch optimizer updates on this rank, and what lies in it."""
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            for group, buffer in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                yield buffer, self._parts_of_stage_3(group)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            for i, buffer in enumerate(optimizer.single_partition_of_fp32_groups):
                group, offsets = optimizer.round_robin_bit16_groups[i], optimizer.round_robin_bit16_offsets[i]
                yield buffer, self._parts_of_flat(group, offsets, buffer, optimizer.real_dp_process_group[i])
        elif isinstance(optimizer, BF16_Optimizer):
            for i, buffer in enumerate(optimizer.fp32_groups_flat_partition):
                group = optimizer.bf16_groups[i]
                offsets = accumulate((parameter.numel() for parameter in group), initial=0)
                yield buffer, self._parts_of_flat(group, offsets, buffer, optimizer.real_dp_process_group[i])
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(group, masters, strict=True):
                    yield master, [self._replicated(parameter)]
        else:
            assert optimizer is self.torch_optimizer, type(optimizer)
            for parameter in self.parameters:
                yield parameter, [self._replicated(parameter)]

    def _parts_of_flat(
        self, group: list[nn.Parameter], offsets: Any, buffer: Tensor, process_group: dist.ProcessGroup
    ) -> list[Part]:
        """The flattened group, with each parameter at its offset, is cut into equal parts; `buffer` is this rank's."""
        begin = dist.get_rank(group=process_group) * buffer.numel()
        end = begin + buffer.numel()
        parts = []
        for parameter, offset in zip(group, offsets, strict=False):
            first, last = max(begin - offset, 0), min(end - offset, parameter.numel())
            if first < last:
                parts.append(Part(self.places[id(parameter)], first, last - first, offset + first - begin))
        return parts

    def _parts_of_stage_3(self, group: list[nn.Parameter]) -> list[Part]:
        """Every parameter is cut into equal parts; those of this rank lie behind one another."""
        parts, begin = [], 0
        for parameter in group:
            place = self.places[id(parameter)]
            first, size = share_of_stage_3(parameter, place)
            if size:
                parts.append(Part(place, first, size, begin))
            begin += parameter.partition_numel()  # type: ignore[attr-defined]
        return parts

    def _replicated(self, parameter: nn.Parameter) -> Part:
        """Whole on every rank, and each saves its share."""
        place, rank, ranks = self.places[id(parameter)], dist.get_rank(), dist.get_world_size()
        owned = slice(rank * place.numel // ranks, (rank + 1) * place.numel // ranks)
        return Part(place, 0, place.numel, 0, owned)

    def _muon_parts(self, buffer: Tensor, parts: list[Part]) -> list[Part]:
        """What lies in Muon's momentum. ZeRO-1 and -2 keep that of whole matrices on every rank that has a part of
        them, one behind the other, since it is orthogonalised whole; with offload it is cut as the masters are."""
        if not isinstance(self.optimizer, DeepSpeedZeroOptimizer) or self.optimizer.cpu_offload:
            return parts
        sizes = [part.place.numel for part in parts]
        begins = accumulate(sizes, initial=0)
        return [
            Part(part.place, 0, size, begin, owned=slice(part.first, part.first + part.size))
            for part, size, begin in zip(parts, sizes, begins, strict=False)
        ]


def place_of(name: str, parameter: nn.Parameter, ep_size: int, ep_rank: int) -> Place:
    """Where a parameter lies in the tensor of the whole model: elsewhere than at its start for experts alone."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    numel = prod(shape)
    if not is_moe_param(parameter):
        return Place(name, shape, 0, numel)
    listed = LISTED_EXPERT.search(name)
    if listed is None:
        return Place(name, (ep_size * shape[0], *shape[1:]), ep_rank * numel, numel)
    local, experts = int(listed[1]), parameter.num_local_experts  # type: ignore[attr-defined]
    whole = (ep_size * experts, *shape)
    return Place(name[: listed.start()] + listed[2], whole, (ep_rank * experts + local) * numel, numel)


def share_of_stage_3(parameter: nn.Parameter, place: Place) -> tuple[int, int]:
    """(first element, number of elements) of this rank's part of a ZeRO-3 parameter, without its padding."""
    size = parameter.partition_numel()  # type: ignore[attr-defined]
    first = min(dist.get_rank() * size, place.numel)
    return first, min(size, place.numel - first)
