"""Legs of the seed's experiment through train.py: speed of whole steps, loss, and profile.

The seed's shape on one GPU: 4 micro-steps of 16 sequences of 1024 tokens. Text is the built-in corpus where that has
been prepared, else synthetic; every row says which.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from launch.run_config import REPO_ROOT, load_run
from launch.run_dir import read_summary
from model.data import builtin_dir
from model.flops import mfu_percent
from tools.gpu_check.child import Context, Row, without_triton_casts
from tools.gpu_check.programs import last_line, run_program

CONFIGS = REPO_ROOT / "ds_configs"
SETTLING, BLOCK_STEPS, BLOCKS = 7, 10, 4  # steps after train.py's own warm-up; those timed, in blocks
WARM_UP = 3  # train.py's (model/loop.py)
LOSS_STEPS, TAIL = 300, 50
PROFILED = 3

EXPERTS = 'run.fp8={"enabled": true}'
EXPERTS_TRITON = 'run.fp8={"enabled": true, "casts": "triton"}'
ALL = 'run.fp8={"enabled": true, "dense": true, "lm_head": true}'
ALL_TRITON = 'run.fp8={"enabled": true, "dense": true, "lm_head": true, "casts": "triton"}'
WITHOUT_EXPERTS = 'run.fp8={"enabled": true, "experts": false, "dense": true, "lm_head": true}'
WIDE = (  # 4 layers of hidden size 2048 with experts 4096 wide
    "run.model.num_layers=4",
    "run.model.hidden_size=2048",
    "run.model.num_attention_heads=16",
    "run.model.moe.ffn_hidden_size=4096",
)
NONE, DYNAMIC = "run.compile.mode=none", "run.compile.mode=dynamic"
DROPLESS, ROOMY = "run.model.moe.capacity_factor=0", "run.model.moe.capacity_factor=1.25"


class Leg(NamedTuple):
    """A run file and the changes to it."""

    assignments: tuple[str, ...] = ()
    config: str = "moe_d12.json"  # Muon, compiled static, capacity 1.0


LEGS = {
    "bf16": Leg(),
    "bf16_again": Leg(),
    "bf16_other_seed": Leg(("run.train.seed=1",)),
    "fp8_experts": Leg((EXPERTS,)),
    "fp8_experts_again": Leg((EXPERTS,)),
    "fp8_experts_triton": Leg((EXPERTS_TRITON,)),
    "fp8_all": Leg((ALL,)),
    "fp8_all_triton": Leg((ALL_TRITON,)),
    "fp8_without_experts": Leg((WITHOUT_EXPERTS,)),
    "dense": Leg(config="dense_d12.json"),
    "bf16_2048": Leg(WIDE),
    "fp8_experts_2048": Leg((*WIDE, EXPERTS)),
    "fp8_experts_triton_2048": Leg((*WIDE, EXPERTS_TRITON)),
    "fp8_all_2048": Leg((*WIDE, ALL)),
    "adamw_bf16": Leg(config="moe_d12_adamw.json"),
    "adamw_fp8_experts": Leg((EXPERTS,), "moe_d12_adamw.json"),
    "capacity125_bf16": Leg((ROOMY,)),
    "capacity125_fp8_experts": Leg((ROOMY, EXPERTS)),
    "dropless_bf16": Leg((DROPLESS,)),
    "dropless_fp8_experts": Leg((DROPLESS, EXPERTS)),
    "none_bf16": Leg((NONE,)),
    "none_fp8_experts": Leg((NONE, EXPERTS)),
    "dynamic_bf16": Leg((DYNAMIC,)),
    "dynamic_fp8_experts": Leg((DYNAMIC, EXPERTS)),
    "torchao_grouped": Leg(('run.fp8={"enabled": true, "recipe": "rowwise"}',)),
    "torchao_loop": Leg(
        ('run.fp8={"enabled": true, "recipe": "tensorwise"}', "run.model.moe.expert_backend=loop"),
    ),
}
BATCH = {"steps": 64, "loss": 16, "profile": 64}  # sequences: 4 micro-steps, or one
DRY_ASSIGNMENTS = ("bf16.enabled=true", "run.launch.num_gpus=1")  # to moe_tiny.json


def steps(case: str, context: Context) -> None:
    """How fast a leg's steps are, from the times of each of them."""
    if leg := finished("steps", case, context):
        leg.report_speed(0 if context.dry_run else SETTLING)


def loss(case: str, context: Context) -> None:
    """What a leg learns in LOSS_STEPS steps of one micro-batch each."""
    if leg := finished("loss", case, context):
        leg.report_loss()


def profile(case: str, context: Context) -> None:
    """The time of a leg's steps by part."""
    if leg := finished("profile", case, context):
        leg.report_profile()


def run_of(part: str, case: str, dry_run: bool) -> tuple[Path, list[str]]:
    """Run file and changes to it of a leg in a part."""
    leg = LEGS[case]
    config = CONFIGS / ("moe_tiny.json" if dry_run else leg.config)
    assignments = list(DRY_ASSIGNMENTS) if dry_run else [f"train_batch_size={BATCH[part]}", "run.launch.num_gpus=1"]
    data = data_of(config, dry_run)
    assignments += [*leg.assignments, f"run.data.train={data}", "run.train.eval_every=null"]
    if part == "loss":
        count = WARM_UP + 3 if dry_run else LOSS_STEPS
        assignments += [f"run.train.num_steps={count}", "run.train.log_every=1", "run.train.sample_tokens=0"]
        if data == "synthetic":  # whose validation loss says nothing more
            assignments.append("run.data.val=none")
    else:
        timed = 3 if dry_run else SETTLING + BLOCK_STEPS * BLOCKS
        last = WARM_UP + (timed if part == "steps" else PROFILED + 1)
        assignments += [f"run.train.stop_at_step={last}", "run.data.val=none"]
    if part == "profile":
        assignments += [f"run.train.profile_steps={PROFILED}"]
    return config, [*assignments, "run.wandb.mode=disabled"]


