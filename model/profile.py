"""Where the time of a step goes: a trace of some steps, and their time by part.

    part("experts")   marks what runs inside it; without a profile this is the test of a flag
    forward           an operator belongs to the innermost mark around it
    backward          an autograd node belongs to the part of the operator that made it: torch's profiler gives both the
                      same sequence number. What activation checkpointing repeats runs through the same marks again.
    all-to-all        the operators moelab::all_to_all..., wherever they run
    other             the rest of the step, so that the parts sum to it

On a CPU the step is the wall time of the thread that trains, and an operator counts without the operators inside it. On
a GPU the step ends with its last kernel; an instant belongs to the kernel that runs, to a collective only where nothing
else does, and to "other" where nothing runs. (No GPU has run this yet.)

A compiled block is one graph, whose kernels mix parts, so its time stays in one line. What is inside is measured beside
it: forward and backward of one micro-batch with the blocks uncompiled, without an update.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from model.loop import WARM_UP_STEPS

OTHER, COMPILED, ALL_TO_ALL, IDLE = "other", "compiled blocks", "all-to-all", "idle"
PARTS = (
    "attention",
    "router",
    "dispatch",
    "experts",
    "mlp",  # of dense layers; shared experts
    "combine",
    ALL_TO_ALL,
    "head and loss",
    COMPILED,
    "optimizer",
    "data",
    OTHER,
)
STEP, BLOCK = "step", "block"  # marks around all that is divided, and around a block from outside of its graph
PREFIX = "part: "
FOREVER = 2**63  # in nanoseconds
# cudaEventRecord, cuLaunchKernel ...: where no operator made the call it has no link, a number that is no operator's
# though it may be equal to one, and the thread that stopped the profiler instead of its own.
RUNTIME_CALL = re.compile(r"cu(da)?[A-Z]")

_marking = False  # whether this process records a profile


def part(name: str) -> AbstractContextManager[Any]:
    """Count what runs inside to a part. In a compiled region nothing happens, and nothing is compiled again for it."""
    if torch.compiler.is_compiling() or not _marking:
        return contextlib.nullcontext()
    assert name in (*PARTS, STEP, BLOCK)
    return record_function(PREFIX + name)


# --- from events to parts -------------------------------------------------------------------------------------------


class HostEvent(NamedTuple):
    """A mark, an operator or an autograd node; times in nanoseconds."""

    name: str
    start: int
    end: int
    id: int  # by which a kernel names what launched it
    thread: int
    sequence: int = -1  # of the autograd node that this makes or runs; -1 for none
    forward_thread: int = 0  # of a node that runs: where it was made


class DeviceEvent(NamedTuple):
    """A kernel or a copy on a GPU; times in nanoseconds."""

    name: str
    start: int
    end: int
    launched_by: int


class Times(NamedTuple):
    """What the marks called STEP enclose, in nanoseconds."""

    total: int
    own: Counter[tuple[str, str]]  # by part and name of the event, without the events inside it; they sum to the total

    def parts(self) -> Counter[str]:
        parts = Counter[str]()
        for (name, _), time in self.own.items():
            parts[name] += time
        return parts


class Open(NamedTuple):
    """An event that has begun."""

    end: int
    name: str
    part: str
    step_end: int  # of the step that it is in; 0 for none


def divide(host: Iterable[HostEvent], device: list[DeviceEvent] | None, compiled: bool) -> Times:
    """The time of the steps by part. `device` is None where the host computes."""
    parts_of_events: dict[int, str] = {}
    parts_of_nodes: dict[tuple[int, int], str] = {}  # by the thread that made an autograd node, and its sequence number
    threads: dict[int, HostThread] = defaultdict(HostThread)
    steps: list[tuple[int, int]] = []
    for event in sorted(host, key=lambda event: (event.start, -event.end)):
        around = threads[event.thread].advance(event.start)
        step_end = around.step_end
        if event.name == PREFIX + STEP:
            step_end = event.end
            steps.append((event.start, event.end))
        parts_of_events[event.id] = part_of(event, around.part, parts_of_nodes, compiled)
        begun = Open(min(event.end, step_end or event.end), event.name, parts_of_events[event.id], step_end)
        threads[event.thread].open_events.append(begun)
    own = Counter[tuple[str, str]]()
    if device is not None:
        own = time_on_device(device, steps, parts_of_events)
    else:
        for thread in threads.values():
            thread.advance(max(end for _, end in steps))
            own.update(thread.own)
    return Times(sum(end - start for start, end in steps), own)


class HostThread:
    """A thread's events: every instant of a step belongs to the event begun last of those that have not ended.

    They need not lie inside each other: under a dispatch mode a mark begins in one event and ends in another.
    """

    def __init__(self) -> None:
        self.open_events = [Open(FOREVER, "", OTHER, 0)]
        self.now = 0
        self.own = Counter[tuple[str, str]]()  # time in steps by part and name

    def advance(self, moment: int) -> Open:
        """Go on to a moment; returns the event that is innermost there."""
        while (innermost := self.open_events[-1]).end <= moment:
            self._spend(innermost, innermost.end)
            self.open_events.pop()
        self._spend(innermost, moment)
        return innermost

    def _spend(self, event: Open, until: int) -> None:
        if until > self.now:
            if event.step_end:
                self.own[event.part, event.name] += until - self.now
            self.now = until


def part_of(event: HostEvent, around: str, nodes: dict[tuple[int, int], str], compiled: bool) -> str:
    """The part of an event inside a part; notes in `nodes` the part of the autograd node that it may make."""
    name = event.name.removeprefix(PREFIX)
    if name != event.name:
        return {STEP: OTHER, BLOCK: COMPILED if compiled else OTHER}.get(name, name)
    if event.forward_thread:  # a node runs; the gradient of a weight (no sequence number) was made by no operator
        return nodes.get((event.forward_thread, event.sequence), around)
    found = ALL_TO_ALL if name.startswith("moelab::all_to_all") else around
    if event.sequence >= 0:  # what makes no node leaves the number to the next operator, whose word is the last
        nodes[event.thread, event.sequence] = found
    return found


def time_on_device(
    events: list[DeviceEvent], steps: list[tuple[int, int]], parts_of_events: dict[int, str]
) -> Counter[tuple[str, str]]:
    """Every instant of the steps, to the kernel that runs: of several a computing one first, then the one begun first.

    The device is waited for before and after a step, so what begins in a step belongs to it.
    """
    own = Counter[tuple[str, str]]()
    for begun, ended in steps:
        waiting = [event for event in events if begun <= event.start < ended]
        waiting.sort(key=lambda event: event.start, reverse=True)
        moments = {begun, ended}.union(*((event.start, min(event.end, ended)) for event in waiting))
        running: list[tuple[bool, int, int, str, str]] = []
        for moment, following in itertools.pairwise(sorted(moments)):
            while waiting and waiting[-1].start <= moment:
                event = waiting.pop()
                label = (parts_of_events.get(event.launched_by, OTHER), event.name)
                heapq.heappush(running, (event.name.startswith("nccl"), event.start, event.end, *label))
            while running and running[0][2] <= moment:
                heapq.heappop(running)
            own[running[0][3:] if running else (OTHER, IDLE)] += following - moment
    return own


def events_of(profiler: profile, on_gpu: bool) -> tuple[list[HostEvent], list[DeviceEvent] | None]:
    """What torch recorded. The events that it makes of these for its own tables cost minutes where there are many."""
    host, device = [], []
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        start, end = event.start_ns(), event.start_ns() + event.duration_ns()
        if event.device_type() != DeviceType.CPU:
            if not event.is_user_annotation():  # a mark, seen on the device
                device.append(DeviceEvent(event.name(), start, end, event.linked_correlation_id()))
        elif event.linked_correlation_id() == 0 and event.start_thread_id() == event.end_thread_id():
            if RUNTIME_CALL.match(event.name()):
                continue
            thread, sequence = event.start_thread_id(), event.sequence_nr()
            host.append(
                HostEvent(event.name(), start, end, event.correlation_id(), thread, sequence, event.fwd_thread_id())
            )
    return host, device if on_gpu else None


# --- the profile of a run -------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What profile_steps found on this rank."""

    first_step: int
    last_step: int
    device: str
    step: Times
    uncompiled: Times | None  # of as many micro-batches as steps, where the run's blocks are compiled

    def figures(self) -> dict[str, Any]:
        """For a program. A part that this run does not have is absent."""
        steps = self.last_step - self.first_step + 1
        found: dict[str, Any] = {"first_step": self.first_step, "last_step": self.last_step, "device": self.device}
        found |= {"step_ms": self.step.total / steps / 1e6, "parts_ms": milliseconds(self.step, steps)}
        others = Counter({name: time for (part, name), time in self.step.own.items() if part == OTHER})
        shown = {PREFIX + STEP: "between operators"}
        found["most_of_other_ms"] = {shown.get(name, name): time / steps / 1e6 for name, time in others.most_common(5)}
        if self.uncompiled is not None:
            found["uncompiled_micro_step_ms"] = self.uncompiled.total / steps / 1e6
            found["uncompiled_parts_ms"] = milliseconds(self.uncompiled, steps)
        return found

    def markdown(self) -> str:
        """For a person."""
        found = self.figures()
        meaning = (
            "an instant belongs to the kernel that runs, to a collective only where nothing else does"
            if self.device == "cuda"
            else "wall time of the thread that trains, waiting for other ranks included"
        )
        lines = [
            f"Steps {self.first_step} to {self.last_step} on rank 0, which profiling makes slower: {meaning}. Forward "
            "and backward together.",
            "",
            *table("ms per step", found["parts_ms"], found["step_ms"]),
            "",
            f"Most of {OTHER}: "
            + ", ".join(f"{name} {time:.2f} ms" for name, time in found["most_of_other_ms"].items()),
        ]
        if self.uncompiled is not None:
            lines += [
                "",
                "Compiled blocks cannot be divided: of their parts the table above knows what runs outside of their "
                "graphs. The same blocks UNCOMPILED, a micro-batch forward and backward, without an update:",
                "",
                *table("ms per micro-step", found["uncompiled_parts_ms"], found["uncompiled_micro_step_ms"]),
            ]
        return "\n".join(lines) + "\n"


