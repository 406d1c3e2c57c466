"""An experiment's runs beside each other: which legs can be compared, what they measured, what the gates say.

Everything is read from the run folders. What a run did not measure is absent, and a leg that lacks a run, or whose runs
differ in what they ran on, has no verdict but "invalid".
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from launch.experiment import FAILED, Experiment, RunState, whole_summary
from launch.loss_matched import Matched, curve_metric, match
from launch.metrics import Gate, Metric, parse_gate
from launch.noise import FEWEST_STEPS, interval_of_mean, relative_error_of_mean
from launch.results import RunResult, read_run
from launch.run_log import TAIL_STEPS
from launch.run_queue import BUSY_PERCENT
from launch.verdicts import Sample, Verdict, judge


@dataclass(frozen=True)
class Entry:
    """A run of the suite: where it stands, and what it left."""

    state: RunState
    result: RunResult | None  # None where no rank began


class Comparison:
    """All runs of an experiment by leg, and the verdicts on them."""

    def __init__(self, experiment: Experiment) -> None:
        suite = experiment.suite
        self.experiment, self.suite, self.baseline = experiment, suite, suite["baseline"]
        self.entries = [Entry(state, self.read(state)) for state in experiment.states()]
        self.entries.sort(key=lambda entry: (list(suite["legs"]).index(entry.state.run.leg), entry.state.run.repeat))
        self.legs = {name: [each for each in self.entries if each.state.run.leg == name] for name in suite["legs"]}
        self.gates = [
            parse_gate(number, gate["metric"], rule, gate[rule])
            for number, gate in enumerate(suite["gates"])
            for rule in ("at_least", "at_most", "no_worse_than")
            if gate[rule] is not None
        ]
        self.timed = suite["measure"] == "throughput"
        self.errors = {
            entry.state.run.name: relative_error_of_mean(entry.result.summary.get("tail50_step_ms", []))
            for entry in self.entries
            if entry.result is not None
        }
        self.curve_metric = curve_metric([entry.result for entry in self.entries if completed(entry) and entry.result])

    def read(self, state: RunState) -> RunResult | None:
        """What the run's last attempt left; None where no rank began."""
        if state.folder is None or whole_summary(state.folder) is None:
            return None
        return read_run(state.folder, state.run.name)

    def done(self, leg: str) -> list[RunResult]:
        """The completed runs of a leg."""
        return [entry.result for entry in self.legs[leg] if completed(entry) and entry.result is not None]

    def values(self, leg: str, name: str) -> list[float]:
        """A figure of every completed run of a leg that measured it."""
        found = [run.figure(name) for run in self.done(leg)]
        return [value for value in found if value is not None]

    def mean(self, leg: str, name: str) -> float | None:
        values = self.values(leg, name)
        return statistics.fmean(values) if values else None

    def samples(self, metric: Metric) -> dict[str, list[Sample]]:
        """What every leg measured. Side by side, speed is not measured."""
        found: dict[str, list[Sample]] = {}
        for name, entries in self.legs.items():
            found[name] = []
            for entry in entries:
                value = entry.result.figure(metric.name) if completed(entry) and entry.result is not None else None
                if value is not None and (self.timed or metric.kind != "speed"):
                    error = self.errors.get(entry.state.run.name) if metric.from_step_times else None
                    found[name].append(Sample(value, entry.state.run.seed, error))
        return found

    def interval_of_tail(self, run: RunResult) -> tuple[float, float] | None:
        """Interval of the tail-50 tok/s within a run, from the times of its steps."""
        times, speed = run.summary.get("tail50_step_ms", []), run.figure("tail50_tok_per_sec")
        interval = interval_of_mean(times)
        if interval is None or speed is None or not self.timed:
            return None
        mean = statistics.fmean(times)
        return speed * mean / interval[1], speed * mean / interval[0]

    def matched(self, leg: str) -> list[tuple[Matched, Matched]]:
        """Every completed run of a leg and the baseline's of the same repeat, at the loss that the latter ends with."""
        bases = {entry.state.run.repeat: entry.result for entry in self.legs[self.baseline] if completed(entry)}
        found = []
        for entry in self.legs[leg]:
            base = bases.get(entry.state.run.repeat)
            if completed(entry) and entry.result is not None and base is not None:
                own, its_base = (match(run, base, self.curve_metric, self.timed) for run in (entry.result, base))
                if own is not None and its_base is not None:
                    found.append((own, its_base))
        return found

    # --- verdicts ---------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """Every leg but the baseline at every gate."""
        return [self.verdict(gate, leg) for leg in self.legs if leg != self.baseline for gate in self.gates]

    def verdict(self, gate: Gate, leg: str) -> Verdict:
        for name in (self.baseline, leg):
            if (unfinished := self.unfinished(name)) is not None:
                return Verdict(gate, leg, None, None, unfinished if name == leg else f"baseline: {unfinished}")
        samples = self.samples(gate.metric)
        invalid = self.why_invalid(gate, leg, samples)
        comparable = {name: found for name, found in samples.items() if not has_no_ratio(gate.metric, found)}
        return judge(gate, comparable, leg, self.baseline, invalid)

    def unfinished(self, leg: str) -> str | None:
        """That runs of a leg are still to come; one that has failed for good counts as ended."""
        ended = [entry for entry in self.legs[leg] if entry.state.status in ("completed", "killed", *FAILED)]
        if any(not completed(entry) for entry in ended) or len(ended) == len(self.legs[leg]):
            return None
        return f"{len(ended)} of {len(self.legs[leg])} runs done"

    def why_invalid(self, gate: Gate, leg: str, samples: dict[str, list[Sample]]) -> str | None:
        for name in (leg, self.baseline):
            whose = "" if name == leg else "baseline: "
            for entry in self.legs[name]:
                if not completed(entry):
                    reason = f" ({entry.state.reason})" if entry.state.reason else ""
                    return f"{whose}repeat {entry.state.run.repeat} {entry.state.status}{reason}"
            if missing := len(self.legs[name]) - len(samples[name]):
                return f"{whose}{gate.metric.name} was not measured in {missing} of {len(self.legs[name])} runs"
            if has_no_ratio(gate.metric, samples[name]):
                return f"{whose}{gate.metric.name} is not above 0"
            for entry in self.legs[name] if gate.metric.from_step_times else []:
                tail = entry.result.figure("tail_steps") if entry.result is not None else None
                if tail is not None and tail < FEWEST_STEPS:
                    return f"{whose}repeat {entry.state.run.repeat} was timed over {tail:g} steps, which say too little"
        if gate.metric.kind == "speed" and len(self.distinct("hardware", [leg, self.baseline])) > 1:
            return "leg and baseline ran on different hardware"
        if gate.metric.name.startswith("val/") and len(self.distinct("validation data", [leg, self.baseline])) > 1:
            return "leg and baseline were validated on different data"
        if gate.metric.name.startswith("train/") and len(self.distinct("training data", [leg, self.baseline])) > 1:
            return "leg and baseline were trained on different data"
        if gate.metric.kind == "quality" and "forced" in self.distinct("routing", [leg, self.baseline]):
            return "the load of experts is forced, so that losses say nothing about a model"
        return None

    # --- what they ran on -------------------------------------------------------------------------------------------

    def distinct(self, what: str, legs: list[str]) -> dict[str, list[str]]:
        """The values of a circumstance among the runs of some legs, each with the legs that had it."""
        found: dict[str, list[str]] = {}
        for leg in legs:
            for entry in self.legs[leg]:
                for circumstances in circumstances_of(entry.result) if entry.result is not None else []:
                    if (value := circumstances.get(what)) is not None and leg not in found.setdefault(value, []):
                        found[value].append(leg)
        return found

    def warnings(self) -> list[str]:
        """What a reader must know before believing a number."""
        found = []
        for what in CIRCUMSTANCES:
            values = self.distinct(what, list(self.legs))
            if len(values) > 1:
                found.append(
                    f"{what} differs: " + "; ".join(f"{value} ({', '.join(legs)})" for value, legs in values.items())
                )
        results = [entry.result for entry in self.entries if entry.result is not None]
        if any(run.env.get("dirty") for run in results):
            found.append("the code differs from its commit in some runs (env.json has a hash of the difference)")
        if any(run.config.get("run", {}).get("data", {}).get("train") == "synthetic" for run in results):
            found.append("data is synthetic: losses say nothing about language")
        if any(run.summary.get("moe/force_balanced") for run in results):
            found.append("the load of experts is forced in some runs: their losses say nothing about a model")
        found += [
            f"{run.name} skipped {run.summary['skipped_steps']} updates (log.txt says why)"
            for run in results
            if run.summary.get("skipped_steps")
        ]
        for entry in self.entries:
            run = entry.result
            if run is not None and completed(entry) and self.timed:
                tail = int(run.figure("tail_steps") or 0)
                if tail < TAIL_STEPS:
                    resumed = ", which was resumed" if run.env.get("attempts") else ""
                    found.append(f"tail-50 figures of {run.name}{resumed} come from {tail} steps")
            if run is not None and completed(entry) and self.timed and run.env.get("attempts"):
                found.append(
                    f"{run.name} was resumed: its total time includes what was done twice, its compile time "
                    "and peak memory are of the last attempt"
                )
        for event in self.experiment.events():
            if event["event"] == "run_started" and event.get("busy_percent", 0) > BUSY_PERCENT:
                found.append(
                    f"other programs kept {event['busy_percent']:.0f}% of the cores busy before {event['run']}"
                )
        if self.suite["repeats"] == 1:
            found.append("one run a leg: the noise is not known, so no leg can be told from another")
        if not self.timed:
            found.append(
                "runs were side by side on one machine: their speed is not shown, since they disturb each other"
            )
        return found


