"""The figures that a gate may name: which way is better, what kind of noise they have, and how a bound reads."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ConfigError

Kind = Literal["speed", "memory", "quality"]


@dataclass(frozen=True)
class Metric:
    """A figure of summary.json.

    Speed and memory are compared as ratios, quality as differences. Repeats of quality need seeds of their own: a run
    repeated with its seed repeats its loss, which says nothing of its noise.
    """

    name: str
    kind: Kind
    higher_is_better: bool = False
    from_step_times: bool = False  # its noise within a run is that of the times of steps

    @property
    def is_ratio(self) -> bool:
        return self.kind != "quality"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("tail50_tok_per_sec", "speed", higher_is_better=True, from_step_times=True),
        Metric("tail50_tok_per_sec_per_gpu", "speed", higher_is_better=True, from_step_times=True),
        Metric("tail50_mfu", "speed", higher_is_better=True, from_step_times=True),
        Metric("tail50_dt_ms", "speed", from_step_times=True),
        Metric("time/compile_s", "speed"),
        Metric("total_time_min", "speed"),
        Metric("peak_mem_mib", "memory"),
        Metric("val/bpb", "quality"),
        Metric("val/loss", "quality"),
        Metric("train/loss", "quality"),
        Metric("moe/dropped_frac", "quality"),
        Metric("moe/load_max_over_mean", "quality"),
        Metric("moe/load_cv", "quality"),
        Metric("moe/dead_experts", "quality"),
    )
}
NAMED_VALIDATION = re.compile(r"val/(?P<name>[A-Za-z0-9_-]+)/(loss|bpb)")  # run.data.val={"name": prefix}


def metric_named(name: str) -> Metric | None:
    return METRICS.get(name) or (Metric(name, "quality") if NAMED_VALIDATION.fullmatch(name) else None)


@dataclass(frozen=True)
class Bound:
    """factor * baseline + sigmas * sigma, or a number: factor 0 and that offset."""

    factor: float
    sigmas: float
    offset: float


@dataclass(frozen=True)
class Gate:
    """A metric of every leg and the bound that it has to keep."""

    number: int  # its place in the file
    metric: Metric
    rule: Literal["at_least", "at_most", "no_worse_than"]
    text: str  # the bound, as written
    bound: Bound

    def __str__(self) -> str:
        return f"{self.metric.name} {self.rule.replace('_', ' ')} {self.text}"


NUMBER = r"[0-9]+(?:\.[0-9]+)?"
BOUND = re.compile(rf"(?:(?P<factor>{NUMBER})x )?baseline(?: (?P<sign>[+-]) (?P<sigmas>{NUMBER}) sigma)?")
BOUND_FORMS = '"1.03x baseline", "baseline + 2 sigma", "baseline" or a number'


def parse_gate(number: int, name: str, rule: Any, stated: float | str) -> Gate:
    """A gate from its entry in a suite file. Raises ConfigError for an unknown metric or a bound of no known form."""
    where = f"gates.{number}"
    metric = metric_named(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        way_out = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(METRICS)}."
        raise ConfigError(f"{where}.metric={json.dumps(name)} is no figure that runs are compared by. {way_out}")
    if isinstance(stated, int | float):
        return Gate(number, metric, rule, f"{stated:g}", Bound(0.0, 0.0, float(stated)))
    match = BOUND.fullmatch(" ".join(stated.split()))
    if match is None:
        raise ConfigError(f"{where}.{rule}={json.dumps(stated)}: should be {BOUND_FORMS}.")
    sigmas = float(match["sigmas"] or 0) * (-1 if match["sign"] == "-" else 1)
    towards_worse = sigmas < 0 if metric.higher_is_better else sigmas > 0
    if rule == "no_worse_than" and sigmas and not towards_worse:
        raise ConfigError(
            f"{where}.{rule}={json.dumps(stated)}: {name} is better when "
            f"{'higher' if metric.higher_is_better else 'lower'}, so what is no worse may lie on the other side of the "
            f"baseline. Use {'-' if metric.higher_is_better else '+'}."
        )
    return Gate(number, metric, rule, stated, Bound(float(match["factor"] or 1), sigmas, 0.0))
