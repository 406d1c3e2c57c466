"""Run files: what is merged from where, what is filled in, and what two runs have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.run_config import REPO_ROOT, Run, load_run, merge_patch
from model.config import ConfigError

VALID: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "run": {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_len": 16,
            "vocab_size": 64,
            "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32},
        },
        "data": {"train": "synthetic"},
        "train": {"num_steps": 10},
    },
}


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def load(tmp_path: Path, patch: dict[str, Any], *assignments: str) -> Run:
    """Load VALID with a merge patch over it."""
    return load_run(write(tmp_path / "run.json", merge_patch(VALID, patch)), list(assignments))


def model(**patch: Any) -> dict[str, Any]:
    return {"run": {"model": patch}}


def moe(**patch: Any) -> dict[str, Any]:
    return model(moe=patch)


def train(**patch: Any) -> dict[str, Any]:
    return {"run": {"train": patch}}


def launch(**patch: Any) -> dict[str, Any]:
    return {"run": {"launch": patch}}


def fp8(**patch: Any) -> dict[str, Any]:
    return {"run": {"fp8": {"enabled": True, **patch}}}


def muon(params: dict[str, Any] | None = None, **patch: Any) -> dict[str, Any]:
    section = {"type": "Muon", "params": {"betas": None, **(params or {})}}
    return {"gradient_clipping": 0, "optimizer": section, **patch}


def data(**patch: Any) -> dict[str, Any]:
    return {"run": {"data": patch}}


# --- base, patch, --set ----------------------------------------------------------------------------------------------


def test_a_base_is_found_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    write(tmp_path / "bases" / "root.json", VALID)
    write(tmp_path / "bases" / "middle.json", {"base": "root.json", "gradient_clipping": 0.5})
    leaf = write(tmp_path / "leaves" / "leaf.json", {"base": "../bases/middle.json", **model(num_layers=3)})

    run = load_run(leaf)

    assert run.deepspeed["gradient_clipping"] == 0.5
    assert (run.model.num_layers, run.model.hidden_size) == (3, 32)


def test_neither_base_nor_run_reaches_deepspeed(tmp_path: Path) -> None:
    write(tmp_path / "root.json", VALID)
    run = load_run(write(tmp_path / "leaf.json", {"base": "root.json"}))
    assert run.deepspeed == {key: value for key, value in VALID.items() if key != "run"}
    assert set(run.resolved) == set(VALID)


def test_null_in_a_file_deletes_what_its_base_says(tmp_path: Path) -> None:
    write(tmp_path / "root.json", merge_patch(VALID, {"steps_per_print": 5}))
    leaf = write(
        tmp_path / "leaf.json", {"base": "root.json", "steps_per_print": None, **model(moe=None, ffn_hidden_size=64)}
    )
    run = load_run(leaf)
    assert "steps_per_print" not in run.deepspeed
    assert run.model.moe is None


def test_a_list_in_a_file_replaces_that_of_its_base(tmp_path: Path) -> None:
    assert merge_patch({"betas": [0.9, 0.95]}, {"betas": [0.8, 0.9]}) == {"betas": [0.8, 0.9]}


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merging_follows_rfc_7396(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"base": "b.json"})
    write(tmp_path / "b.json", {"base": "a.json"})
    with pytest.raises(ConfigError) as refusal:
        load_run(tmp_path / "a.json")
    assert str(refusal.value) == "base: a.json -> b.json -> a.json is a cycle. Remove one of these `base` keys."


def test_a_missing_base_is_refused_with_the_file_that_names_it(tmp_path: Path) -> None:
    leaf = write(tmp_path / "leaf.json", {"base": "gone.json"})
    with pytest.raises(ConfigError) as refusal:
        load_run(leaf)
    assert str(refusal.value) == (
        f"{tmp_path / 'gone.json'}: no such run file (named as base by leaf.json). ds_configs/ holds those that ship."
    )


@pytest.mark.parametrize(
    ("assignments", "steps"),
    [(["run.train.num_steps=20"], 20), (["run.train.num_steps=20", "run.train.num_steps=30"], 30)],
)
def test_set_wins_over_the_file_and_a_later_one_over_an_earlier(
    tmp_path: Path, assignments: list[str], steps: int
) -> None:
    assert load(tmp_path, {}, *assignments).num_steps == steps


def test_the_value_of_set_is_json_else_a_string(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        {},
        "run.wandb.name=a name with = in it",
        'run.wandb.tags=["a", "b"]',
        "run.model.qk_norm=false",
        'run.wandb.group="7"',
        "optimizer.params.lr=1e-3",
        'zero_optimization={"overlap_comm": false}',
    )
    assert (run.wandb.name, run.wandb.tags, run.wandb.group) == ("a name with = in it", ["a", "b"], "7")
    assert run.model.qk_norm is False
    assert run.deepspeed["optimizer"]["params"]["lr"] == 1e-3
    assert run.deepspeed["zero_optimization"] == {"stage": 1, "overlap_comm": False}


def test_set_makes_the_sections_on_its_path_and_null_deletes(tmp_path: Path) -> None:
    run = load(tmp_path, {}, "flops_profiler.enabled=true", "optimizer.params.betas=null")
    assert run.deepspeed["flops_profiler"] == {"enabled": True}
    assert "betas" not in run.deepspeed["optimizer"]["params"]


@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        (
            "run.train.num_steps",
            "--set run.train.num_steps: not of the form key.key=value. Example: --set run.train.num_steps=20",
        ),
        ("run..seed=1", "--set run..seed=1: not of the form key.key=value. Example: --set run.train.num_steps=20"),
        ("base=x.json", "--set base=x.json: base cannot be set at the prompt. Write a run file with that base."),
        ("gradient_clipping=NaN", "--set gradient_clipping=NaN: NaN is not a finite number. Write one."),
        ("gradient_cliping=1", "gradient_cliping is not a known key. Did you mean gradient_clipping?"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path: Path, assignment: str, error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, {}, assignment)
    assert str(refusal.value) == error


# --- what follows from a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "steps"), [("target_tokens=2560", 20), ("tokens_per_active_param=0.5", 73), ("num_steps=20", 20)]
)
def test_a_horizon_set_later_replaces_the_one_before(tmp_path: Path, assignment: str, steps: int) -> None:
    run = load(tmp_path, {}, f"run.train.{assignment}")
    stated = [run.train.num_steps, run.train.target_tokens, run.train.tokens_per_active_param]
    assert len([horizon for horizon in stated if horizon is not None]) == 1
    assert run.num_steps == steps
    assert load(tmp_path, {}, f"run.train.{assignment}", "run.train.num_steps=7").num_steps == 7


def test_a_horizon_in_tokens_is_rounded_down_to_whole_steps(tmp_path: Path) -> None:
    assert load(tmp_path, train(num_steps=None, target_tokens=3 * 8 * 16 + 127)).num_steps == 3


def test_moe_d12_runs_the_steps_that_its_active_parameters_ask_for() -> None:
    run = load_run(REPO_ROOT / "ds_configs" / "moe_d12.json")
    assert run.train.tokens_per_active_param == 8.25
    assert (run.tokens_per_step, run.num_steps) == (524_288, 1733)


def test_muon_updates_the_gates_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    resolved = load(tmp_path, muon()).resolved["run"]["train"]
    assert resolved["router_optimizer"] == "muon"
    assert load(tmp_path, muon(), "run.train.router_optimizer=adamw").train.router_optimizer == "adamw"
    null = merge_patch(VALID, muon())
    null["run"]["train"]["router_optimizer"] = None
    assert load_run(write(tmp_path / "null.json", null)).train.router_optimizer == "muon"
    dense = muon(run={"model": {"moe": None, "ffn_hidden_size": 64}})
    assert load(tmp_path, dense).train.router_optimizer is None
    assert load(tmp_path, {}).train.router_optimizer is None


def test_defaults_are_filled_into_the_resolved_file(tmp_path: Path) -> None:
    resolved = load(tmp_path, {}).resolved["run"]
    assert resolved["data"] == {"train": "synthetic", "val": "synthetic"}
    assert resolved["launch"] == {"num_nodes": 1, "num_gpus": "auto", "ep_size": "auto", "master_port": None}
    assert resolved["model"]["moe"]["aux_loss_coeff"] == 0.02
    assert resolved["model"]["activation"] == "relu2"


@pytest.mark.parametrize(
    ("patch", "val"),
    [
        ({"run": {"data": None}}, "builtin"),
        ({"run": {"data": {"train": "data/mine"}}}, None),
        ({"run": {"data": {"train": "data/mine", "val": "data/held_out"}}}, "data/held_out"),
        (data(train=[[1, "builtin"]]), None),
        (data(val="none"), None),
        (data(train="builtin", val={"a": "data/a", "b-2": "builtin"}), {"a": "data/a", "b-2": "builtin"}),
        (data(train="builtin", val=[[1, "data/a"], [0.5, "data/b"]]), ((1.0, "data/a"), (0.5, "data/b"))),
    ],
)
def test_validation_data_is_that_of_a_built_in_dataset_and_else_must_be_named(
    tmp_path: Path, patch: dict[str, Any], val: Any
) -> None:
    assert load(tmp_path, patch).data.val == val


def test_gates_are_normalised_but_for_top_1_and_a_bias_needs_no_auxiliary_loss(tmp_path: Path) -> None:
    def moe_of(patch: dict[str, Any]) -> Any:
        return load(tmp_path, patch).model.moe

    assert [moe_of(moe(top_k=k)).norm_topk_prob for k in (1, 2)] == [False, True]
    assert moe_of(moe(norm_topk_prob=False)).norm_topk_prob is False
    assert [moe_of(moe(balance=balance)).has_aux_loss for balance in ("aux_loss", "bias", "none")] == [
        True,
        False,
        False,
    ]
    assert moe_of(moe(balance="bias", aux_loss_coeff=1e-4)).has_aux_loss


@pytest.mark.parametrize(
    "patch",
    [
        {},
        moe(balance="none"),
        moe(balance="bias"),
        moe(balance="bias", aux_loss_coeff=0.1, aux_loss_scope="sequence"),
        moe(top_k=1),
        moe(num_groups=2, top_k_groups=2),
        moe(capacity_factor=0.0),
        train(schedule="cosine"),
        train(sample_tokens=0),
        train(num_steps=None, target_tokens=10_000),
        model(moe=None, ffn_hidden_size=64),
        data(train=[[0.7, "data/a"], [0.3, "builtin"]], val={"a": "data/a", "b": "builtin"}),
        data(train="data/a", val=[[2, "data/a"], [1, "data/b"]]),
    ],
    ids=str,
)
def test_a_resolved_file_is_itself_a_run_file_of_the_same_run(tmp_path: Path, patch: dict[str, Any]) -> None:
    run = load(tmp_path, patch)
    again = load_run(write(tmp_path / "config.json", run.resolved))
    assert again.resolved == run.resolved
    assert again.config_hash == run.config_hash
    assert (again.model, again.data, again.train) == (run.model, run.data, run.train)


def test_validation_can_be_turned_off_and_stays_off_in_the_resolved_file(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(VALID))
    tree["run"]["data"]["val"] = None
    run = load_run(write(tmp_path / "run.json", tree))
    assert run.data.val is None
    assert load_run(write(tmp_path / "config.json", run.resolved)).data.val is None
    assert load(tmp_path, {}, "run.data.val=none").resolved == run.resolved, "at the prompt, where null means default"
    assert load(tmp_path, {}, "run.data.val=null").data.val == "synthetic"


def test_a_blend_can_be_named_at_the_prompt(tmp_path: Path) -> None:
    run = load(tmp_path, {}, 'run.data.train=[[1, "data/a"], [0.5, "builtin"]]', "run.data.val.web=data/web")
    assert run.data.train == ((1.0, "data/a"), (0.5, "builtin"))
    assert run.data.val == {"web": "data/web"}
    assert run.data.prefixes == ["data/a", "builtin", "data/web"]


@pytest.mark.parametrize(
    "patch",
    [
        launch(num_gpus=4, ep_size=2),
        moe(expert_backend="loop"),
        {"zero_optimization": {"stage": 2}},
        {"run": {"wandb": {"mode": "disabled", "name": "other"}}},
        train(stop_at_step=5),
        train(save_every=5),
        train(keep_last=7),
        train(activation_checkpointing="selective"),
        train(profile_steps=2),
        train(expert_load_every=5),
        train(cross_entropy="plain"),
        train(max_skipped_steps=0),
    ],
    ids=str,
)
def test_the_hash_ignores_where_a_run_happens_when_it_pauses_and_what_is_computed_twice(
    tmp_path: Path, patch: dict[str, Any]
) -> None:
    assert load(tmp_path, patch).config_hash == load(tmp_path, {}).config_hash


@pytest.mark.parametrize(
    "patch",
    [
        {"train_batch_size": 16},
        {"gradient_clipping": 0.5},
        {"bf16": {"enabled": True}},
        {"optimizer": {"params": {"lr": 1e-3}}},
        model(rope_theta=5000.0),
        moe(capacity_factor=1.25),
        {"run": {"data": {"train": "builtin"}}},
        data(train=[[1, "synthetics"]]),
        data(val="none"),
        data(val={"a": "synthetics"}),
        train(num_steps=11),
        train(seed=1),
        train(warmup_steps=2),
        train(eval_every=5),
        train(spike_factor=2.0),
    ],
    ids=str,
)
def test_the_hash_changes_with_anything_else(tmp_path: Path, patch: dict[str, Any]) -> None:
    assert load(tmp_path, patch).config_hash != load(tmp_path, {}).config_hash


def test_the_hash_does_not_depend_on_the_order_of_keys_or_on_stated_defaults(tmp_path: Path) -> None:
    tree = merge_patch(dict(reversed(VALID.items())), train(seed=0, log_every=10))
    assert load_run(write(tmp_path / "a.json", tree)).config_hash == load(tmp_path, {}).config_hash


RUN_FILES = [path for path in (REPO_ROOT / "ds_configs").rglob("*.json") if "suites" not in path.parts]


@pytest.mark.parametrize("path", sorted(RUN_FILES), ids=lambda path: path.name)
def test_every_file_that_ships_loads(path: Path) -> None:
    assert load_run(path).num_steps > 0