CIRCUMSTANCES = ("hardware", "ranks", "commit", "versions", "training data", "validation data", "routing")


def circumstances_of(run: RunResult) -> list[dict[str, str]]:
    """What every attempt at a run ran on; what is not known is absent."""
    found = []
    for env in [run.env, *run.env.get("attempts", [])] if run.env else []:
        moe = run.config.get("run", {}).get("model", {}).get("moe")
        commit, packages = env.get("commit"), env.get("packages", {})
        known: dict[str, Any] = {
            "hardware": ", ".join(sorted(set(env.get("devices", [])))) or None,
            "ranks": env.get("world_size"),
            "commit": f"{commit[:10]}{'+' + env['dirty_hash'] if env.get('dirty_hash') else ''}" if commit else None,
            "versions": " ".join(f"{name} {packages[name]}" for name in ("torch", "deepspeed") if name in packages),
            "training data": fingerprint(env.get("data", {}).get("train")),
            "validation data": fingerprint(env.get("data", {}).get("val")),
            "routing": None if not moe else "forced" if moe.get("force_balanced") else "learned",
        }
        if known["hardware"] == "cpu" and env.get("cpu"):
            known["hardware"] = f"{env['cpu']}, {env.get('cpu_count_usable')} cores"
        found.append({name: str(value) for name, value in known.items() if value})
    return found


def fingerprint(value: object) -> str | None:
    """A data hash, or several, in one word."""
    return value if isinstance(value, str) or value is None else json.dumps(value, sort_keys=True)


def has_no_ratio(metric: Metric, samples: list[Sample]) -> bool:
    """Whether a figure that is compared as a ratio is 0 somewhere."""
    return metric.is_ratio and any(sample.value <= 0 for sample in samples)


def completed(entry: Entry) -> bool:
    return entry.state.status == "completed"
