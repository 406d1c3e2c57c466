"""What saves memory changes nothing else: ZeRO stages, offloading and activation checkpointing train the same model.

Two ranks against one process without an engine on the joined batch: losses, gradient norms, and every parameter after
clipped AdamW steps of two micro-steps each. test_expert_parallelism.py has ZeRO-1 and 2 without offloading.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_expert_parallelism import CLIP, LR, assert_weights_agree, batch, wake_up
from torch.utils._python_dispatch import TorchDispatchMode

from launch.run_config import REPO_ROOT, load_run
from launch.zero_settings import offloads
from model.checkpoint import CheckpointWriter, choose_checkpoint, load_checkpoint
from model.config import ActivationCheckpointing, ModelConfig
from model.gpt import GPT, global_name, named_matrices
from model.manifest import TrainingState
from model.optim import build_optimizer
from model.partition import TrainingPartition
from ranks import RankPool

STEPS = 3
OPTIMIZER: dict[str, Any] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}}
MUON: dict[str, Any] = {"type": "Muon", "params": {"lr": LR, "weight_decay": 0.1}}
OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu"}}
# DeepSpeed keeps parameters of fewer elements than this whole: by default all that a tiny model has
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}


class Case(NamedTuple):
    """One way to train a model; `model` is MOE, DENSE or TIED."""

    model: str
    zero: dict[str, Any]
    ep_size: int = 1
    activation_checkpointing: ActivationCheckpointing = "none"
    bf16: bool = False
    muon: bool = False

    def config(self) -> ModelConfig:
        tiny = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json").model
        if self.model == "MOE":
            assert tiny.moe is not None
            # aux loss and capacity belong to a rank's micro-batch: one process on the joined batch has others
            moe = tiny.moe.model_copy(update={"aux_loss_coeff": 0.0, "capacity_factor": 0.0})
            return tiny.model_copy(update={"moe": moe})
        dense = tiny.model_copy(update={"moe": None, "ffn_hidden_size": 64})
        if self.model == "TIED":
            return dense.model_copy(update={"tie_embeddings": True, "norm_affine": True})
        return dense

    def num_local_experts(self) -> int:
        moe = self.config().moe
        return 0 if moe is None else moe.num_experts // self.ep_size


def build(case: Case, ep_rank: int) -> GPT:
    model = GPT(case.config(), case.ep_size, ep_rank, 3, case.activation_checkpointing)
    wake_up(model, ep_rank, case.num_local_experts())
    return model


def start_engine(case: Case) -> Any:
    import deepspeed
    import torch.distributed as dist

    model = build(case, dist.get_rank() % case.ep_size)
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0 if case.muon else CLIP,
        "bf16": {"enabled": case.bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": case.zero,
    }
    section, router_optimizer = (MUON, "muon") if case.muon else (OPTIMIZER, None)
    optimizer = build_optimizer(model, section, router_optimizer, fused=offloads(config))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def micro_batch(step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's two sequences of the eight of a step."""
    import torch.distributed as dist

    first = (micro_step * dist.get_world_size() + dist.get_rank()) * 2
    tokens = batch(step)[first : first + 2]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train_step(engine: Any, step: int) -> dict[str, Any]:
    """One step: loss over all ranks, gradient norm, and the last micro-step's statistics."""
    import torch.distributed as dist

    losses, micro_stats = [], None
    for micro_step in range(engine.gradient_accumulation_steps()):
        loss, micro_stats = engine(*micro_batch(step, micro_step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    norm = engine.get_global_grad_norm()
    return {
        "loss": mean.item() / dist.get_world_size(),
        "norm": None if norm is None else float(norm),  # ZeRO-0 in fp32 tells none
        "stats": micro_stats,
    }


def whole_weights(engine: Any, case: Case) -> dict[str, torch.Tensor]:
    """This rank's weights by global name, whole also where ZeRO-3 has them partitioned."""
    import deepspeed
    import torch.distributed as dist

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=case.zero["stage"] == 3):
        return {
            global_name(name, dist.get_rank() % case.ep_size, case.num_local_experts()): parameter.detach().clone()
            for name, parameter in named_matrices(engine.module)
        }


def train_on_ranks(case: Case) -> dict[str, Any]:
    engine = start_engine(case)
    steps, weights = [], []
    for step in range(STEPS):
        steps.append(train_step(engine, step))
        weights.append(whole_weights(engine, case))
    engine.destroy()
    return {"steps": steps, "first_weights": weights[0], "weights": weights[-1]}


@cache
def train_in_one_process(model: str) -> dict[str, Any]:
    """The same without ranks, engine or ZeRO: the joined batch, torch's own clipping and AdamW."""
    gpt = build(Case(model, {}), 0)
    optimizer = build_optimizer(gpt, OPTIMIZER)
    steps = []
    for step in range(STEPS):
        tokens = batch(step)
        loss, _ = gpt(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(gpt.parameters(), CLIP))
        optimizer.step()
        steps.append({"loss": loss.item(), "norm": norm})
    return {"steps": steps, "weights": {name: p.detach() for name, p in named_matrices(gpt)}}


def figures(answer: dict[str, Any], name: str) -> list[float]:
    return [step[name] for step in answer["steps"]]


@pytest.mark.parametrize(
    "case",
    [
        Case("MOE", {"stage": 1}, 2, "block"),
        Case("MOE", {"stage": 2}, 2, "selective"),
        Case("MOE", {"stage": 1, **OFFLOAD}, 1),
        Case("MOE", {"stage": 1, **OFFLOAD}, 2, "selective"),
        Case("MOE", {"stage": 2, **OFFLOAD}, 1, "block"),
        Case("MOE", {"stage": 2, **OFFLOAD}, 2),
        Case("DENSE", {"stage": 0}, 1, "block"),
        Case("DENSE", {"stage": 1, **OFFLOAD}),
        Case("DENSE", {"stage": 2}, 1, "selective"),
        Case("DENSE", PARTITIONED),
        Case("DENSE", PARTITIONED, 1, "block"),
        Case("DENSE", {**PARTITIONED, **OFFLOAD}),
        Case("DENSE", {**PARTITIONED, **OFFLOAD_ALL}, 1, "block"),
        # releases every weight right after its use, and gathers none ahead of it
        Case("DENSE", {**PARTITIONED, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}, 1, "block"),
        Case("TIED", PARTITIONED),
        Case("TIED", {"stage": 3}),  # as small a model is run by default: everything is kept whole
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(two_ranks: RankPool, case: Case) -> None:
    expected = train_in_one_process(case.model)
    assert expected["steps"][0]["norm"] > 2 * CLIP, "nothing was clipped, so the test would not see a wrong norm"
    answers = two_ranks.run(train_on_ranks, case)
    for answer in answers:
        assert figures(answer, "loss") == pytest.approx(figures(expected, "loss"), abs=1e-5)
        if case.zero["stage"] > 0:
            assert figures(answer, "norm") == pytest.approx(figures(expected, "norm"), rel=1e-4)
    assert_weights_agree([answer["weights"] for answer in answers], expected["weights"])


@pytest.mark.parametrize(
    ("case", "plain"),
    [
        (Case("MOE", {"stage": 1, **OFFLOAD}, 2, "block", True), Case("MOE", {"stage": 1}, 2, "none", True)),
        (Case("MOE", {"stage": 2, **OFFLOAD}, 1, "selective", True), Case("MOE", {"stage": 2}, 1, "none", True)),
        (Case("DENSE", {**PARTITIONED, **OFFLOAD_ALL}, 1, "block", True), Case("DENSE", {"stage": 2}, 1, "none", True)),
    ],
    ids=str,
)
def test_in_bf16_saving_memory_gives_what_the_same_reduction_gives_without(
    two_ranks: RankPool, case: Case, plain: Case
) -> None:
    """Gradients are rounded to bf16 in the same places: the plain run is the yardstick, not one process in fp32."""
    for ours, theirs in zip(two_ranks.run(train_on_ranks, case), two_ranks.run(train_on_ranks, plain), strict=True):
        assert figures(ours, "loss") == pytest.approx(figures(theirs, "loss"), abs=1e-5)
        assert figures(ours, "norm") == pytest.approx(figures(theirs, "norm"), rel=1e-4)
        for name, weight in theirs["first_weights"].items():
            assert weight.dtype == torch.bfloat16
            # The first gradients are equal bits; the two kernels of the update round differently in fp32, which now and
            # then is the next bf16 value, 2**-8 to 2**-7 away. Later steps see other gradients from there on.
            found = ours["first_weights"][name]
            torch.testing.assert_close(
                found, weight, rtol=2**-7, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- recomputing under expert parallelism -----------------------------------------------------------------------------


class CountOperators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_all_to_alls(case: Case) -> dict[str, Any]:
    """All-to-alls in the forward and backward pass of one micro-step, and all that the step came to."""
    engine = start_engine(case)
    with CountOperators() as forward:
        loss, _ = engine(*micro_batch(9, 0))
    with CountOperators() as backward:
        engine.backward(loss)
    engine.step()
    step = train_step(engine, 0)
    weights = whole_weights(engine, case)
    engine.destroy()
    passes = {"forward": forward, "backward": backward}
    counts = {name: counted.counts["moelab.all_to_all.default"] for name, counted in passes.items()}
    return {"counts": counts, "step": step, "weights": weights}


@pytest.mark.parametrize(("how", "repeated"), [("block", 3), ("selective", 0)])
def test_recomputing_keeps_all_to_alls_in_step_and_every_bit_of_the_result(
    two_ranks: RankPool, how: ActivationCheckpointing, repeated: int
) -> None:
    """Dropless: of three all-to-alls a layer two, those of rows, have a backward pass; the third tells the counts."""
    layers = 2
    plain = two_ranks.run(count_all_to_alls, Case("MOE", {"stage": 2}, 2))
    ours = two_ranks.run(count_all_to_alls, Case("MOE", {"stage": 2}, 2, how))
    for answer, expected in zip(ours, plain, strict=True):
        assert expected["counts"] == {"forward": 3 * layers, "backward": 2 * layers}
        assert answer["counts"] == {"forward": 3 * layers, "backward": (2 + repeated) * layers}
        assert (answer["step"]["loss"], answer["step"]["norm"]) == (expected["step"]["loss"], expected["step"]["norm"])
        for name, value, other in zip(
            expected["step"]["stats"]._fields, answer["step"]["stats"], expected["step"]["stats"], strict=True
        ):
            assert torch.equal(value, other), name
        for name, weight in expected["weights"].items():
            assert torch.equal(answer["weights"][name], weight), name


# --- ZeRO-3 beside the training loop ----------------------------------------------------------------------------------


def validate_and_generate(case: Case, between: bool) -> dict[str, Any]:
    """Two training steps; between them, if asked, what train.py does with engine.module on all ranks."""
    engine = start_engine(case)
    train_step(engine, 0)
    found = {}
    if between:
        engine.eval()
        with torch.no_grad():
            found["val"] = [float(engine.module(*micro_batch(step, 0))[0]) for step in range(2)]
        found["tokens"] = engine.module.generate([1, 2, 3], 6, seed=0)
        engine.train()
    found |= {"step": train_step(engine, 1)["loss"], "weights": whole_weights(engine, case)}
    engine.destroy()
    return found


def test_validating_and_generating_under_zero_3_is_that_of_zero_1_and_leaves_training_alone(
    two_ranks: RankPool,
) -> None:
    case = Case("DENSE", PARTITIONED)
    ours, without = (two_ranks.run(validate_and_generate, case, between) for between in (True, False))
    plain = two_ranks.run(validate_and_generate, Case("DENSE", {"stage": 1}), True)
    for rank in range(2):
        assert ours[rank]["val"] == pytest.approx(plain[rank]["val"], abs=1e-5)
        assert ours[rank]["tokens"] == plain[rank]["tokens"]
        assert ours[rank]["step"] == without[rank]["step"]
        for name, weight in without[rank]["weights"].items():
            assert torch.equal(ours[rank]["weights"][name], weight), name


def train_before_and_after(case: Case) -> list[dict[str, Any]]:
    """Training without an engine, before and after an engine of `case` came and went in the same process."""
    before = train_in_one_process.__wrapped__("DENSE")
    train_on_ranks(case)
    return [before, train_in_one_process.__wrapped__("DENSE")]


def test_an_engine_of_zero_3_leaves_nothing_behind_in_its_process(two_ranks: RankPool) -> None:
    for before, after in two_ranks.run(train_before_and_after, Case("DENSE", {**PARTITIONED, **OFFLOAD_ALL})):
        assert before["steps"] == after["steps"]
        assert all(torch.equal(after["weights"][name], weight) for name, weight in before["weights"].items())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state_of(case: Case, step: int) -> TrainingState:
    import torch.distributed as dist

    return TrainingState(
        step=step,
        samples=8 * step,
        world_size=dist.get_world_size(),
        ep_size=case.ep_size,
        zero_stage=case.zero["stage"],
        config_hash="of the test",
        data_fingerprint="synthetic",
    )


def save(engine: Any, case: Case, folder: Path, step: int) -> None:
    writer = CheckpointWriter(folder, keep_last=10)
    writer.save(TrainingPartition(engine, case.ep_size), f"step_{step:08d}", state_of(case, step))
    writer.wait()


def load(engine: Any, case: Case, folder: Path, step: int) -> None:
    name, manifest, notes = choose_checkpoint(folder, [f"step_{step:08d}"], state_of(case, 0))
    assert (manifest.state.step, notes) == (step, [])
    load_checkpoint(TrainingPartition(engine, case.ep_size), folder / name, manifest)


def save_in_the_middle(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Two more steps after a save, and the same two in a new engine that loaded it."""
    ends = []
    for resumed in (False, True):
        engine = start_engine(case)
        if resumed:
            load(engine, case, folder, 1)
        else:
            train_step(engine, 0)
            save(engine, case, folder, 1)
        steps = [train_step(engine, step) for step in (1, 2)]
        ends.append({"steps": steps, "weights": whole_weights(engine, case)})
        engine.destroy()
    return ends


@pytest.mark.parametrize(
    "case",
    [
        Case("MOE", {"stage": 1, **OFFLOAD}, 1, "none", True),
        Case("MOE", {"stage": 2, **OFFLOAD}, 2),
        Case("MOE", {"stage": 1}, 2, bf16=True, muon=True),  # momentum in bf16, loaded as fp32
        Case("MOE", {"stage": 2, "round_robin_gradients": True}, 2, bf16=True, muon=True),  # in another order
        Case("MOE", {"stage": 1, "parameter_alignment": True, "round_robin_gradients": True}, 1, bf16=True, muon=True),
        Case("MOE", {"stage": 2, **OFFLOAD}, 1, muon=True),  # momentum in a flat partition
        Case("DENSE", PARTITIONED, 1, "none", True),
        Case("DENSE", {**PARTITIONED, **OFFLOAD_ALL}),
        Case("TIED", PARTITIONED),
    ],
    ids=str,
)
def test_a_loaded_checkpoint_continues_bit_for_bit(two_ranks: RankPool, case: Case, tmp_path: Path) -> None:
    for saved, resumed in two_ranks.run(save_in_the_middle, case, tmp_path):
        assert figures(saved, "loss") == figures(resumed, "loss")
        assert figures(saved, "norm") == figures(resumed, "norm")
        for name, weight in saved["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name


def train(run_dir: Path, resume: str, *changes: str) -> None:
    """train.py on two ranks under ZeRO-3 with everything on the host, through torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = [
        "run.model.moe=null",
        "run.model.ffn_hidden_size=64",
        f"zero_optimization={json.dumps({**PARTITIONED, **OFFLOAD_ALL})}",
        "zero_force_ds_cpu_optimizer=false",
        "bf16.enabled=true",
        "run.train.num_steps=4",
        "run.train.save_every=2",
        "run.train.eval_every=2",
    ]
    program = [str(REPO_ROOT / "train.py"), "--config", str(REPO_ROOT / "ds_configs" / "moe_tiny.json")]
    subprocess.run(
        [*launcher, *program, "--run_dir", str(run_dir), "--resume", resume, "--set", *settings, *changes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=240,
        check=True,
    )


def results(run_dir: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in ("step", "train/loss", "train/grad_norm", "val/loss")] for line in lines]


def test_a_run_under_zero_3_continues_from_its_middle_bit_for_bit(tmp_path: Path) -> None:
    """With other activation checkpointing, too, which is not part of what a run folder holds on to."""
    train(tmp_path, "auto", "run.train.activation_checkpointing=block")
    whole = results(tmp_path)
    assert [step for step, *_ in whole] == [0, 1, 2, 3, 4]
    (tmp_path / "metrics.jsonl").rename(tmp_path / "metrics_of_the_whole_run.jsonl")
    train(tmp_path, "2")
    # the validation of step 2 is done again: who continues looks for it in metrics.jsonl, which is gone
    assert results(tmp_path) == [[2, None, None, whole[2][-1]], *whole[-2:]]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
