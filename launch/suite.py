"""One suite file = one experiment: legs that differ from a base run file, and what would decide between them.

    suite file (over its base_suite) -> legs: base -> patch of the suite -> --set -> patch of the leg
                                     -> runs: every leg as often as `repeats`, each time with another seed

Everything that can be wrong is refused here, before the first run: a leg that changes nothing, two legs that are the
same, a gate on a figure that nobody measures. No torch: a suite is planned on a laptop.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from launch.metrics import NAMED_VALIDATION, Gate, parse_gate
from launch.reference import read_reference
from launch.run_config import (
    Run,
    apply_assignment,
    join_patches,
    lay_over,
    merge_patch,
    parse_section,
    read_json,
    resolve,
)
from launch.run_config import read_with_bases as read_run_file
from model.config import ConfigError, Section

LEG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ONE_RANK = {"num_nodes": 1, "num_gpus": 1, "hostfile": None, "master_addr": None, "master_port": None}


class LegConfig(Section):
    """An entry of `legs`: one change, and the question that it answers."""

    question: str = Field(min_length=1)  # that this leg answers
    base: str | None = Field(default=None, min_length=1)  # run file instead of the suite's, relative to the suite file
    patch: dict[str, Any] = Field(default_factory=dict)  # RFC 7396, over the base with the suite's patch


class GateConfig(Section):
    """An entry of `gates`: a figure of every leg, against the baseline's or a number."""

    metric: str  # a figure of launch/metrics.py, such as tail50_tok_per_sec, peak_mem_mib or val/bpb
    at_least: float | str | None = None  # the whole interval must reach it: "1.03x baseline", or a number
    at_most: float | str | None = None  # the whole interval must stay below it
    no_worse_than: float | str | None = None  # the mean must reach it: "baseline + 2 sigma"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.bounds) != 1:
            raise ConfigError(
                f"metric={json.dumps(self.metric)}: {' and '.join(self.bounds) or 'no bound'} given. "
                "State one of at_least, at_most, no_worse_than."
            )
        return self

    @property
    def bounds(self) -> dict[str, float | str]:
        named = {"at_least": self.at_least, "at_most": self.at_most, "no_worse_than": self.no_worse_than}
        return {name: value for name, value in named.items() if value is not None}


class SuiteConfig(Section):
    """A suite file, a merge patch over the one that its `base_suite` names, if it names one.

    A path in it is relative to the file that states it.
    """

    question: str = Field(min_length=1)  # what the whole suite is to answer
    base: str = Field(min_length=1)  # run file, relative to the suite file
    patch: dict[str, Any] = Field(default_factory=dict)  # RFC 7396, over the base of every leg
    measure: Literal["throughput", "quality"] = "throughput"  # alone on the machine; or side by side, one rank each
    slots: int | Literal["auto"] = "auto"  # of quality: runs at a time; auto: a GPU each, or a core each
    repeats: int = Field(default=2, ge=1)  # runs of every leg; the noise floor comes from them
    seeds: list[int] | None = None  # of the repeats; default: the leg's run.train.seed, and on from there
    order: Literal["interleaved", "by_leg"] = "interleaved"  # interleaved: each leg once, then all again in reverse
    keep_checkpoints: bool = True  # of completed runs; false: they are removed, and the disk holds one run's at a time
    baseline: str  # the leg that the others are compared with
    legs: dict[str, LegConfig] = Field(min_length=1)  # by name, which becomes a folder
    gates: list[GateConfig] = Field(min_length=1)  # what decides, written before the first run
    reference: str | None = Field(default=None, min_length=1)  # published rows to show beside, relative to the file

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.legs:
            if not LEG_NAME.fullmatch(name):
                raise ConfigError(
                    f"legs.{name}: the name becomes a folder. Use letters, digits, '.', '_' and '-', at most 64."
                )
        if self.baseline not in self.legs:
            raise ConfigError(f"baseline={self.baseline!r} is no leg. Use one of {', '.join(self.legs)}.")
        if self.seeds is not None and len(self.seeds) != self.repeats:
            raise ConfigError(
                f"seeds={self.seeds} are {len(self.seeds)} for repeats={self.repeats}. State one for every repeat."
            )
        if isinstance(self.slots, int) and self.slots < 1:
            raise ConfigError(f"slots={self.slots} is below 1. Use a number of at least 1, or 'auto'.")
        return self

    def without_effect(self) -> dict[str, str]:
        if self.measure == "throughput":
            return {"slots": "with measure='throughput', whose runs have the machine to themselves. Remove it."}
        return {}