def milliseconds(times: Times, steps: int) -> dict[str, float]:
    """Of every part, per step."""
    parts = times.parts()
    return {name: parts[name] / steps / 1e6 for name in PARTS if parts[name]}


def table(unit: str, times: dict[str, float], total: float) -> list[str]:
    rows = [*times.items(), ("sum", total)]
    lines = [f"| part | {unit} | share |", "|---|---:|---:|"]
    return lines + [f"| {name} | {time:.2f} | {100 * time / total:.1f}% |" for name, time in rows]


class StepProfile:
    """Profiles `steps` steps of an attempt, those after its warm-up; on ranks that do not record they just run.

    The last step of the warm-up warms up the profiler too. `done` gets the report, and the profiler for its trace.
    """

    def __init__(
        self,
        steps: int,
        first_step: int,
        model: nn.Module,
        device: torch.device,
        records: bool,
        done: Callable[[Report, profile], None],
    ) -> None:
        self.steps, self.first_step, self.model, self.records, self.done = steps, first_step, model, records, done
        self.on_gpu = torch.device(device).type == "cuda"
        # what nn.Module.compile leaves behind
        self.compiled = any(module._compiled_call_impl is not None for module in model.modules())
        self.uncompiled: Times | None = None
        self.taken = 0  # steps of this attempt
        self.profiler: profile | None = None

    @property
    def begins(self) -> bool:
        """Whether the profiler starts with the step to come."""
        return self.steps > 0 and self.taken == WARM_UP_STEPS - 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around every step of the attempt."""
        if self.begins and self.records:
            self.profiler = self._start(self.steps, self._report)
        with self._mark():
            yield
        self.taken += 1
        if self.profiler is not None:
            self.profiler.step()  # after the last step this makes the report
        if self.taken == WARM_UP_STEPS + self.steps:
            self.close()

    def close(self) -> bool:
        """Record no more; whether all steps that were to be profiled have been. Otherwise there is no report."""
        if self.profiler is not None:
            self.profiler.on_trace_ready = None
            self._stop(self.profiler)
            self.profiler = None
        return self.steps == 0 or self.taken >= WARM_UP_STEPS + self.steps

    def time_uncompiled(self, batch: tuple[Tensor, ...]) -> None:
        """Forward and backward of a micro-batch with the blocks uncompiled: once to warm up, then as often as steps.

        All ranks call this. The gradients go nowhere: neither .grad nor DeepSpeed's hooks see them.
        """
        recorder = self._start(self.steps, self._keep_uncompiled) if self.records else None
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with torch.compiler.set_stance("force_eager"):
            for _ in range(1 + self.steps):
                with self._mark():
                    loss, _stats = self.model(*batch)
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                if recorder is not None:
                    recorder.step()
        if recorder is not None:
            self._stop(recorder)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()  # the peak shall be that of the steps

    def _start(self, steps: int, ready: Callable[[profile], None]) -> profile:
        global _marking
        _marking = True
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
        profiler = profile(activities=activities, schedule=plan, on_trace_ready=ready)
        profiler.start()
        return profiler

    def _stop(self, profiler: profile) -> None:
        global _marking
        _marking = False
        profiler.stop()

    @contextlib.contextmanager
    def _mark(self) -> Iterator[None]:
        waits = _marking and self.on_gpu
        if waits:
            torch.cuda.synchronize()
        with part(STEP):
            yield
            if waits:
                torch.cuda.synchronize()

    def _keep_uncompiled(self, profiler: profile) -> None:
        self.uncompiled = divide(*events_of(profiler, self.on_gpu), compiled=False)

    def _report(self, profiler: profile) -> None:
        times = divide(*events_of(profiler, self.on_gpu), compiled=self.compiled)
        first = self.first_step + WARM_UP_STEPS
        device = "cuda" if self.on_gpu else "cpu"
        self.done(Report(first, first + self.steps - 1, device, times, self.uncompiled), profiler)
