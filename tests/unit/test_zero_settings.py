"""Which ZeRO settings a run may use: what works is let through, what DeepSpeed ignores or dies of is refused."""

from __future__ import annotations

import pytest

from launch.run_config import REPO_ROOT, Run, load_run
from launch.zero_settings import offloads, zero_stage
from model.config import ConfigError

DENSE = ["run.model.moe=null", "run.model.ffn_hidden_size=64"]
OFFLOAD = ["zero_optimization.offload_optimizer.device=cpu", "zero_force_ds_cpu_optimizer=false"]
OFFLOAD_PARAM = "zero_optimization.offload_param.device=cpu"


def load(*assignments: str) -> Run:
    """moe_tiny.json, which has experts and stage 1, with these changes."""
    return load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", list(assignments))


def stage(number: int | str) -> str:
    return f"zero_optimization.stage={number}"


NOT_0_WITH_MOE = (
    "zero_optimization.stage=0 averages the ranks' gradient norms, so with experts the norm and its clipping depend on "
    "their placement (deepspeed 0.19.8). Use 1 or 2."
)
FORCED = (
    'zero_optimization.offload_optimizer.device="cpu": DeepSpeed would insist on its own Adam, which it compiles at '
    'start-up; the optimizer here is torch\'s. State "zero_force_ds_cpu_optimizer": false.'
)
NEEDS_CPU_ADAM = "it needs DeepSpeed's own CPU Adam, and the optimizer is torch's. Remove it."
NO_NVME = "nothing is moved to NVMe, so it would have no effect. Remove it."


@pytest.mark.parametrize(
    "assignments",
    [
        [stage(2)],
        [stage(1), *OFFLOAD],
        [stage(2), *OFFLOAD, "zero_optimization.offload_optimizer.pin_memory=true"],
        [stage(0), *DENSE],
        [stage(3), *DENSE, "run.train.activation_checkpointing=block"],
        [stage(3), *DENSE, OFFLOAD_PARAM],
        [stage(3), *DENSE, OFFLOAD_PARAM, *OFFLOAD],
        # as files of other projects have them, at whatever stage
        ["zero_optimization.offload_optimizer.device=none", "zero_optimization.offload_param.device=none"],
        [stage(2), "zero_optimization.stage3_gather_16bit_weights_on_model_save=true"],
        [stage(2), *OFFLOAD, "bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
        [stage(2), "zero_optimization.stage3_max_live_parameters=1e9"],
        [stage(2), "run.train.activation_checkpointing=selective"],
    ],
    ids=" ".join,
)
def test_what_works_is_let_through(assignments: list[str]) -> None:
    load(*assignments)


@pytest.mark.parametrize(
    ("assignments", "error"),
    [
        (
            [stage(3), *DENSE, "run.compile.mode=static"],
            "run.compile.mode='static' is not supported at zero_optimization.stage=3, which gathers weights by hooks "
            "within a block. Use 'none', or stage 1 or 2.",
        ),
        ([stage(4)], "zero_optimization.stage=4: should be 0, 1, 2 or 3."),
        ([stage("true")], "zero_optimization.stage=true: should be 0, 1, 2 or 3."),
        ([stage(0)], NOT_0_WITH_MOE),
        (["zero_optimization=null"], NOT_0_WITH_MOE),
        (
            [stage(3)],
            "zero_optimization.stage=3 is not supported: DeepSpeed's MoE layer does not run under ZeRO-3. Use 1 or 2.",
        ),
        (
            [stage(3), *DENSE, "run.train.activation_checkpointing=selective"],
            "run.train.activation_checkpointing='selective' is not supported at zero_optimization.stage=3: ZeRO-3 "
            "gathers weights while a block is computed again. Use 'block' or 'none', or stage 1 or 2.",
        ),
        (
            [stage(3), *DENSE, "zero_optimization.stage3_module_granularity_threshold=1000"],
            "zero_optimization.stage3_module_granularity_threshold=1000 is not supported: the backward pass of a "
            "module that is gathered as a whole fails (deepspeed 0.19.8). Remove it.",
        ),
        (
            [stage(3), *DENSE, "zero_optimization.stage3_max_live_parameters=auto"],
            'zero_optimization.stage3_max_live_parameters="auto": should be a number of parameters.',
        ),
        (
            [stage(0), *DENSE, *OFFLOAD],
            'zero_optimization.offload_optimizer.device="cpu" has no effect at zero_optimization.stage=0. Remove it, '
            "or use stage 1, 2 or 3.",
        ),
        (
            [stage(2), OFFLOAD_PARAM],
            'zero_optimization.offload_param.device="cpu" has no effect at zero_optimization.stage=2. Remove it, or '
            "use stage 3.",
        ),
        (OFFLOAD[:1], FORCED),
        ([OFFLOAD[0], "zero_force_ds_cpu_optimizer=true"], FORCED),
        (
            ["zero_optimization.offload_optimizer.device=nvme"],
            'zero_optimization.offload_optimizer.device="nvme" is not supported: DeepSpeed compiles its disk access. '
            "Use 'cpu'.",
        ),
        (
            ["zero_optimization.offload_optimizer.device=gpu"],
            "zero_optimization.offload_optimizer.device=\"gpu\": should be 'cpu' or 'none'.",
        ),
        (
            [*OFFLOAD, "zero_optimization.offload_optimizer.nvme_path=/nvme"],
            f"zero_optimization.offload_optimizer.nvme_path is not supported: {NO_NVME}",
        ),
        (
            [*OFFLOAD, "zero_optimization.offload_optimizer.ratio=0.5"],
            f"zero_optimization.offload_optimizer.ratio is not supported: {NEEDS_CPU_ADAM}",
        ),
        (["zero_optimization.zenflow={}"], f"zero_optimization.zenflow is not supported: {NEEDS_CPU_ADAM}"),
        (
            [*OFFLOAD, "bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
            'data_types.grad_accum_dtype="fp32" has no effect with offload_optimizer at zero_optimization.stage=1 '
            "(deepspeed 0.19.8). Remove it, or use stage 2.",
        ),
        (
            ["zero_optimization.compute_grad_norm=false"],
            "zero_optimization.compute_grad_norm is not supported: every run logs its gradient norm, and skips an "
            "update if it is not finite. Remove it.",
        ),
        (
            ["zero_optimization.zero_quantized_gradients=true"],
            "zero_optimization.zero_quantized_gradients is not supported: communication in fewer bits would be another "
            "experiment. Remove it.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_deepspeed_would_ignore_or_die_of_is_refused_in_one_line(assignments: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(*assignments)
    assert str(refusal.value) == error
    assert "\n" not in error


def test_the_stage_and_what_is_offloaded_are_read_from_the_file() -> None:
    plain, offloaded = load(*DENSE, "zero_optimization=null").deepspeed, load(stage(2), *OFFLOAD).deepspeed
    assert (zero_stage(plain), offloads(plain)) == (0, False)
    assert (zero_stage(offloaded), offloads(offloaded), offloads(offloaded, "offload_param")) == (2, True, False)
