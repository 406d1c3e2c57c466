"""The suites in ds_configs/suites/: each resolves on a machine without GPUs, and asks what it is meant to ask."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from launch.ablate import describe_suite, plans_of
from launch.run_config import REPO_ROOT, Run
from launch.run_log import TAIL_STEPS
from launch.suite import Suite, load_suite
from model.flops import flops_per_token
from model.loop import WARM_UP_STEPS

FOLDER = REPO_ROOT / "ds_configs" / "suites"
SUITES = sorted(path.stem for path in FOLDER.glob("*.json"))
TOKENS_PER_STEP = 524_288  # of the seed, on 8 GPUs


def shipped(name: str) -> Suite:
    return load_suite(FOLDER / f"{name}.json")


def runs_of(suite: Suite) -> dict[str, Run]:
    return {name: leg.run for name, leg in suite.legs.items()}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_planned_without_gpus(name: str) -> None:
    suite = shipped(name)
    legs = list(suite.legs.values())
    text = describe_suite(suite, legs, plans_of(suite, legs))
    assert all(f": {leg.question}\n" in text for leg in legs)
    missing = [leg for leg in suite.legs if f"Not here: legs.{leg}: run.launch.num_gpus=" in text]
    asks_for_gpus = not name.startswith("demo")
    assert missing == (list(suite.legs) if asks_for_gpus and not name.endswith("1gpu") else [])


@pytest.mark.parametrize("name", SUITES)
def test_every_leg_asks_something_of_its_own_and_differs_from_every_other(name: str) -> None:
    legs = list(shipped(name).legs.values())
    assert len({leg.question for leg in legs}) == len(legs)
    for one, other in itertools.combinations(legs, 2):
        assert one.differences != other.differences


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_tell_noise_and_speed(name: str) -> None:
    suite = shipped(name)
    assert suite.config.repeats >= 2, "without repeats nothing is decided"
    for run in runs_of(suite).values():
        assert run.num_steps - WARM_UP_STEPS >= TAIL_STEPS, "a tail of whole length"
        assert run.train.stop_at_step is None


@pytest.mark.parametrize("name", SUITES)
def test_no_leg_trains_on_other_tokens_than_its_baseline(name: str) -> None:
    runs = list(runs_of(shipped(name)).values())
    assert len({(run.num_steps, run.tokens_per_step, str(run.data), run.train.seed) for run in runs}) == 1


def compiled(run: Run) -> tuple[str, str]:
    """What of a leg is in FP8, in the words of the published rows, and how it is compiled."""
    fp8 = run.fp8
    if not fp8.enabled:
        return "none", run.compile.mode
    assert (fp8.dense, fp8.lm_head) == (True, True)
    return ("with experts" if fp8.experts else "without experts"), run.compile.mode


def published(suite: Suite, steps: int) -> list[dict[str, Any]]:
    assert suite.reference is not None
    assert suite.reference["tokens_per_step"] == TOKENS_PER_STEP
    return [row for row in suite.reference["rows"] if row.get("steps") == steps]


def test_the_compile_sweep_has_the_published_legs_and_steps() -> None:
    suite = shipped("seed_compile")
    rows = [row for row in published(suite, 360) if "360 steps" not in row["leg"]]  # that one was of an earlier queue
    runs = runs_of(suite)
    assert [compiled(run) for run in runs.values()] == [(row["fp8"], row["compile"]) for row in rows]
    assert suite.config.baseline == "bf16_static"
    for run in runs.values():
        assert (run.num_steps, run.tokens_per_step, run.launch.num_gpus) == (360, TOKENS_PER_STEP, 8)
        assert run.model.moe is not None
        assert run.model.moe.capacity_factor == 1.0, "as its question says"


def test_the_capacity_ablation_has_the_published_legs_and_steps() -> None:
    suite = shipped("seed_capacity")
    rows, runs = published(suite, 280), runs_of(suite)
    found = []
    for run in runs.values():
        assert run.model.moe is not None
        found.append((*compiled(run), run.model.moe.capacity_factor))
        assert (run.num_steps, run.tokens_per_step, run.launch.num_gpus) == (280, TOKENS_PER_STEP, 8)
        assert run.launch.ep_size == 1, "static and dropless go together there alone"
    assert found == [(row["fp8"], row["compile"], row["capacity_factor"]) for row in rows]
    assert suite.config.baseline == "capacity_0.0_static"


@pytest.mark.parametrize("name", ["seed_compile", "seed_capacity"])
def test_the_seeds_gates_are_those_written_down(name: str) -> None:
    more = ["total_time_min at most baseline"] if name == "seed_capacity" else []
    assert [str(gate) for gate in shipped(name).gates] == [
        "tail50_tok_per_sec at least 1.03x baseline",
        "peak_mem_mib at most 1.1x baseline",
        *more,
        "val/bpb no worse than baseline + 2 sigma",
    ]


@pytest.mark.parametrize("name", ["seed_compile", "seed_capacity"])
def test_on_one_gpu_a_suite_of_the_seed_is_that_suite_at_a_gpus_share_of_the_batch(name: str) -> None:
    eight, one = shipped(name), shipped(f"{name}_1gpu")
    assert list(one.legs) == list(eight.legs)
    assert [leg.differences for leg in one.legs.values()] == [leg.differences for leg in eight.legs.values()]
    assert one.reference == eight.reference
    plans = [plan for suite in (one, eight) for plan in plans_of(suite, list(suite.legs.values())).values()]
    assert {plan.topology.accumulation_steps for plan in plans} == {4}
    for run in runs_of(one).values():
        assert (run.launch.num_gpus, run.num_steps, run.tokens_per_step) == (1, 60, TOKENS_PER_STEP // 8)
        assert (run.data.val, run.train.eval_every, run.train.save_every) == (None, None, None)
    assert [gate.metric.kind for gate in one.gates] == ["speed", "memory"]


def test_routing_compares_every_preset_with_the_seeds() -> None:
    suite = shipped("routing")
    assert set(suite.legs) == {path.stem for path in (REPO_ROOT / "ds_configs" / "routing").glob("*.json")}
    assert suite.config.baseline == "seed"
    same_flops(suite, within=0.02)


def test_moe_against_dense_is_at_equal_flops_per_token() -> None:
    suite = shipped("moe_against_dense")
    same_flops(suite, within=0.01)
    dense = [leg for leg, run in runs_of(suite).items() if run.model.moe is None]
    assert dense == [suite.config.baseline] == ["dense"]


def same_flops(suite: Suite, within: float) -> None:
    flops = {name: flops_per_token(run.model) for name, run in runs_of(suite).items()}
    assert flops == pytest.approx(dict.fromkeys(flops, flops[suite.config.baseline]), rel=within)


def test_optimizer_moves_each_rate_both_ways_and_the_gates_optimizer() -> None:
    runs = runs_of(shipped("optimizer"))
    kinds = {name: run.deepspeed["optimizer"]["type"] for name, run in runs.items()}
    rates = {name: run.deepspeed["optimizer"]["params"] for name, run in runs.items()}
    for kind, key in (("Muon", "muon_lr"), ("AdamW", "lr")):
        name = kind.lower()
        assert [kinds[leg] for leg in (name, f"{name}_lr_half", f"{name}_lr_double")] == [kind] * 3
        assert rates[f"{name}_lr_half"][key] == rates[name][key] / 2
        assert rates[f"{name}_lr_double"][key] == rates[name][key] * 2
    assert {name for name, run in runs.items() if run.train.router_optimizer == "adamw"} == {"gates_adamw"}


def test_zero_compares_stages_and_offload() -> None:
    zero = {name: run.deepspeed["zero_optimization"] for name, run in runs_of(shipped("zero")).items()}
    assert {name: (each["stage"], "offload_optimizer" in each) for name, each in zero.items()} == {
        "zero1": (1, False),
        "zero2": (2, False),
        "offload": (2, True),
    }


def test_expert_parallelism_changes_ep_size_alone() -> None:
    suite = shipped("expert_parallelism")
    plans = plans_of(suite, list(suite.legs.values()))
    assert {name: plan.topology.ep_size for name, plan in plans.items()} == {"ep1": 1, "ep2": 2, "ep4": 4, "ep8": 8}
    assert all(list(leg.differences) in ([], ["run.launch.ep_size"]) for leg in suite.legs.values())


@pytest.mark.parametrize("name", ["routing", "optimizer", "zero", "moe_against_dense", "seed_compile", "seed_capacity"])
def test_where_ep_size_is_not_the_question_no_gpu_decides_it(name: str) -> None:
    """auto takes what fits the GPUs that it finds, leg by leg."""
    assert {run.launch.ep_size for run in runs_of(shipped(name)).values()} == {1}


def test_every_suite_has_a_row_with_its_legs_repeats_and_steps() -> None:
    readme = (REPO_ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for name in SUITES:
        suite = shipped(name)
        steps = {run.num_steps for run in runs_of(suite).values()}
        tokens = sum(suite.legs[run.leg].run.num_steps * suite.legs[run.leg].run.tokens_per_step for run in suite.runs)
        size = f"{len(suite.legs)} x {suite.config.repeats} x {max(steps)} | {tokens / 1e6:,.0f}M"
        [row] = [line for line in readme.splitlines() if line.startswith(f"| `suites/{name}.json` |")]
        assert row.endswith(f"| {size} |"), f"{name}: {size}"


def test_no_suite_names_what_is_not_there() -> None:
    """Data apart, which `make corpus` fetches."""
    for name in SUITES:
        data = {prefix for run in runs_of(shipped(name)).values() for prefix in run.data.prefixes}
        assert {Path(prefix).parent.as_posix() for prefix in data} <= {".", "data/debian-32768"}