@dataclass(frozen=True)
class Leg:
    """A leg, resolved: what it asks, what it changes, and its runs' trees without a seed of their own."""

    name: str
    question: str
    tree: dict[str, Any]
    run: Run
    differences: dict[str, tuple[Any, Any]]  # dotted key -> (in the base, here); None: absent

    @property
    def difference_line(self) -> str:
        return "; ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in self.differences.items())


@dataclass(frozen=True)
class PlannedRun:
    """A run that a suite asks for."""

    leg: str
    repeat: int  # 1, 2, ...
    seed: int
    num_steps: int
    tree: dict[str, Any] = field(compare=False)  # the run file, resolved

    @property
    def name(self) -> str:
        return f"{self.leg}/repeat{self.repeat}"


@dataclass(frozen=True)
class Suite:
    """A suite file, resolved and checked."""

    name: str
    config: SuiteConfig
    legs: dict[str, Leg]
    gates: list[Gate]
    runs: list[PlannedRun]  # in the order in which they are to run
    base: dict[str, Any]  # the base, resolved: what differences are told against
    reference: dict[str, Any] | None  # published rows, to be shown beside

    @property
    def content(self) -> dict[str, Any]:
        """All that an answer depends on: what suite.json keeps, and what its hash covers."""
        return {
            "name": self.name,
            **self.config.model_dump(mode="json", exclude={"base", "patch", "legs", "reference"}),
            "base": self.base,
            "legs": {
                name: {
                    "question": leg.question,
                    "differences": {key: list(pair) for key, pair in leg.differences.items()},
                }
                for name, leg in self.legs.items()
            },
            "runs": [vars(run) for run in self.runs],
        }

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]


def load_suite(path: Path, assignments: list[str] | None = None) -> Suite:
    """Read, resolve and check a suite file. `assignments` are --set strings that change the base of every leg.

    Raises ConfigError, one line, for anything that can be known to be wrong before the first run.
    """
    tree, folder_of = read_suite_tree(path)
    config = parse_section(SuiteConfig, tree, "suite")
    base = with_assignments(merge_over(folder_of("base") / config.base, config.patch), assignments or [])
    trees = {}
    for name, leg in config.legs.items():
        own = base
        if leg.base is not None:
            own = merge_over(folder_of("legs", name, "base") / leg.base, config.patch)
            own = with_assignments(own, assignments or [])
        trees[name] = lay_over(copy.deepcopy(own), leg.patch)
    if config.measure == "quality":
        base, trees = on_one_rank(base), {name: on_one_rank(tree) for name, tree in trees.items()}

    resolved_base = resolved_without_names(base)
    legs = {name: resolve_leg(name, config.legs[name], trees[name], resolved_base, path.stem) for name in config.legs}
    refuse_legs_that_are_no_legs(config, legs)
    gates = [
        parse_gate(number, gate.metric, *next(iter(gate.bounds.items()))) for number, gate in enumerate(config.gates)
    ]
    for gate in gates:
        refuse_unmeasured(gate, config, legs)
    return Suite(
        name=path.stem,
        config=config,
        legs=legs,
        gates=gates,
        runs=planned_runs(config, legs),
        base=resolved_base,
        reference=read_reference_rows(folder_of("reference") / config.reference) if config.reference else None,
    )


