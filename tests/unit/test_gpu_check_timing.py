"""tools/gpu_check/timing.py with a clock and a GPU that are made up: how often, in which order, what is reported."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch

from tools.gpu_check import timing
from tools.gpu_check.timing import Series, figures, measure, speed_over

GPU = torch.device("cuda")  # a name alone: nothing touches one


class FakeGpu:
    """Kernels take the time that they are said to take, one after the other; the host waits only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms, self.ran, self.slept = 0.0, [], []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now_ms

            def elapsed_time(self, later: Self) -> float:
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_ms / 1000)

    def step(self, name: str, ms: float) -> Any:
        def run() -> None:
            self.ran.append(name)
            self.now_ms += ms

        return run


def test_a_step_warms_up_and_is_sampled_in_rounds_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    measured = measure({"a": gpu.step("a", 2.0), "b": gpu.step("b", 1.0)}, GPU, hide_launches=True)
    assert measured["a"].ms == [pytest.approx(2.0)] * 3
    assert measured["b"].ms == [pytest.approx(1.0)] * 3
    warm_up = ["a"] * 21 + ["b"] * 21  # the last one shows how long the host takes
    assert gpu.ran == warm_up + (["a"] * 20 + ["b"] * 20) * 3
    assert len(gpu.slept) == 6
    row = figures(measured["a"], True, flops=4 * 10**9, moved_bytes=6 * 10**6)
    assert (row["iterations"], row["warm_up"], row["rounds"], row["launches"]) == (20, 20, 3, "hidden")
    assert row["tflops"] == pytest.approx(2.0)  # 4 GFLOP in 2 ms
    assert row["gb_per_s"] == pytest.approx(3.0)  # 6 MB in 2 ms
    assert speed_over(measured["b"], measured["a"]) == pytest.approx(2.0)


def test_a_slow_step_is_repeated_less_often_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    series = measure({"slow": gpu.step("slow", 300.0)}, GPU, hide_launches=False)["slow"]
    row = figures(series, False)
    assert (row["warm_up"], row["iterations"], row["launches"]) == (5, timing.FEWEST, "as they come")
    assert row["ms"] == pytest.approx(300.0)
    assert gpu.slept == []


def test_a_step_that_raises_is_left_out_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def broken() -> None:
        raise NotImplementedError("no kernel for this")

    measured = measure({"broken": broken, "fine": gpu.step("fine", 1.0)}, GPU, hide_launches=True)
    assert figures(measured["broken"], True) == {"error": "NotImplementedError: no kernel for this"}
    assert len(measured["fine"].ms) == 3
    assert speed_over(measured["fine"], measured["broken"]) is None
    assert speed_over(measured["broken"], measured["fine"]) is None
    assert speed_over(measured["fine"], None) is None


def test_a_ratio_is_the_median_of_those_within_rounds() -> None:
    assert speed_over(Series(ms=[1.0, 2.0, 4.0]), Series(ms=[2.0, 2.0, 6.0])) == 1.5
