"""Ranks, their groups, accumulation steps and ep_size, without any rank."""

from __future__ import annotations

import pytest

import launch.topology
from launch.memory import GIB, estimate_memory
from launch.run_config import REPO_ROOT, Run, load_run
from launch.topology import Topology, resolve_num_gpus, resolve_topology, visible_gpus
from model.config import ConfigError


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, whatever this one has."""
    have_gpus(monkeypatch, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int, size: int = 80 * GIB) -> None:
    monkeypatch.setattr(launch.topology, "query_gpus", lambda: [size] * count)


def moe_d12(*assignments: str) -> Run:
    return load_run(REPO_ROOT / "ds_configs" / "moe_d12.json", list(assignments))


def topology(ranks: int, ep_size: int) -> Topology:
    return Topology(num_nodes=1, gpus_per_node=ranks, ep_size=ep_size, ep_size_reason="", accumulation_steps=1)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_the_groups_of_8_ranks_with_ep_size_4_are_those_of_the_docstring() -> None:
    eight = topology(8, 4)
    assert eight.expert_parallel_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert eight.expert_data_groups == [[0, 4], [1, 5], [2, 6], [3, 7]]

    shown = [line.strip() for line in eight.picture().splitlines()[1:]]
    documented = [
        line.strip() for line in (launch.topology.__doc__ or "").splitlines() if "group" in line and "[" in line
    ]
    assert shown == documented


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 64])
def test_every_rank_is_in_one_group_of_each_kind_and_two_groups_share_at_most_one_rank(ranks: int) -> None:
    for ep_size in launch.topology.divisors(ranks):
        groups = topology(ranks, ep_size)
        parallel, data = groups.expert_parallel_groups, groups.expert_data_groups
        assert sorted(rank for group in parallel for rank in group) == list(range(ranks))
        assert sorted(rank for group in data for rank in group) == list(range(ranks))
        assert {len(group) for group in parallel} == {ep_size}
        assert {len(group) for group in data} == {ranks // ep_size}
        assert all(len(set(a) & set(b)) == 1 for a in parallel for b in data)


def test_a_picture_of_many_groups_stays_short() -> None:
    lines = topology(64, 1).picture().splitlines()
    assert lines[1].endswith("[0] [1] [2] [3] [4] [5] [6] ... [63]")
    assert lines[0] == "1 node x 64 = 64 ranks, ep_size 1 ()"


# --- batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 32), (2, 16), (4, 8), (8, 4)])
def test_accumulation_follows_from_the_ranks(ranks: int, accumulation: int) -> None:
    assert resolve_topology(moe_d12(), 1, ranks).accumulation_steps == accumulation


def test_ranks_on_several_nodes_count_together() -> None:
    two_nodes = resolve_topology(moe_d12(), 2, 4)
    assert (two_nodes.ranks, two_nodes.accumulation_steps) == (8, 4)


@pytest.mark.parametrize(
    ("assignments", "nodes", "gpus", "error"),
    [
        (
            [],
            1,
            3,
            "train_batch_size=512 is not a multiple of train_micro_batch_size_per_gpu=16 times the 3 ranks "
            "(1 node x 3 GPUs). Use one of 1, 2 ranks, or other batch sizes.",
        ),
        (
            ["train_batch_size=16"],
            2,
            1,
            "train_batch_size=16 is not a multiple of train_micro_batch_size_per_gpu=16 times the 2 ranks "
            "(2 nodes x 1 GPU). Use 1 rank, or other batch sizes.",
        ),
        (
            ["gradient_accumulation_steps=2"],
            1,
            8,
            "gradient_accumulation_steps=2 contradicts train_batch_size=512 = 16 per GPU x 4 steps x 8 ranks. "
            "Remove it: it is derived.",
        ),
        (
            ["run.launch.ep_size=3"],
            1,
            8,
            "run.launch.ep_size=3 does not divide the 8 ranks (1 node x 8 GPUs). Use one of 1, 2, 4, 8.",
        ),
        (
            ["run.launch.ep_size=2"],
            1,
            1,
            "run.launch.ep_size=2 does not divide the 1 rank (1 node x 1 GPU). Use 1.",
        ),
        (
            ["run.launch.ep_size=16"],
            2,
            8,
            "run.launch.ep_size=16 does not divide run.model.moe.num_experts=8. Use one of 1, 2, 4, 8.",
        ),
        (
            ["run.model.moe=null", "run.model.ffn_hidden_size=3072", "run.launch.ep_size=2"],
            1,
            8,
            "run.launch.ep_size=2 has no effect in a dense model. Remove it, or add run.model.moe.",
        ),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(assignments: list[str], nodes: int, gpus: int, error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_topology(moe_d12(*assignments), nodes, gpus)
    assert str(refusal.value) == error


def test_an_accumulation_that_agrees_may_be_stated() -> None:
    assert resolve_topology(moe_d12("gradient_accumulation_steps=4"), 1, 8).accumulation_steps == 4


# --- ep_size ---------------------------------------------------------------------------------------------------------


def test_static_shapes_are_refused_where_ranks_receive_another_number_of_rows_in_every_step() -> None:
    settings = ["run.model.moe.capacity_factor=0", 'run.compile.mode="static"', 'run.launch.ep_size="max"']
    with pytest.raises(ConfigError) as refusal:
        resolve_topology(moe_d12(*settings), 1, 8)
    assert str(refusal.value) == (
        "run.compile.mode='static' with run.model.moe.capacity_factor=0.0 (dropless) at ep_size=8: the number of rows "
        "that a rank receives changes in every step. Use 'dynamic' or 'none', ep_size 1, or a capacity_factor."
    )
    assert resolve_topology(moe_d12(*settings), 1, 1).ep_size == 1
    assert resolve_topology(moe_d12(*settings, 'run.compile.mode="dynamic"'), 1, 8).ep_size == 8
    assert resolve_topology(moe_d12(*settings, "run.model.moe.capacity_factor=1"), 1, 8).ep_size == 8


def test_a_stated_ep_size_is_kept() -> None:
    resolved = resolve_topology(moe_d12("run.launch.ep_size=4"), 1, 8)
    assert (resolved.ep_size, resolved.ep_size_reason) == (4, "as the file says")


def test_a_dense_model_has_ep_size_1_whatever_auto_or_max_would_say() -> None:
    for ep_size in ("auto", "max", "1"):
        run = moe_d12("run.model.moe=null", "run.model.ffn_hidden_size=3072", f"run.launch.ep_size={ep_size}")
        resolved = resolve_topology(run, 1, 8)
        assert (resolved.ep_size, resolved.ep_size_reason) == (1, "the model is dense")


@pytest.mark.parametrize(("ranks", "experts", "ep_size"), [(8, 8, 8), (4, 8, 4), (8, 4, 4), (8, 12, 4), (2, 3, 1)])
def test_max_takes_the_largest_that_divides_ranks_and_experts(ranks: int, experts: int, ep_size: int) -> None:
    run = moe_d12(f"run.model.moe.num_experts={experts}", "run.launch.ep_size=max")
    resolved = resolve_topology(run, 1, ranks)
    assert resolved.ep_size == ep_size
    assert resolved.ep_size_reason == f"max: the largest that divides {ranks} ranks and {experts} experts"


def test_auto_takes_the_smallest_ep_size_whose_estimate_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    run = moe_d12()
    needed = {ep_size: estimate_memory(run, 8, ep_size).total for ep_size in (1, 2, 4, 8)}
    assert sorted(needed.values(), reverse=True) == list(needed.values())
    for ep_size, total in needed.items():
        have_gpus(monkeypatch, 8, int(total / launch.topology.USABLE_FRAC) + 1)
        assert resolve_topology(run, 1, 8).ep_size == ep_size


def test_auto_says_why_and_from_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_topology(moe_d12(), 1, 8).ep_size_reason == (
        "auto: the smallest that fits; about 9.6 GiB a rank, and 85% of 80 GiB can be used "
        "(GPU assumed, none found here)"
    )
    monkeypatch.setattr(launch.topology, "query_gpus", lambda: [80 * GIB, 8 * GIB])
    resolved = resolve_topology(moe_d12(), 1, 8)
    assert resolved.ep_size == 8
    assert resolved.ep_size_reason == (
        "auto: the largest there is, and it may not fit; about 8.9 GiB a rank, and 85% of 8 GiB can be used (GPU)"
    )


# --- how many GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (0, (2, False, "auto: no GPU here, ranks on the CPU")),
        (3, (2, True, "auto: of 3 visible GPUs, the most that divide the batch")),
        (8, (8, True, "auto: every visible GPU")),
    ],
)
def test_auto_takes_the_most_gpus_that_divide_the_batch(
    monkeypatch: pytest.MonkeyPatch, visible: int, chosen: tuple[int, bool, str]
) -> None:
    have_gpus(monkeypatch, visible)
    run = moe_d12("run.launch.num_gpus=auto")
    assert resolve_num_gpus(run) == chosen
    assert resolve_topology(run, 1, chosen[0]).ranks == chosen[0]


def test_auto_never_starts_more_ranks_than_there_are_micro_batches() -> None:
    run = moe_d12("run.launch.num_gpus=auto", "train_batch_size=16")
    assert resolve_num_gpus(run) == (1, False, "auto: no GPU here, ranks on the CPU")


@pytest.mark.parametrize(("visible", "on_gpus"), [(0, False), (8, True)])
def test_a_stated_number_of_gpus_is_kept(monkeypatch: pytest.MonkeyPatch, visible: int, on_gpus: bool) -> None:
    have_gpus(monkeypatch, visible)
    assert resolve_num_gpus(moe_d12("run.launch.num_gpus=8")) == (8, on_gpus, "as the file says")


@pytest.mark.parametrize(
    ("devices", "visible"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 3", 2), ("0,1,2,3,4,5", 4)]
)
def test_cuda_visible_devices_limits_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, devices: str | None, visible: int
) -> None:
    have_gpus(monkeypatch, 4)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert visible_gpus() == visible