def data_of(config: Path, dry_run: bool) -> str:
    """The built-in text if it lies prepared, else synthetic tokens."""
    vocab_size = load_run(config).model.vocab_size
    return "builtin" if not dry_run and (builtin_dir(vocab_size) / "manifest.json").is_file() else "synthetic"


class Finished:
    """A leg that ran to its end: what its run folder says."""

    def __init__(self, case: str, run_dir: Path, facts: Row, launched: datetime, context: Context) -> None:
        summary = read_summary(run_dir)
        assert summary is not None
        self.case, self.run_dir, self.facts, self.context = case, run_dir, facts, context
        self.summary = summary
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.metrics: list[dict[str, Any]] = [json.loads(line) for line in lines]
        begun = (datetime.fromisoformat(summary["started"]) - launched).total_seconds()
        first = next(line for line in self.metrics if line["step"] == 1)
        self.launch_to_first_step_s = begun + first["time/total_s"]

    def report_speed(self, settling: int) -> None:
        summary = self.summary
        ms = summary["step_ms"][settling:]
        dt_ms = statistics.median(ms)
        tok_per_sec = 1000 * summary["tokens"] / summary["step"] / dt_ms
        first, _, third = statistics.quantiles(ms, n=4, method="inclusive")
        row: Row = {
            "what": self.case,
            **self.facts,
            "tok_per_sec": tok_per_sec,
            "dt_ms": dt_ms,
            "dt_ms_iqr": third - first,
            "dt_ms_blocks": [
                round(statistics.median(ms[at : at + BLOCK_STEPS]), 4) for at in range(0, len(ms), BLOCK_STEPS)
            ],
            "steps_timed": len(ms),
            "warm_up": WARM_UP + settling,
            "mfu": mfu_percent(tok_per_sec, summary["flops_per_token"], summary.get("peak_flops")),
            "peak_flops": summary.get("peak_flops"),
            "flops_per_token": summary["flops_per_token"],
            "peak_mem_mib": summary["peak_mem_mib"],
            "compile_s": summary.get("time/compile_s"),
            "launch_to_first_step_s": self.launch_to_first_step_s,
            "graphs": summary["compiled_graphs"],
            "recompiles": summary["recompiles"],
            "fp8_matrices": summary.get("fp8_matrices"),
        }
        self.context.add(row)

    def report_loss(self) -> None:
        found = [line["train/loss"] for line in self.metrics if line.get("train/loss") is not None]
        summary = self.summary
        self.context.add(
            {
                "what": self.case,
                **self.facts,
                "steps": len(found),
                "last_loss": found[-1],
                "mean_last50_loss": statistics.fmean(found[-TAIL:]),
                "val_loss": summary.get("val/loss"),
                "val_bpb": summary.get("val/bpb"),
                "losses": [round(value, 5) for value in found[9::10]],  # of every tenth step
            }
        )

    def report_profile(self) -> None:
        parts = json.loads((self.run_dir / "profile" / "parts.json").read_text(encoding="utf-8"))
        self.context.add({"what": self.case, **self.facts, "parts": parts})
        shutil.copy(self.run_dir / "profile" / "table.md", self.context.logs / f"profile_{self.case}.md")


def finished(part: str, case: str, context: Context) -> Finished | None:
    """Run a leg in a fresh folder; None if a row says why not. Raises RuntimeError if it fails."""
    if "triton" in case and (why := without_triton_casts(context.dry_run)):
        context.add({"what": case, "absent": why})
        return None
    config, assignments = run_of(part, case, context.dry_run)
    run_dir, printed = context.work / f"run_{case}", context.logs / f"{part}_{case}.txt"
    shutil.rmtree(run_dir, ignore_errors=True)
    # Compiled code is kept for legs of a kind, or the minutes would go to compiling; the first of each compiles all.
    kind = "fp8" if any("run.fp8" in each for each in assignments) else "bf16"
    cache = context.work.parent / f"inductor_legs_{kind}"
    cold = not cache.is_dir()
    command = [sys.executable, "-m", "tools.gpu_check.leg", "--config", str(config), "--run_dir", str(run_dir)]
    launched = datetime.now(UTC)
    code = run_program([*command, "--set", *assignments], printed, {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    cache.mkdir(exist_ok=True)
    summary = read_summary(run_dir)
    if summary is None or summary["status"] not in ("completed", "stopped"):
        why = f"{summary['status']}: {summary['reason']}" if summary else last_line(printed)
        raise RuntimeError(f"exit code {code}: {why}")
    facts = {
        "config": str(config.relative_to(REPO_ROOT)),
        "set": assignments,
        "data": summary["data"],
        "inductor_cache": "empty" if cold else "warm",
    }
    return Finished(case, run_dir, facts, launched, context)
