"""What is checked, in order of importance: parts, their cases, and the share of the time that each may take.

A part is one function over cases, in a process of its own. What a part does not need of its share goes to those after
it. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.gpu_check.shapes import SHAPES


@dataclass(frozen=True)
class Part:
    """Some cases that one process measures one after the other."""

    name: str
    title: str
    function: str  # module:function, called with (case, Context)
    cases: tuple[str, ...]  # in order of importance
    dry_cases: tuple[str, ...]  # those of --dry_run
    share: float  # of the time, against those of the other parts
    case_limit_s: float  # a case that takes longer hangs


ACCURACY = (
    "accuracy 3d-3d C=17",
    "accuracy 2d-3d groups 0,1,15,16,17",
    "accuracy 3d-3d C=4096",
    "accuracy 3d-3d C=1",
    "accuracy 2d-3d groups 0,0,0",
    "accuracy 2d-3d groups 4096,3071,0,5121",
)
# Of tests/gpu, the slowest last.
GPU_TESTS = (
    "test_fp8_gpu.py",
    "test_fp8_kernels_gpu.py",
    "test_checkpoint_gpu.py",
    "test_fp8_runs_gpu.py",
    "test_routing_gpu.py",
)
RELU2_CASTS = (  # those of the seed's experts; the first word is the function's name
    "quantize_rows x",
    "gather_quantize x",
    "gather_quantize dy",
    "activate_quantize relu2",
    "relu2_backward_quantize",
    "quantize_weights",
)
CASTS = (*RELU2_CASTS, "activate_quantize swiglu", "swiglu_backward_quantize")
# First what targets ask for, then the other optimizer, noise, and the questions that the seed's experiment left open.
STEP_CASES = (
    "bf16",
    "fp8_experts",
    "fp8_all",
    "dense",
    "fp8_experts_triton",
    "bf16_2048",
    "fp8_experts_2048",
    "fp8_all_2048",
    "fp8_without_experts",
    "fp8_all_triton",
    "fp8_experts_triton_2048",
    "adamw_bf16",
    "adamw_fp8_experts",
    "bf16_again",
    "fp8_experts_again",
    "capacity125_bf16",
    "capacity125_fp8_experts",
    "dropless_bf16",
    "dropless_fp8_experts",
    "none_bf16",
    "none_fp8_experts",
    "dynamic_bf16",
    "dynamic_fp8_experts",
    "torchao_grouped",
    "torchao_loop",
)

PARTS = (
    # Its share is for torch from a cold disk: without this part no result says on which GPU it was measured.
    Part("environment", "Environment", "tools.gpu_check.gpu:environment", ("gpu",), ("gpu",), 3.0, 60),
    Part(
        "tests",
        "Tests on the GPU",
        "tools.gpu_check.gpu_tests:gpu_tests",
        GPU_TESTS,
        GPU_TESTS,
        share=1.5,
        case_limit_s=240,
    ),
    Part(
        "gemm",
        "Matrix products",
        "tools.gpu_check.gemms:gemm",
        (
            "rates seed",
            "rates 2048",
            *ACCURACY,
            "lm_head 16384",
            "lm_head 1024",
            "attention 12x64",
            "attention 16x128",
            "rates E64",
            "rates 14336",
            "rates ep8",
        ),
        ("rates seed", *ACCURACY[:2], "lm_head 1024", "attention 12x64"),
        share=1.5,
        case_limit_s=60,
    ),
    Part(
        "casts",
        "Casts",
        "tools.gpu_check.casts:casts",
        tuple(f"{shape} {cast}" for shape in SHAPES for cast in CASTS),
        tuple(f"seed {cast}" for cast in CASTS),
        share=1.5,
        case_limit_s=60,
    ),
    Part(
        "mlp",
        "Experts alone, forward and backward",
        "tools.gpu_check.mlps:mlp",
        ("seed ours", "2048 ours", "E64 ours", "seed torchao", "14336 ours", "2048 torchao", "ep8 ours"),
        ("seed ours", "seed torchao"),
        share=1.5,
        case_limit_s=120,
    ),
    Part(
        "blocks",
        "MoE blocks with router, dispatch and combine",
        "tools.gpu_check.blocks:blocks",
        (
            "seed ours",
            "2048 ours",
            "seed peers",
            "seed torchao",
            "E64 ours",
            "seed dropless",
            "2048 torchao",
            "ep8 ours",
            "14336 ours",
        ),
        ("seed ours",),
        share=1.8,
        case_limit_s=150,
    ),
    Part(
        "steps",
        "Whole training steps",
        "tools.gpu_check.legs:steps",
        STEP_CASES,
        ("bf16", "fp8_experts"),
        share=6.0,
        case_limit_s=150,
    ),
    Part(
        "loss",
        "Loss over 300 steps",
        "tools.gpu_check.legs:loss",
        ("bf16", "fp8_experts", "bf16_again", "bf16_other_seed"),
        ("fp8_experts",),
        share=2.5,
        case_limit_s=150,
    ),
    Part(
        "sync",
        "Waits of the host, and recompiles",
        "tools.gpu_check.syncs:sync",
        ("bf16", "fp8_experts", "fp8_experts_triton"),
        ("bf16", "fp8_experts"),
        share=1.0,
        case_limit_s=90,
    ),
    Part(
        "profile",
        "Where a step's time goes",
        "tools.gpu_check.legs:profile",
        ("bf16", "fp8_experts", "fp8_experts_triton"),
        ("fp8_experts",),
        share=1.5,
        case_limit_s=120,
    ),
)
