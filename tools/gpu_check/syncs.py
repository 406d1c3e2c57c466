"""Does a compiled MoE block wait for the device, and is it compiled again when its data changes?"""

from __future__ import annotations

from typing import Literal

import torch

from model.compiling import CompileWatch, compile_blocks
from model.config import FP8Config, ModelConfig, MoEConfig
from model.fp8 import apply_fp8
from model.fp8_weights import refresh_fp8
from model.gpt import GPT
from tools.gpu_check.child import Context, Row, device_answers, faults, in_one_line, without_triton_casts

BATCHES = 8  # of other data after the first two
CAPACITIES = (1.0, 0.0)


def sync(case: str, context: Context) -> None:
    if "triton" in case and (why := without_triton_casts(context.dry_run)):
        context.add({"what": case, "absent": why})
        return
    for capacity in CAPACITIES[:1] if context.dry_run else CAPACITIES:
        one_block(case, capacity, context)


def one_block(case: str, capacity: float, context: Context) -> None:
    """Forward and backward of the last block of a one-block model, on data that is another in every micro-step."""
    torch.compiler.reset()
    D, F, S, B, E = (32, 32, 32, 2, 4) if context.dry_run else (768, 1536, 1024, 16, 8)
    moe = MoEConfig(num_experts=E, top_k=2, ffn_hidden_size=F, capacity_factor=capacity)
    config = ModelConfig(
        num_layers=1, hidden_size=D, num_attention_heads=D // 16 if context.dry_run else 12, seq_len=S,
        vocab_size=256, value_embeddings=True, moe=moe,
    )  # fmt: skip
    model = GPT(config).to(device=context.device, dtype=torch.bfloat16).train()
    with torch.no_grad():  # gates and output matrices begin at zero, where routing never changes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if case != "bf16":
        casts: Literal["torch", "triton"] = "triton" if "triton" in case else "torch"
        apply_fp8(model, FP8Config(enabled=True, casts=casts), emulate=context.dry_run, compiled=not context.dry_run)
    refresh_fp8(model)
    compile_blocks(model.blocks, "none" if context.dry_run else "static")
    watch = CompileWatch()
    row: Row = {"what": case, "capacity_factor": capacity, "shape": f"B={B}, S={S}, D={D}, F={F}, E={E}"}

    def micro_step(number: int) -> None:
        generator = torch.Generator(context.device).manual_seed(number)
        x = torch.randn(B, S, D, generator=generator, device=context.device).to(torch.bfloat16).requires_grad_()
        tokens = torch.randint(256, (B, S), generator=generator, device=context.device)
        grad = torch.randn(B, S, D, generator=generator, device=context.device).to(torch.bfloat16)
        on_gpu = context.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            y, _ = model.blocks[0](x, tokens, (model.rotary_cos[:S], model.rotary_sin[:S]))
            y.backward(grad)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    try:
        micro_step(0)
        watch.look("micro-step")
        for number in range(1, 2 + BATCHES):
            micro_step(number)
            watch.look("micro-step")
        row |= {"waits": "none in forward and backward", "graphs": watch.graphs, "recompiles": watch.recompiles}
        if watch.recompiles:
            row["error"] = f"compiled again: {', '.join(watch.graphs)}"
    except faults() as fault:
        if not device_answers():
            raise
        row["error"] = in_one_line(fault)
    finally:
        watch.close()
    context.add(row)
