"""Suite files: what a leg comes from, which runs follow and in which order, and what is refused with which line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_run_config import VALID, model, moe, train, write

from launch.metrics import METRICS, parse_gate
from launch.run_config import REPO_ROOT, join_patches, lay_over, merge_patch
from launch.suite import Suite, differences_between, load_suite
from model.config import ConfigError

LEGS: dict[str, Any] = {
    "plain": {"question": "The baseline"},
    "top1": {"question": "One expert?", "patch": moe(top_k=1)},
    "long": {"question": "Longer?", "patch": train(num_steps=20)},
}
SUITE: dict[str, Any] = {
    "question": "Does it work?",
    "base": "run.json",
    "baseline": "plain",
    "legs": LEGS,
    "gates": [{"metric": "tail50_tok_per_sec", "at_least": "1.03x baseline"}],
}


def suite_file(folder: Path, **changed: Any) -> Path:
    """SUITE with other keys, and some keys of its legs, beside the run file that it names. None takes away."""
    legs = {name: {**LEGS.get(name, {}), **stated} for name, stated in changed.get("legs", {}).items() if stated}
    gone = [name for name, stated in changed.get("legs", {}).items() if stated is None]
    legs = {name: without_none(each) for name, each in {**LEGS, **legs}.items() if name not in gone}
    if not (folder / "run.json").exists():
        write(folder / "run.json", VALID)
    return write(folder / "suite.json", without_none({**SUITE, **changed, "legs": legs}))


def without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def load(folder: Path, *assignments: str, **changed: Any) -> Suite:
    return load_suite(suite_file(folder, **changed), list(assignments))


def leg(patch: dict[str, Any]) -> dict[str, Any]:
    """A change to SUITE: what its leg `top1` does instead."""
    return {"legs": {"top1": {"patch": patch}}}


# --- where a leg comes from -------------------------------------------------------------------------------------------


def test_a_leg_is_its_base_then_the_suites_patch_then_its_own(tmp_path: Path) -> None:
    write(tmp_path / "other.json", merge_patch(VALID, train(num_steps=7, seed=7, log_every=7)))
    legs = {"top1": {"base": "other.json", "patch": train(num_steps=9)}}
    suite = load(tmp_path, patch=train(num_steps=8, seed=8), legs=legs)
    plain, other = suite.legs["plain"].run.train, suite.legs["top1"].run.train
    assert (plain.num_steps, plain.seed, plain.log_every) == (8, 8, 10)
    assert (other.num_steps, other.seed, other.log_every) == (9, 8, 7)


def test_a_path_is_relative_to_the_file_that_states_it(tmp_path: Path) -> None:
    write(tmp_path / "a" / "runs" / "run.json", merge_patch(VALID, train(seed=1)))
    write(tmp_path / "b" / "runs" / "leg.json", merge_patch(VALID, train(seed=2)))
    write(tmp_path / "a" / "rows.json", json.loads((REPO_ROOT / "benchmarks" / "seed_h800.json").read_text()))
    write(tmp_path / "a" / "suite.json", {**SUITE, "base": "runs/run.json", "reference": "rows.json"})
    legs = {"long": {"base": "runs/leg.json"}}
    suite = load_suite(write(tmp_path / "b" / "suite.json", {"base_suite": "../a/suite.json", "legs": legs}))
    assert (suite.legs["plain"].run.train.seed, suite.legs["long"].run.train.seed) == (1, 2)
    assert suite.reference is not None
    assert suite.reference["hardware"] == "8x H800"


def test_a_leg_with_a_dot_in_its_name_has_its_base_beside_the_file_that_states_it(tmp_path: Path) -> None:
    write(tmp_path / "a" / "run.json", VALID)
    write(tmp_path / "a" / "leg.json", merge_patch(VALID, train(seed=2)))
    legs = {**LEGS, "seed_1.25": {"question": "Another seed?", "base": "leg.json"}}
    write(tmp_path / "a" / "suite.json", {**SUITE, "legs": legs})
    suite = load_suite(write(tmp_path / "b" / "suite.json", {"base_suite": "../a/suite.json"}))
    assert suite.legs["seed_1.25"].run.train.seed == 2


def test_a_suite_is_a_merge_patch_over_its_base_suite(tmp_path: Path) -> None:
    suite_file(tmp_path, patch=train(num_steps=8, log_every=2))
    over = {"base_suite": "suite.json", "question": "And so?", "patch": train(num_steps=4), "legs": {"long": None}}
    middle = load_suite(write(tmp_path / "middle.json", over))
    assert (list(middle.legs), middle.config.question) == (["plain", "top1"], "And so?")
    top = {"base_suite": "middle.json", "repeats": 1, "gates": [{"metric": "val/bpb", "at_most": 2}]}
    suite = load_suite(write(tmp_path / "top.json", top))
    assert (suite.name, list(suite.legs), len(suite.runs)) == ("top", ["plain", "top1"], 2)
    assert [str(gate) for gate in suite.gates] == ["val/bpb at most 2"], "lists replace as a whole"
    assert (suite.legs["top1"].run.num_steps, suite.legs["top1"].run.train.log_every) == (4, 2)


DENSE = {"question": "Dense?", "patch": model(moe=None, ffn_hidden_size=64)}


def test_null_in_a_patch_deletes_from_the_run_file(tmp_path: Path) -> None:
    write(tmp_path / "run.json", merge_patch(VALID, train(eval_every=5, save_every=5)))
    suite = load(tmp_path, patch=train(eval_every=None), legs={"dense": DENSE})
    assert suite.legs["dense"].run.model.moe is None
    assert [suite.legs["plain"].run.train.eval_every, suite.legs["plain"].run.train.save_every] == [None, 5]


def test_null_in_a_patch_deletes_from_the_run_file_through_a_chain_of_suites(tmp_path: Path) -> None:
    write(tmp_path / "run.json", merge_patch(VALID, train(eval_every=5, save_every=5)))
    suite_file(tmp_path, patch=train(eval_every=None), legs={"dense": DENSE})
    over = {"base_suite": "suite.json", "patch": train(save_every=None)}
    ours = load_suite(write(tmp_path / "over.json", over)).legs["dense"].run
    assert (ours.model.moe, ours.train.eval_every, ours.train.save_every) == (None, None, None)


def test_null_for_a_whole_patch_of_a_base_suite_takes_it_away(tmp_path: Path) -> None:
    suite_file(tmp_path, patch=train(num_steps=8))
    suite = load_suite(write(tmp_path / "over.json", {"base_suite": "suite.json", "patch": None}))
    assert suite.legs["plain"].run.num_steps == 10


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, {"b": None}),
        ({"a": None}, {"a": 1}),
        ({"a": {"b": None, "c": 1}}, {"a": {"c": None, "d": {"e": None}}}),
        ({"a": {"b": 1}}, {"a": None}),
        ({"a": [1]}, {"a": [2]}),
        (train(num_steps=3), train(target_tokens=1000)),
        (train(num_steps=3), train(num_steps=None, target_tokens=1000)),
        (train(num_steps=3), {"run": 5}),
        ({"run": 5}, train(num_steps=3)),
    ],
)
def test_two_patches_joined_do_what_they_do_one_after_the_other(first: Any, second: Any) -> None:
    tree = {"a": {"b": 5, "d": {"e": 6}}, "b": 7}
    assert lay_over(tree, join_patches(first, second)) == lay_over(lay_over(tree, first), second)


def test_a_horizon_in_a_patch_replaces_the_inherited_one(tmp_path: Path) -> None:
    suite = load(tmp_path, patch=train(target_tokens=8 * 16 * 5))
    assert [leg.run.num_steps for leg in suite.legs.values()] == [5, 5, 20]
    over = {"base_suite": "suite.json", "patch": train(num_steps=3)}
    assert load_suite(write(tmp_path / "over.json", over)).legs["plain"].run.num_steps == 3


def test_set_changes_the_base_of_every_leg_and_a_legs_patch_wins(tmp_path: Path) -> None:
    write(tmp_path / "other.json", VALID)
    legs = {"other": {"question": "Another base?", "base": "other.json", "patch": train(seed=4)}}
    suite = load(tmp_path, "run.train.num_steps=5", patch=train(num_steps=8, log_every=2), legs=legs)
    steps = {name: leg.run.num_steps for name, leg in suite.legs.items()}
    assert steps == {"plain": 5, "top1": 5, "long": 20, "other": 5}
    assert suite.base["run"]["train"]["num_steps"] == 5, "differences are told against the base with --set"
    assert "run.train.num_steps" not in suite.legs["top1"].differences


def test_runs_belong_together_in_wandb_and_keep_what_the_file_says(tmp_path: Path) -> None:
    suite = load(tmp_path, patch={"run": {"wandb": {"project": "mine", "tags": ["a"], "group": "ours"}}})
    stated = suite.runs[1].tree["run"]["wandb"]
    assert {key: stated[key] for key in ("project", "group", "job_type", "name", "tags")} == {
        "project": "mine",
        "group": "ours",
        "job_type": "ablation",
        "name": "top1-repeat1",
        "tags": ["a", "top1"],
    }
    assert load(tmp_path).runs[0].tree["run"]["wandb"]["group"] == "suite"


# --- what differs -----------------------------------------------------------------------------------------------------


def test_differences_are_those_of_resolved_values(tmp_path: Path) -> None:
    differences = load(tmp_path, **leg(moe(capacity_factor=0))).legs["top1"].differences
    assert differences["run.model.moe.capacity_factor"] == (1.0, 0.0)
    assert differences["run.model.moe.expert_backend"] == ("bmm", "grouped"), "a default that follows"
    assert differences["run.model.moe.min_capacity"] == (4, None), "a key that has no effect any more"


def test_a_default_that_a_leg_states_is_no_difference(tmp_path: Path) -> None:
    differences = load(tmp_path, **leg(moe(top_k=1, capacity_factor=1.0))).legs["top1"].differences
    assert differences == {"run.model.moe.top_k": (2, 1), "run.model.moe.norm_topk_prob": (True, False)}


def test_a_whole_section_that_comes_or_goes_is_one_difference(tmp_path: Path) -> None:
    found = differences_between({"a": {"b": 1}, "c": 2}, {"c": 2, "d": {"e": 3, "f": 4}})
    assert found == {"a": ({"b": 1}, None), "d": (None, {"e": 3, "f": 4})}
    line = "run.model.ffn_hidden_size absent -> 64; run.model.moe {...} -> absent"
    assert load(tmp_path, legs={"dense": DENSE}).legs["dense"].difference_line == line


# --- which runs follow ------------------------------------------------------------------------------------------------


def names(suite: Suite) -> list[str]:
    return [run.name for run in suite.runs]


def test_interleaved_runs_every_leg_once_and_then_all_again_in_reverse(tmp_path: Path) -> None:
    first, second = ["plain/repeat1", "top1/repeat1", "long/repeat1"], ["long/repeat2", "top1/repeat2", "plain/repeat2"]
    assert names(load(tmp_path)) == first + second
    third = ["plain/repeat3", "top1/repeat3", "long/repeat3"]
    assert names(load(tmp_path, repeats=3)) == first + second + third


def test_by_leg_runs_all_repeats_of_a_leg_before_the_next(tmp_path: Path) -> None:
    assert names(load(tmp_path, order="by_leg", legs={"long": None})) == [
        "plain/repeat1", "plain/repeat2", "top1/repeat1", "top1/repeat2",
    ]  # fmt: skip


def seeds_of(suite: Suite, leg: str) -> list[int]:
    runs = sorted((run.repeat, run.seed, run.tree["run"]["train"]["seed"]) for run in suite.runs if run.leg == leg)
    assert all(seed == in_the_file for _, seed, in_the_file in runs)
    return [seed for _, seed, _ in runs]


def test_repeats_take_the_seed_of_their_leg_and_those_after_it(tmp_path: Path) -> None:
    suite = load(tmp_path, patch=train(seed=5), repeats=3, **leg(train(seed=40)))
    assert (seeds_of(suite, "plain"), seeds_of(suite, "top1")) == ([5, 6, 7], [40, 41, 42])


def test_seeds_that_a_suite_states_are_those_of_all_legs(tmp_path: Path) -> None:
    suite = load(tmp_path, seeds=[9, 3], patch=train(seed=5))
    assert [seeds_of(suite, name) for name in suite.legs] == [[9, 3]] * 3


def test_a_run_is_the_file_of_its_leg_but_for_seed_and_name(tmp_path: Path) -> None:
    suite = load(tmp_path)
    for run in suite.runs:
        tree = merge_patch(suite.legs[run.leg].run.resolved, train(seed=run.seed))
        tree["run"]["wandb"]["name"] = f"{run.leg}-repeat{run.repeat}"
        assert run.tree == tree


def test_runs_of_quality_get_one_rank_each_wherever_their_leg_comes_from(tmp_path: Path) -> None:
    eight = {"run": {"launch": {"num_nodes": 2, "num_gpus": 8, "hostfile": "hosts", "master_port": 2000}}}
    write(tmp_path / "other.json", merge_patch(VALID, eight))
    legs = {"long": {"base": "other.json"}}
    suite = load(tmp_path, measure="quality", patch=eight, gates=[{"metric": "val/bpb", "at_most": 2}], legs=legs)
    for run in suite.runs:
        stated = run.tree["run"]["launch"]
        assert (stated["num_nodes"], stated["num_gpus"], stated["master_port"]) == (1, 1, None)
        assert "hostfile" not in stated
    assert load(tmp_path, patch=eight).runs[0].tree["run"]["launch"]["num_gpus"] == 8


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_the_hash_stays_where_the_file_lies_and_how_it_is_written(tmp_path: Path) -> None:
    here = load(tmp_path / "a").hash
    assert load(tmp_path / "b" / "c").hash == here
    write(tmp_path / "d" / "runs" / "run.json", VALID)
    tree = {**dict(reversed(SUITE.items())), "base": "runs/run.json", "patch": moe(capacity_factor=1.0), "repeats": 2}
    assert load_suite(write(tmp_path / "d" / "suite.json", tree)).hash == here


@pytest.mark.parametrize(
    "changed",
    [
        {"question": "Another?"},
        {"repeats": 3},
        {"seeds": [3, 4]},
        {"order": "by_leg"},
        {"gates": [{"metric": "peak_mem_mib", "at_least": "1.03x baseline"}]},
        {"patch": train(seed=1)},
        {"legs": {"long": {"question": "Another?"}}},
        {"legs": {"long": {"patch": train(num_steps=21)}}},
        {"legs": {"long": None}},
        {"gates": [{"metric": "tail50_tok_per_sec", "at_least": "1.04x baseline"}]},
    ],
    ids=json.dumps,
)
def test_the_hash_changes_with_what_is_asked(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert load(tmp_path, **changed).hash != load(tmp_path).hash


def test_the_hash_changes_with_the_baseline(tmp_path: Path) -> None:
    legs = {"plain": {"patch": moe(capacity_factor=0)}}
    assert load(tmp_path, legs=legs, baseline="long").hash != load(tmp_path, legs=legs).hash


def test_the_hash_changes_with_set_and_with_the_run_file(tmp_path: Path) -> None:
    before = load(tmp_path).hash
    assert load(tmp_path, "run.train.seed=3").hash != before
    write(tmp_path / "run.json", merge_patch(VALID, train(log_every=3)))
    assert load_suite(tmp_path / "suite.json").hash != before


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "stated", "factor", "sigmas", "offset"),
    [
        ("at_least", "1.03x baseline", 1.03, 0, 0),
        ("at_most", "baseline", 1, 0, 0),
        ("no_worse_than", "baseline + 2 sigma", 1, 2, 0),
        ("no_worse_than", "1.01x  baseline +  0.5 sigma", 1.01, 0.5, 0),
        ("at_most", "baseline - 2 sigma", 1, -2, 0),
        ("at_most", 2.5, 0, 0, 2.5),
        ("at_most", 0, 0, 0, 0),
    ],
)
def test_a_bound_reads_as_it_is_written(rule: str, stated: Any, factor: float, sigmas: float, offset: float) -> None:
    bound = parse_gate(0, "val/bpb", rule, stated).bound
    assert (bound.factor, bound.sigmas, bound.offset) == (factor, sigmas, offset)


def test_what_is_no_worse_lies_on_the_other_side_where_higher_is_better() -> None:
    assert parse_gate(0, "tail50_mfu", "no_worse_than", "baseline - 1 sigma").bound.sigmas == -1


def test_validation_by_name_may_be_asked_for() -> None:
    gate = parse_gate(0, "val/books/bpb", "at_most", "baseline")
    assert (gate.metric.kind, gate.metric.higher_is_better, gate.metric.is_ratio) == ("quality", False, False)


def test_every_figure_is_a_ratio_or_a_difference_and_knows_which_way_is_better() -> None:
    higher = [name for name, metric in METRICS.items() if metric.higher_is_better]
    assert higher == ["tail50_tok_per_sec", "tail50_tok_per_sec_per_gpu", "tail50_mfu"]
    assert {metric.kind for metric in METRICS.values() if metric.is_ratio} == {"speed", "memory"}


def test_a_gate_on_named_validation_data_passes_where_every_leg_has_it(tmp_path: Path) -> None:
    val = {"run": {"data": {"val": {"books": "builtin"}}}}
    suite = load(tmp_path, patch=val, gates=[{"metric": "val/books/bpb", "at_most": "baseline"}])
    assert [str(gate) for gate in suite.gates] == ["val/books/bpb at most baseline"]


# --- refusals ---------------------------------------------------------------------------------------------------------

GATE = {"metric": "val/bpb", "at_most": "baseline"}
WRONG: list[tuple[dict[str, Any], str]] = [
    # misspelt, missing, of another type
    ({"bsae": "run.json"}, "suite.bsae is not a known key. Did you mean suite.base?"),
    (
        {"legs": {"base": {"question": "?", "ptach": {}}}},
        "suite.legs.base.ptach is not a known key. Did you mean suite.legs.base.patch?",
    ),
    (
        {"gates": [{**GATE, "at_leest": 1}]},
        "suite.gates.0.at_leest is not a known key. Did you mean suite.gates.0.at_least?",
    ),
    ({"question": None}, "suite.question is missing. State it."),
    ({"question": ""}, 'suite.question="": should be a string that is not empty.'),
    ({"legs": {"top1": {"question": None}}}, "suite.legs.top1.question is missing. State it."),
    ({"legs": {"top1": {"question": ""}}}, 'suite.legs.top1.question="": should be a string that is not empty.'),
    ({"legs": dict.fromkeys(LEGS)}, "suite.legs={}: should be an object that is not empty."),
    ({"gates": []}, "suite.gates=[]: should be a list that is not empty."),
    ({"repeats": 0}, "suite.repeats=0: should be greater than or equal to 1."),
    ({"measure": "speed"}, "suite.measure=\"speed\": should be 'throughput' or 'quality'."),
    ({"order": "random"}, "suite.order=\"random\": should be 'interleaved' or 'by_leg'."),
    ({"patch": 4}, "suite.patch=4: should be a valid dictionary."),
    (
        {"gates": [{"metric": "val/bpb", "at_most": [1]}]},
        "suite.gates.0.at_most=[1]: should be a valid number or a valid string.",
    ),
    # keys that contradict each other
    (
        {"legs": {"a/b": LEGS["top1"]}},
        "suite.legs.a/b: the name becomes a folder. Use letters, digits, '.', '_' and '-', at most 64.",
    ),
    ({"baseline": "plane"}, "suite.baseline='plane' is no leg. Use one of plain, top1, long."),
    ({"seeds": [1]}, "suite.seeds=[1] are 1 for repeats=2. State one for every repeat."),
    ({"seeds": [1, 2, 3]}, "suite.seeds=[1, 2, 3] are 3 for repeats=2. State one for every repeat."),
    (
        {"slots": 2},
        "suite.slots=2 has no effect with measure='throughput', whose runs have the machine to themselves. Remove it.",
    ),
    (
        {"slots": 0, "measure": "quality"},
        "suite.slots=0 is below 1. Use a number of at least 1, or 'auto'.",
    ),
    ({"slots": "all", "measure": "quality"}, "suite.slots=\"all\": should be a valid integer or 'auto'."),
    # files
    ({"base_suite": 4}, "base_suite=4 in suite.json is not a path. Name another suite file."),
    (
        {"base_suite": "suite.json"},
        "base_suite: suite.json leads back to itself. Remove one of these `base_suite` keys.",
    ),
    (
        {"base_suite": "gone.json"},
        "{folder}/gone.json: no such run file (named as base by suite.json). ds_configs/ holds those that ship.",
    ),
    ({"base": "gone.json"}, "{folder}/gone.json: no such run file. ds_configs/ holds those that ship."),
    (
        {"legs": {"top1": {"base": "gone.json"}}},
        "{folder}/gone.json: no such run file. ds_configs/ holds those that ship.",
    ),
    (
        {"reference": "gone.json"},
        "--reference {folder}/gone.json: no such file. benchmarks/seed_h800.json ships.",
    ),
    # legs
    (
        {"patch": train(num_stpes=1)},
        "run.train.num_stpes is not a known key. Did you mean run.train.num_steps?",
    ),
    (
        leg(moe(top_k=9)),
        "legs.top1: run.model.moe.top_k=9 exceeds num_experts=4. Use a top_k of at most 4.",
    ),
    (
        leg(train(stop_at_step=2)),
        "legs.top1: run.train.stop_at_step=2 keeps its runs from completing. Remove it; run.train.num_steps shortens a "
        "run.",
    ),
    (
        leg(moe(top_k=2)),
        "legs.top1: equals its base, so it would answer nothing. Change its patch, or remove the leg (the baseline "
        "alone may be the base: then it states no patch).",
    ),
    (
        {"legs": {"plain": {"patch": moe(top_k=2)}}},
        "legs.plain: equals its base, so it would answer nothing. Change its patch, or remove the leg (the baseline "
        "alone may be the base: then it states no patch).",
    ),
    (
        {"legs": {"plain": {"base": "run.json"}}},
        "legs.plain: equals its base, so it would answer nothing. Change its patch, or remove the leg (the baseline "
        "alone may be the base: then it states no patch).",
    ),
    (
        {"baseline": "top1"},
        "legs.plain: equals its base, so it would answer nothing. Change its patch, or remove the leg (the baseline "
        "alone may be the base: then it states no patch).",
    ),
    (
        {"seeds": [1, 2], **leg(train(seed=3))},
        "legs.top1: sets run.train.seed, and so do the suite's seeds. Remove one of them.",
    ),
    (
        leg(train(num_steps=20)),
        "legs.long: is the same as legs.top1. Remove one of them; repeats repeat a leg.",
    ),
    # gates
    (
        {"gates": [{"metric": "val/bpb"}]},
        'suite.gates.0.metric="val/bpb": no bound given. State one of at_least, at_most, no_worse_than.',
    ),
    (
        {"gates": [{**GATE, "at_least": 1, "no_worse_than": 1}]},
        'suite.gates.0.metric="val/bpb": at_least and at_most and no_worse_than given. State one of at_least, at_most, '
        "no_worse_than.",
    ),
    (
        {"gates": [GATE, {**GATE, "metric": "tail50_tok_per_second"}]},
        'gates.1.metric="tail50_tok_per_second" is no figure that runs are compared by. Did you mean '
        "tail50_tok_per_sec?",
    ),
    (
        {"gates": [{**GATE, "metric": "zzz"}]},
        'gates.0.metric="zzz" is no figure that runs are compared by. Use one of tail50_tok_per_sec, '
        "tail50_tok_per_sec_per_gpu, tail50_mfu, tail50_dt_ms, time/compile_s, total_time_min, peak_mem_mib, val/bpb, "
        "val/loss, train/loss, moe/dropped_frac, moe/load_max_over_mean, moe/load_cv, moe/dead_experts.",
    ),
    (
        {"gates": [{"metric": "val/bpb", "at_most": "1.03 baseline"}]},
        'gates.0.at_most="1.03 baseline": should be "1.03x baseline", "baseline + 2 sigma", "baseline" or a number.',
    ),
    (
        {"gates": [{"metric": "val/bpb", "no_worse_than": "baseline - 2 sigma"}]},
        'gates.0.no_worse_than="baseline - 2 sigma": val/bpb is better when lower, so what is no worse may lie on the '
        "other side of the baseline. Use +.",
    ),
    (
        {"gates": [{"metric": "tail50_mfu", "no_worse_than": "baseline + 2 sigma"}]},
        'gates.0.no_worse_than="baseline + 2 sigma": tail50_mfu is better when higher, so what is no worse may lie on '
        "the other side of the baseline. Use -.",
    ),
    (
        {"measure": "quality"},
        'gates.0.metric="tail50_tok_per_sec": runs side by side disturb each other\'s speed. Use '
        "measure='throughput', or another metric.",
    ),
    (
        {"gates": [GATE], "patch": {"run": {"data": {"val": "none"}}}},
        'gates.0.metric="val/bpb": legs.plain has no validation data. Name run.data.val, or use another metric.',
    ),
    (
        {"gates": [{**GATE, "metric": "moe/load_cv"}], "legs": {"top1": DENSE}},
        'gates.0.metric="moe/load_cv": legs.top1 has no experts. Use another metric.',
    ),
    (
        {"gates": [{**GATE, "metric": "val/b/bpb"}], "patch": {"run": {"data": {"val": {"a": "builtin"}}}}},
        'gates.0.metric="val/b/bpb": legs.plain has no validation data named b. Name it, as in '
        'run.data.val={"b": "data/val"}, or use another metric.',
    ),
    (
        {"gates": [{**GATE, "metric": "val/b/bpb"}]},
        'gates.0.metric="val/b/bpb": legs.plain has no validation data named b. Name it, as in '
        'run.data.val={"b": "data/val"}, or use another metric.',
    ),
    (
        {"gates": [{**GATE, "metric": "time/compile_s"}]},
        "gates.0.metric=\"time/compile_s\": legs.plain has run.compile.mode='none'. Compile it, or use another metric.",
    ),
]


def refusal_of(path: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        load_suite(path)
    return str(refusal.value).replace(str(path.parent), "{folder}")


@pytest.mark.parametrize(
    ("changed", "error"), WRONG, ids=lambda value: json.dumps(value) if type(value) is dict else ""
)
def test_a_wrong_suite_is_refused_in_one_line(tmp_path: Path, changed: dict[str, Any], error: str) -> None:
    assert refusal_of(suite_file(tmp_path, **changed)) == error
    assert "\n" not in error