def read_suite_tree(path: Path) -> tuple[dict[str, Any], Any]:
    """The file as a merge patch over its base_suite, and which folder a path in it is relative to."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    place: Path | None = path.resolve()
    while place is not None:
        if place in [each for each, _ in chain]:
            raise ConfigError(f"base_suite: {place.name} leads back to itself. Remove one of these `base_suite` keys.")
        tree = read_json(place, named_by=chain[-1][0] if chain else None)
        named = tree.pop("base_suite", None)
        if named is not None and not isinstance(named, str):
            raise ConfigError(f"base_suite={json.dumps(named)} in {place.name} is not a path. Name another suite file.")
        chain.append((place, tree))
        place = (place.parent / named).resolve() if named is not None else None
    merged: dict[str, Any] = {}
    for _, tree in reversed(chain):
        merged = lay_suite_over(merged, tree)

    def folder_of(*key: str) -> Path:
        """The folder of the file that states a key: the first in the chain."""
        for each, tree in chain:
            found: Any = tree
            for part in key:  # not split at dots: the name of a leg may have some
                found = found.get(part) if isinstance(found, dict) else None
            if found is not None:
                return each.parent
        return path.parent

    return merged, folder_of


def lay_suite_over(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396, but for the patches in it: a null in one of them is to delete a key of a run file, so it stays."""
    merged: dict[str, Any] = merge_patch(tree, over)
    merge_patches_of(merged, tree, over)
    if isinstance(merged.get("legs"), dict):
        for name, leg in merged["legs"].items():
            merge_patches_of(leg, *(entry_of(entry_of(each, "legs"), name) for each in (tree, over)))
    return merged


