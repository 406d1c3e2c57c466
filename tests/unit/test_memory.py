"""The memory estimate that chooses an ep_size, and how GPUs are asked."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from launch.memory import GIB, estimate_memory, query_gpus
from launch.run_config import REPO_ROOT, Run, load_run
from model.flops import count_parameters


def moe_tiny(*assignments: str) -> Run:
    return load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", list(assignments))


def states(ranks: int, ep_size: int, *assignments: str) -> int:
    return estimate_memory(moe_tiny(*assignments), ranks, ep_size).states


def test_one_rank_in_bf16_holds_16_bytes_a_parameter() -> None:
    """2 for the weight, 2 for its gradient, 12 for the fp32 master and two moments."""
    total = count_parameters(moe_tiny().model).total
    assert states(1, 1, "bf16.enabled=true") == 16 * total


def test_one_rank_in_fp32_holds_20_bytes_a_parameter() -> None:
    assert states(1, 1) == 20 * count_parameters(moe_tiny().model).total


@pytest.mark.parametrize(
    ("stage", "ep_size", "dense_bytes", "expert_bytes"),
    [
        (1, 1, 2 + 2 + 12 / 8, 2 + 2 + 12 / 8),
        (2, 1, 2 + 2 / 8 + 12 / 8, 2 + 2 / 8 + 12 / 8),
        (1, 4, 2 + 2 + 12 / 8, (2 + 2 + 12 / 2) / 4),
        (2, 4, 2 + 2 / 8 + 12 / 8, (2 + 2 / 2 + 12 / 2) / 4),
    ],
)
def test_eight_ranks_divide_states_among_those_that_hold_a_copy(
    stage: int, ep_size: int, dense_bytes: float, expert_bytes: float
) -> None:
    counts = count_parameters(moe_tiny().model)
    expected = dense_bytes * (counts.total - counts.expert) + expert_bytes * counts.expert
    got = states(8, ep_size, "bf16.enabled=true", f"zero_optimization.stage={stage}")
    assert got == pytest.approx(expected, abs=16)  # bytes are whole numbers


@pytest.mark.parametrize(
    ("fp8", "head", "expert"),
    [
        ((), 0, 2),
        (("run.fp8.lm_head=true",), 2, 2),
        (("run.fp8.lm_head=true", "run.fp8.experts=false"), 2, 0),
        (("run.fp8.lm_head=true", "run.train.cross_entropy=plain"), 0, 2),
        (("run.fp8.recipe=rowwise",), 0, 0),
        (("run.model.moe.expert_backend=loop",), 0, 0),
    ],
)
def test_fp8_copies_take_two_bytes_a_weight_of_local_experts_and_of_a_head_in_chunks(
    fp8: tuple[str, ...], head: int, expert: int
) -> None:
    model = moe_tiny().model
    expected = head * model.vocab_size * model.hidden_size + expert * count_parameters(model).expert // 4
    assert states(8, 4, "run.fp8.enabled=true", *fp8) - states(8, 4) == expected


OFFLOAD = ("zero_optimization.offload_optimizer.device=cpu", "zero_force_ds_cpu_optimizer=false")


@pytest.mark.parametrize(("stage", "dense_bytes"), [(1, 2 + 2), (2, 2 + 2 / 8)])
def test_an_offloaded_optimizer_takes_no_memory_of_the_device(stage: int, dense_bytes: float) -> None:
    counts = count_parameters(moe_tiny().model)
    got = states(8, 1, "bf16.enabled=true", f"zero_optimization.stage={stage}", *OFFLOAD)
    assert got == pytest.approx(dense_bytes * counts.total, abs=16)


@pytest.mark.parametrize(
    ("limits", "offload", "gathered", "bytes_per_parameter"),
    [
        ({}, (), None, (2 + 2 + 12) / 8),  # the defaults gather all of a model of under a billion parameters
        ({"max_live_parameters": 1000, "max_reuse_distance": 0}, (), 1000, (2 + 2 + 12) / 8),
        ({"max_live_parameters": 0, "max_reuse_distance": 3000}, OFFLOAD, 3000, (2 + 2) / 8),
        (
            {"max_live_parameters": 0, "max_reuse_distance": 0},
            (*OFFLOAD, "zero_optimization.offload_param.device=cpu"),
            0,
            2 / 8,
        ),
    ],
    ids=str,
)
def test_zero_3_divides_weights_too_and_holds_what_it_has_gathered(
    limits: dict[str, int], offload: tuple[str, ...], gathered: int | None, bytes_per_parameter: float
) -> None:
    dense = ["run.model.moe=null", "run.model.ffn_hidden_size=64", "bf16.enabled=true", "zero_optimization.stage=3"]
    stated = [f"zero_optimization.stage3_{name}={value}" for name, value in limits.items()]
    total = count_parameters(moe_tiny(*dense).model).total
    expected = bytes_per_parameter * total + 2 * (total if gathered is None else gathered)
    assert states(8, 1, *dense, *stated, *offload) == pytest.approx(expected, abs=16)


def test_activation_checkpointing_keeps_less_and_one_block_in_full() -> None:
    def activations(layers: int, how: str) -> int:
        changes = (f"run.model.num_layers={layers}", f"run.train.activation_checkpointing={how}")
        return estimate_memory(moe_tiny(*changes), 1, 1).activations

    for layers in (4, 12):
        assert activations(layers, "block") < activations(layers, "selective") < activations(layers, "none")
    model = moe_tiny().model
    tokens = 2 * model.seq_len
    assert activations(12, "block") - activations(4, "block") == 8 * tokens * 4 * model.hidden_size, "a block's input"


def test_activations_grow_with_the_micro_batch_and_not_with_the_ranks() -> None:
    def activations(micro_batch: int, ranks: int) -> int:
        changes = (f"train_micro_batch_size_per_gpu={micro_batch}", "run.train.cross_entropy=plain")
        return estimate_memory(moe_tiny(*changes), ranks, ranks).activations

    assert activations(2, ranks=4) == 2 * activations(1, ranks=1)


def test_only_plain_cross_entropy_needs_logits_for_every_token() -> None:
    def growth(cross_entropy: str) -> int:
        """Bytes for one more sequence, where there is more than one chunk already."""
        settings = ("run.model.vocab_size=8192", f"run.train.cross_entropy={cross_entropy}", "train_batch_size=1056")
        few, many = (
            estimate_memory(moe_tiny(*settings, f"train_micro_batch_size_per_gpu={sequences}"), 1, 1).activations
            for sequences in (33, 66)
        )
        return (many - few) // 33

    logits = moe_tiny().model.seq_len * 8192 * 4
    assert growth("plain") > 3 * logits
    assert growth("chunked") < logits
    assert growth("liger") < logits


def test_capacity_above_1_keeps_more_activations_than_dropless() -> None:
    dropless = estimate_memory(moe_tiny("run.model.moe.capacity_factor=0.0"), 1, 1)
    roomy = estimate_memory(moe_tiny("run.model.moe.capacity_factor=2.0"), 1, 1)
    assert roomy.activations > dropless.activations
    assert roomy.states == dropless.states


def test_the_total_is_states_and_activations() -> None:
    estimate = estimate_memory(moe_tiny(), 2, 2)
    assert estimate.total == estimate.states + estimate.activations


def test_gpus_are_those_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def nvidia_smi(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout="81920\n40960\n", stderr="")

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    assert query_gpus() == [80 * GIB, 40 * GIB]


@pytest.mark.parametrize(
    "fault",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_machine_where_nvidia_smi_does_not_answer_has_no_gpus(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def nvidia_smi(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        raise fault

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    assert query_gpus() == []