def merge_patches_of(merged: Any, tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Set `patch` of `merged`, a suite or a leg, to what those of `tree` and `over` do one after the other."""
    if isinstance(merged, dict) and isinstance(merged.get("patch"), dict):
        merged["patch"] = join_patches(entry_of(tree, "patch"), entry_of(over, "patch"))


def entry_of(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """An object within an object; {} for anything else, which is refused later."""
    found = tree.get(key)
    return found if isinstance(found, dict) else {}


def merge_over(base: Path, patch: dict[str, Any]) -> dict[str, Any]:
    return lay_over(read_run_file(base), patch)


def with_assignments(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    for assignment in assignments:
        apply_assignment(changed, assignment)
    return changed


def on_one_rank(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a quality run: a GPU, or a core, of its own."""
    return merge_patch(tree, {"run": {"launch": ONE_RANK}})


def resolved_without_names(tree: dict[str, Any]) -> dict[str, Any]:
    resolved = copy.deepcopy(resolve(tree).resolved)
    resolved["run"].pop("wandb", None)
    return resolved


def resolve_leg(name: str, config: LegConfig, tree: dict[str, Any], base: dict[str, Any], suite: str) -> Leg:
    named = {"group": suite, "job_type": "ablation"}
    stated = tree.get("run", {}).get("wandb", {}) if isinstance(tree.get("run"), dict) else {}
    stated = stated if isinstance(stated, dict) else {}
    tree = merge_patch(tree, {"run": {"wandb": {**named, **stated, "tags": [*stated.get("tags", []), name]}}})
    try:
        run = resolve(tree)
        differences = differences_between(base, resolved_without_names(tree))
    except ConfigError as error:
        raise ConfigError(f"legs.{name}: {error}") from None
    return Leg(name, config.question, tree, run, differences)


def refuse_legs_that_are_no_legs(config: SuiteConfig, legs: dict[str, Leg]) -> None:
    seen: dict[str, str] = {}
    for name, leg in legs.items():
        if leg.run.train.stop_at_step is not None:
            raise ConfigError(
                f"legs.{name}: run.train.stop_at_step={leg.run.train.stop_at_step} keeps its runs from completing. "
                "Remove it; run.train.num_steps shortens a run."
            )
        is_plain_baseline = name == config.baseline and not config.legs[name].patch and config.legs[name].base is None
        if not leg.differences and not is_plain_baseline:
            raise ConfigError(
                f"legs.{name}: equals its base, so it would answer nothing. Change its patch, or remove the leg "
                "(the baseline alone may be the base: then it states no patch)."
            )
        if config.seeds is not None and "run.train.seed" in leg.differences:
            raise ConfigError(f"legs.{name}: sets run.train.seed, and so do the suite's seeds. Remove one of them.")
        same = json.dumps(leg.differences, sort_keys=True)
        if same in seen:
            raise ConfigError(
                f"legs.{name}: is the same as legs.{seen[same]}. Remove one of them; repeats repeat a leg."
            )
        seen[same] = name


def refuse_unmeasured(gate: Gate, config: SuiteConfig, legs: dict[str, Leg]) -> None:
    """Refuse a gate on what the suite's runs will not measure."""
    where = f"gates.{gate.number}.metric={json.dumps(gate.metric.name)}"
    if gate.metric.kind == "speed" and config.measure == "quality":
        raise ConfigError(
            f"{where}: runs side by side disturb each other's speed. Use measure='throughput', or another metric."
        )
    for name, leg in legs.items():
        if gate.metric.name.startswith("val/") and leg.run.data.val is None:
            raise ConfigError(f"{where}: legs.{name} has no validation data. Name run.data.val, or use another metric.")
        named = NAMED_VALIDATION.fullmatch(gate.metric.name)
        if named and (not isinstance(leg.run.data.val, dict) or named["name"] not in leg.run.data.val):
            raise ConfigError(
                f"{where}: legs.{name} has no validation data named {named['name']}. Name it, as in "
                f'run.data.val={{"{named["name"]}": "data/val"}}, or use another metric.'
            )
        if gate.metric.name == "time/compile_s" and leg.run.compile.mode == "none":
            raise ConfigError(f"{where}: legs.{name} has run.compile.mode='none'. Compile it, or use another metric.")
        if gate.metric.name.startswith("moe/") and leg.run.model.moe is None:
            raise ConfigError(f"{where}: legs.{name} has no experts. Use another metric.")


def read_reference_rows(path: Path) -> dict[str, Any]:
    """The rows as they stand in their file, once they are known to be good: suite.json keeps them."""
    return read_reference(path).model_dump(mode="json", exclude_none=True)


def planned_runs(config: SuiteConfig, legs: dict[str, Leg]) -> list[PlannedRun]:
    """The runs in their order. Interleaved, every second round runs backwards, so that a machine that grows slower or
    faster over hours favours no leg."""
    runs = []
    for repeat in range(1, config.repeats + 1):
        of_round = []
        for name, leg in legs.items():
            seed = config.seeds[repeat - 1] if config.seeds is not None else leg.run.train.seed + repeat - 1
            patch = {"run": {"train": {"seed": seed}, "wandb": {"name": f"{name}-repeat{repeat}"}}}
            run = resolve(merge_patch(leg.tree, patch))
            of_round.append(PlannedRun(name, repeat, seed, run.num_steps, run.resolved))
        runs += of_round if repeat % 2 else of_round[::-1]
    if config.order == "by_leg":
        runs.sort(key=lambda run: (list(legs).index(run.leg), run.repeat))
    return runs


def differences_between(base: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in base, value in other), for the keys whose values differ; None: absent."""
    if not isinstance(base, dict) or not isinstance(other, dict):
        return {prefix: (base, other)} if base != other else {}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*base, *(key for key in other if key not in base)]:
        found |= differences_between(base.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def shown(value: Any) -> str:
    """A value in one line; of a whole section only that it is there."""
    if value is None or isinstance(value, dict):
        return "absent" if value is None else "{...}"
    return value if isinstance(value, str) else json.dumps(value)
