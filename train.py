"""Train one run file: `deepspeed --num_gpus 8 train.py --config ds_configs/moe_d12.json`.

The same program runs under torchrun and, with one rank, under plain python. Read it top to bottom: start, data, model
and engine, the loop, validation, and how it ends. What the files in the run folder mean stands in launch/run_dir.py.
"""

from __future__ import annotations

from launch.begin import begin_or_exit, say_refusal

if __name__ == "__main__":
    START = begin_or_exit()  # a run that cannot work is refused here, before the seconds that torch takes to import

import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from launch import faults
from launch.begin import Start
from launch.environment import describe_environment
from launch.gpu_monitor import GpuMonitor, describe_gpu, gpus_of_this_machine
from launch.rank_watch import RankWatch
from launch.run_config import REPO_ROOT, Run
from launch.run_dir import (
    EXIT_CODES,
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_REFUSED,
    Status,
    checkpoint_name,
    latest_step,
    saved_steps,
    write_json,
    write_text,
)
from launch.run_log import RunLog, tail_figures
from launch.zero_settings import offloads, zero_stage
from model.attention import attention_backend
from model.checkpoint import CheckpointWriter, choose_checkpoint, load_checkpoint, name_latest
from model.compiling import CompileWatch, compile_blocks
from model.config import CheckpointError, ConfigError, DataError
from model.data import builtin_dir
from model.device import on_gpu, own_gpu, torch_settings
from model.flops import count_parameters, flops_per_token, mfu_percent, peak_flops
from model.fp8_matmul import refuse_fp8
from model.fp8_weights import refresh_fp8, refuse_stale
from model.gpt import GPT
from model.guard import LossSpike, Skipped, UpdateGuard
from model.loop import (
    WARM_UP_STEPS,
    StepTimer,
    StopRequest,
    max_over_ranks,
    peak_memory_mib,
    told_by_all_ranks,
)
from model.loss import refuse_cross_entropy
from model.manifest import Manifest, TrainingState
from model.not_finite import NotFinite, locate, refuse_not_finite_weights
from model.optim import assign, assignment_table, build_optimizer, set_lr
from model.partition import TrainingPartition
from model.phases import listeners, reached
from model.profile import Report, StepProfile, part
from model.router import selection_bias_ME, update_selection_bias
from model.schedule import lr_factor
from model.splits import Data, open_data
from model.stats import StepStats, StepTotals, bias_metrics

SAVE_PATIENCE_S = 10.0  # after a fault, for a save that is being written; another rank may be gone, and never write


def main(start: Start) -> int:
    """Run to an end of any kind and return the exit code; summary.json says the same in words."""
    if start.beginning.action == "completed":
        if start.rank == 0:
            print(f"{start.args.run_dir} is completed ({start.beginning.step} steps). Nothing to do.")
        return EXIT_COMPLETED
    watch = RankWatch(
        start.rank,
        start.args.run_dir,
        launchers=start.launchers,
        stop_file=start.args.stop_file if start.rank == 0 else None,
        hang_timeout_s=start.run.train.hang_timeout_s,
    ).start()
    listeners.append(watch.reached)
    try:
        return run_under_watch(start, watch)
    finally:
        listeners.remove(watch.reached)
        watch.close()


def run_under_watch(start: Start, watch: RankWatch) -> int:
    run, run_dir = start.run, start.args.run_dir
    try:
        prepare_builtin_data(run, start.local_rank)
        set_up_process(start)
        data = open_on_all_ranks(start)
        beginning = begin_with(start, data)
    except (ConfigError, DataError, CheckpointError) as error:
        say_refusal(error, start.rank, start.args)
        return EXIT_REFUSED

    log, trainer = None, None
    try:
        environment = environment_of(start, data)
        if start.rank == 0 and start.args.resume != "auto" and beginning.checkpoint is not None:
            name_latest(beginning.checkpoint)  # before the lines of later steps go: that branch is abandoned
        log = RunLog(
            run_dir,
            run,
            resumed_step=beginning.state.step,
            total_steps=run.num_steps,
            enabled=start.rank == 0,
            environment=environment,
        )
        gpus = gpus_of_this_machine(environment["ranks"]) if start.rank == 0 else []  # the others record nothing
        gpu_monitor = GpuMonitor(gpus, log.say)
        trainer = Trainer(start, log, data, beginning, watch, gpu_monitor)
        watch.meet(told_by_all_ranks, trainer.end_from_outside, collectives_block=not on_gpu())
        status, reason = trainer.run_to_end()
        watch.claim_end()
        faults.finish(log, status, reason, trainer.figures())
        return EXIT_CODES.get(status, EXIT_FAILED)
    except BaseException as error:  # of any kind: it is written down, and the run has failed
        watch.claim_end(fault=True)
        if trainer is not None:
            trainer.writer.finish_alone(SAVE_PATIENCE_S)  # what was copied before the fault is sound
        status, reason = ("nan", str(error)) if isinstance(error, NotFinite) else faults.status_of(error)
        if isinstance(error, NotFinite | LossSpike):  # which say all in their one line
            if trainer is not None:
                reason += f"; last saved: {trainer.last_saved()}"
        else:
            faults.record_fault(run_dir, start.rank, log, error)
            if faults.lost_peer(error):
                watch.speak_for_rank_0("rank 0 ended without a word")
        if log is not None:
            figures = trainer.figures(timed=False) if trainer is not None else {}
            faults.finish(log, status, reason, figures | {"lost_peer": faults.lost_peer(error) or None})
        return EXIT_FAILED
    finally:
        if trainer is not None:
            trainer.gpu_monitor.close()
            trainer.compiles.close()


# --- before the model -----------------------------------------------------------------------------------------------


def prepare_builtin_data(run: Run, local_rank: int) -> None:
    """Make the built-in dataset on first use, on local rank 0; the other ranks wait for it at the rendezvous."""
    folder = builtin_dir(run.model.vocab_size)
    if local_rank != 0 or "builtin" not in run.data.prefixes or (folder / "manifest.json").exists():
        return
    command = [sys.executable, "-m", "tools.prepare_data", "--builtin", "--vocab_size", str(run.model.vocab_size)]
    stderr = None if sys.stderr.isatty() else subprocess.PIPE  # a person sees the progress bar
    done = subprocess.run(command, cwd=REPO_ROOT, stderr=stderr, text=True, check=False)
    if done.returncode:
        last = ((done.stderr or "see above").strip().splitlines() or ["no message"])[-1].removeprefix("DataError: ")
        raise DataError(f"run.data: the built-in dataset could not be prepared: {last}")


def set_up_process(start: Start) -> None:
    """Join the other ranks; quiet DeepSpeed's logger; share the cores of a CPU machine among its ranks."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls what torch 2.13 renamed
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=f".*{name}.*")
    # what inductor (torch 2.13) says, again and again, of loops for the CPU that make FP8 of bf16
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed in the scheduler node")
    if on_gpu():
        torch.cuda.set_device(start.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // start.topology.gpus_per_node))
    patience = start.run.train.hang_timeout_s or 0.0
    # Collectives wait for longer than the watch, which says who did not come to one.
    deepspeed.init_distributed(timeout=timedelta(seconds=max(600.0, 2 * patience)))


def open_on_all_ranks(start: Start) -> Data:
    """This rank's data.

    Raises the same error on every rank if any of them is refused its files, or if the ranks do not see the same ones.
    """
    run, refusal = start.run, None
    facts: dict[str, object] = {"run file": run.config_hash, "ep_size": start.topology.ep_size}
    facts["checkpoint"] = (start.beginning.action, start.beginning.steps)
    try:
        refuse_unshared_folder(start)
        refuse_cross_entropy(run.train.cross_entropy, on_gpu())
        refuse_fp8(run.fp8, on_gpu(), bf16=run.deepspeed.get("bf16", {}).get("enabled", False))
        data = open_data(
            run.data.train,
            run.data.val,
            run.model,
            seed=run.train.seed,
            micro_batch_size=run.micro_batch_size,
            rank=start.rank,
            world_size=start.topology.ranks,
        )
        facts["training data"] = data.train.fingerprint
        facts["validation data"] = data.fingerprints()["val"]
    except (ConfigError, DataError) as error:
        refusal = error

    told = told_by_all_ranks((refusal, facts))
    for rank, (theirs, _) in enumerate(told):
        if theirs is not None:
            raise theirs if rank == 0 else type(theirs)(f"rank {rank}: {theirs}")
    for name in facts:
        found = sorted({str(theirs[name]) for _, theirs in told})
        if len(found) > 1:
            raise ConfigError(f"{name}: the ranks see different ones ({', '.join(found)}). Let them share their files.")
    return data


def refuse_unshared_folder(start: Start) -> None:
    """Raise ConfigError on a node that does not see the folder beside the run folder that launch.run speaks through."""
    if start.args.stop_file is not None and not start.args.stop_file.parent.is_dir():
        raise ConfigError(
            f"--run_dir {start.args.run_dir}: {socket.gethostname()} does not see the {start.args.run_dir.parent} of "
            "launch.run. Name a folder on storage that all nodes share."
        )


@dataclass(frozen=True)
class BeginWith:
    """The state that an attempt begins with, and the checkpoint that it comes from, if it continues one."""

    state: TrainingState
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()  # what there is to say of it
    off_line: tuple[str, ...] = ()  # checkpoints that were passed over, and later ones: damaged, or of another branch


def begin_with(start: Start, data: Data) -> BeginWith:
    """Step 0 under this topology, or the first checkpoint that is whole. All ranks call this."""
    here = TrainingState(
        step=0,
        samples=0,
        world_size=start.topology.ranks,
        ep_size=start.topology.ep_size,
        zero_stage=zero_stage(start.run.deepspeed),
        config_hash=start.run.config_hash,
        data_fingerprint=data.train.fingerprint,
    )
    if start.beginning.action == "fresh":
        return BeginWith(here)
    folder = start.args.run_dir / "checkpoints"
    names = [checkpoint_name(step) for step in start.beginning.steps]
    name, manifest, notes = choose_checkpoint(folder, names, here)
    saved = manifest.state
    latest, later = latest_step(start.args.run_dir), [step for step in start.beginning.steps if step > saved.step]
    if start.args.resume == "auto" and latest != saved.step:
        named = "nothing" if latest is None else checkpoint_name(latest)
        notes.append(f"{folder / 'latest'} names {named}; the newest checkpoint that is whole is {name}")
    elif later:
        # of a branch that was abandoned with --resume STEP; or somebody, or a flipped bit, has changed `latest`
        steps = ", ".join(checkpoint_name(step) for step in sorted(later))
        notes.append(f"{folder / 'latest'} names {name}, though later ones are there ({steps}); see --resume STEP")
    for key in ("world_size", "ep_size", "zero_stage"):
        before, now = getattr(saved, key), getattr(here, key)
        if before != now:
            notes.append(f"{name} was saved with {key}={before}; this run has {now}")
    state = here.model_copy(update={"step": saved.step, "samples": saved.samples, "guard": saved.guard})
    passed_by = [checkpoint_name(step) for step in saved_steps(start.args.run_dir) if step > saved.step]
    return BeginWith(state, folder / name, manifest, tuple(notes), (*names[: names.index(name)], *passed_by))


def environment_of(start: Start, data: Data) -> dict[str, Any]:
    """What this attempt ran on, for env.json. All ranks call this: each tells its machine and its GPU."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else ["cpu"]
    own: dict[str, Any] = {"hostname": socket.gethostname()}
    if on_gpu():
        gpu = own_gpu()
        own["gpu"] = {**gpu, **describe_gpu(gpu["uuid"])}
    return {
        **describe_environment(start.run, sys.argv, devices),
        "torch": torch_settings(),
        "world_size": start.topology.ranks,
        "ep_size": start.topology.ep_size,
        "accumulation_steps": start.topology.accumulation_steps,
        "ranks": told_by_all_ranks(own),
        "data": data.fingerprints(),
    }


# --- the run --------------------------------------------------------------------------------------------------------


class Trainer:
    """One attempt at a run: model, engine, data, and the loop over optimizer steps."""

    def __init__(
        self,
        start: Start,
        log: RunLog,
        data: Data,
        beginning: BeginWith,
        watch: RankWatch,
        gpu_monitor: GpuMonitor,
    ) -> None:
        self.run, self.topology, self.log, self.data = start.run, start.topology, log, data
        # a save that fails in the background ends the run at the next step, not at the next save
        self.watch = watch
        self.stop = StopRequest(lambda: watch.is_asked() or self.writer.has_failed, watch.stand_by)
        self.gpu_monitor, self.compiles = gpu_monitor, CompileWatch()
        self.run_dir, self.checkpoints = start.args.run_dir, start.args.run_dir / "checkpoints"
        self.beginning, self.state = beginning, beginning.state
        self.step, self.samples = self.state.step, self.state.samples
        self.writer = CheckpointWriter(self.checkpoints, self.run.train.keep_last, beginning.off_line)
        self.save_due = False  # in a row of skipped steps: after it
        self.saved_step = None
        if beginning.checkpoint is not None:
            self.saved_step = self.step
            self.watch.state_is_saved(self.writer.finish_alone)
        self.began = time.monotonic()
        self.fp8_matrices: dict[str, int] | None = None
        self.guard = UpdateGuard(self.run.train.spike_factor)
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self.peak_memory_mib = 0.0
        self.counts, self.flops_per_token = count_parameters(self.run.model), flops_per_token(self.run.model)
        self.device_name = torch.cuda.get_device_name() if on_gpu() else "cpu"
        self.peak_flops = peak_flops(self.device_name)

    def run_to_end(self) -> tuple[Status, str]:
        """Build, loop, and return (status, reason)."""
        run, train = self.run, self.run.train
        self.build_engine()
        self.describe()
        last = min(run.num_steps, train.stop_at_step or run.num_steps)
        self.profile = self.plan_profile(last - self.step)
        self.timer = StepTimer(self.engine.device, self.profile.steps)
        self.gpu_monitor.start()
        self.save()  # of a fresh run: proof that a checkpoint has room, and the state if a stop comes while compiling
        if self.step == 0 or self.owes_validation():
            self.record(self.validate())

        self.stop.agreed_by_all_ranks(self.engine.device, wait=True)
        while self.step < last and not self.stop.agreed:
            stats = self.profiled_step()
            stopping = self.stop.agreed_by_all_ranks(self.engine.device) or self.step == last
            self.save_due |= self.is_due(train.save_every)
            saving = stopping or (self.save_due and not self.guard.in_a_row)  # or it pushes out one from before
            metrics = {}
            if saving or self.step == 1 or self.is_due(train.log_every) or self.guard.in_a_row:
                metrics = self.train_metrics(stats)
            elif self.is_due(train.expert_load_every):
                self.routing_metrics(stats.reduce())
            if self.is_due(train.eval_every):
                compiles = self.run.compile.mode != "none" and "val/loss" not in self.latest
                if compiles and not self.guard.in_a_row:
                    self.save()  # what a stop while validation compiles would wait for
                metrics |= self.validate()
                if self.stop.agreed and not metrics:
                    metrics = self.train_metrics(stats)
            self.record(metrics)
            if saving:
                self.save()
            if self.is_due(train.sample_every) and self.step < run.num_steps:
                self.sample()
        if not self.profile.close():
            self.log.say("no profile: the run stops before its steps are done")

        self.save()
        self.writer.wait()
        if self.step == run.num_steps and not self.stop.agreed:
            if not self.is_due(train.eval_every) or "val/loss" not in self.latest:  # resumed at the end
                self.record(self.validate())
            self.sample()
            if not self.stop.agreed:
                return "completed", f"all {run.num_steps} steps done"
        asked = self.watch.asked or "asked at another rank"
        wish = f"run.train.stop_at_step={train.stop_at_step}" if self.step >= last else asked
        return "stopped", f"{wish}, after step {self.step} of {run.num_steps}"

    def owes_validation(self) -> bool:
        """Whether an attempt was stopped before it had validated the step that this one continues. Rank 0 knows."""
        owes = self.is_due(self.run.train.eval_every) and self.step < self.run.num_steps
        return owes and max_over_ranks(float(self.log.lacks(self.step, "val/loss")), self.engine.device) > 0

    def end_from_outside(self, status: Status, reason: str, figures: dict[str, Any]) -> None:
        """What the watch calls, in a thread of its own, where it ends the run."""
        faults.finish(self.log, status, reason, self.figures(timed=False) | figures)

    def build_engine(self) -> None:
        """Model, optimizer and engine; then the checkpoint, if this attempt continues one."""
        reached("build")
        ep_size = self.topology.ep_size
        train = self.run.train
        model = GPT(
            self.run.model,
            ep_size,
            dist.get_rank() % ep_size,
            train.seed,
            train.activation_checkpointing,
            train.cross_entropy,
        )
        self.apply_fp8(model)
        compile_blocks(model.blocks, self.run.compile.mode)
        # The optimizer comes built, and without its section: given "Muon", deepspeed 0.19.8 would choose the matrices.
        config = {key: value for key, value in self.run.deepspeed.items() if key != "optimizer"}
        section, router_optimizer = self.run.deepspeed["optimizer"], self.run.train.router_optimizer
        fused = on_gpu() or offloads(self.run.deepspeed)  # torch has one kernel for the update on either device
        optimizer = build_optimizer(model, section, router_optimizer, fused)
        assignments = assign(model, section, router_optimizer)
        self.log.say(assignment_table(assignments, ep_size))
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        flagged = {name for name, parameter in model.named_parameters() if getattr(parameter, "use_muon", False)}
        assert flagged == {row.name for row in assignments if row.optimizer == "muon"}
        assert self.engine.gradient_accumulation_steps() == self.topology.accumulation_steps
        self.guard.watch(self.engine)
        if self.beginning.checkpoint is not None:
            self.load()
        refresh_fp8(self.engine.module)

    def load(self) -> None:
        """Load the checkpoint that this attempt continues."""
        beginning, engine = self.beginning, self.engine
        assert beginning.checkpoint is not None
        assert beginning.manifest is not None
        load_checkpoint(TrainingPartition(engine, self.topology.ep_size), beginning.checkpoint, beginning.manifest)
        engine.global_steps, engine.global_samples = self.step, self.samples
        self.guard.load(self.state.guard)

    def apply_fp8(self, model: GPT) -> None:
        """Convert what run.fp8 asks for; the engine must see the final modules."""
        if not self.run.fp8.enabled:
            return
        from model.fp8 import apply_fp8  # loads torchao: seconds

        compiled = self.run.compile.mode != "none"
        conversion = apply_fp8(model, self.run.fp8, emulate=not on_gpu(), compiled=compiled)
        self.fp8_matrices = {"converted": conversion.converted, "skipped": conversion.skipped}
        self.log.say(conversion.text())

    def train_step(self) -> StepStats:
        """One optimizer step: all its micro-steps, on this rank's share of the next train_batch_size sequences."""
        moe = self.run.model.moe
        stats = StepStats(len(self.run.model.moe_layers), moe.num_experts if moe is not None else 0, self.engine.device)
        set_lr(self.engine.optimizer, self.lr_factor)
        self.engine.train()
        self.timer.start()
        for _ in range(self.topology.accumulation_steps):
            reached("forward")
            with part("data"):
                batch = self.on_device(self.data.train.batches.micro_batch(self.samples))
            earlier = (stats.tokens_per_expert_ME,) if moe is not None and moe.aux_over_global_batch else ()
            loss, micro_stats = self.engine(*batch, *earlier)
            reached("backward")
            self.engine.backward(self.guard.loss(loss, micro_stats.cross_entropy))
            reached("update")
            with part("optimizer"):
                self.engine.step()
            stats.add(micro_stats)
            self.samples += self.data.train.batches.samples_per_micro_step
        with part("optimizer"):
            refresh_fp8(self.engine.module)
        skipped = self.guard.after_update()
        with part("router"):
            if skipped is None:
                update_selection_bias(self.engine.module, stats.tokens_per_expert_ME)
        self.timer.stop()
        self.step += 1
        self.tell_recompiles("training step")
        if skipped is not None:
            self.tell_skipped(skipped)
        return stats

    def tell_skipped(self, skipped: Skipped) -> None:
        """Say why the step just done updated nothing; end the run if that is once too often in a row."""
        most = self.run.train.max_skipped_steps
        told = f"no update in step {self.step}: {skipped} ({skipped.in_a_row} in a row, {most} allowed)"
        self.log.say(told)
        if skipped.in_a_row <= most:
            return
        if skipped.spike is not None:
            raise LossSpike(told)
        stride = self.data.train.batches.samples_per_micro_step
        firsts = range(self.samples - self.topology.accumulation_steps * stride, self.samples, stride)
        batches = [self.on_device(self.data.train.batches.micro_batch(first)) for first in firsts]
        raise NotFinite(f"{told}; {locate(self.engine.module, batches)}")

    def tell_recompiles(self, phase: str) -> None:
        """Say what was compiled in a phase that had been compiled before: its shapes or settings change."""
        graphs = self.compiles.look(phase)
        if graphs:
            self.log.say(
                f"compiled again in a {phase} after step {self.step}: {', '.join(graphs)} "
                f"({self.compiles.seconds:.0f} s in all). TORCH_LOGS=recompiles tells why."
            )

    def plan_profile(self, steps_left: int) -> StepProfile:
        """The profile of this attempt, which may ask for more steps than are left."""
        asked = self.run.train.profile_steps or 0
        steps = max(0, min(asked, steps_left - WARM_UP_STEPS))
        if steps < asked:
            self.log.say(
                f"run.train.profile_steps={asked}: {steps_left} steps are left, of which the first {WARM_UP_STEPS} "
                f"warm up. {steps or 'None'} will be profiled."
            )
        rank = dist.get_rank()
        return StepProfile(steps, self.step + 1, self.engine.module, self.engine.device, rank == 0, self.keep_profile)

    def profiled_step(self) -> StepStats:
        """An optimizer step, and what is measured around it if it is to be profiled."""
        if self.profile.begins and self.profile.compiled:
            self.engine.train()
            self.profile.time_uncompiled(self.on_device(self.data.train.batches.micro_batch(self.samples)))
        with self.profile.step():
            return self.train_step()

    def keep_profile(self, report: Report, profiler: torch.profiler.profile) -> None:
        """Trace and table into the run folder, in place of those of an earlier attempt; the table into the log."""
        folder = self.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        table = "Load forced (run.model.moe.force_balanced).\n\n" * bool(self.forced) + report.markdown()
        write_json(folder / "parts.json", report.figures() | self.forced)
        write_text(folder / "table.md", table)
        self.log.say(
            f"{table}\nThese steps are left out of the figures of speed. ui.perfetto.dev shows "
            f"{folder / 'trace.json.gz'}."
        )

    def on_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """A batch on the engine's device; pinned first for a GPU, so that the host need not wait for the copy."""
        device = self.engine.device
        return tuple((each.pin_memory() if on_gpu() else each).to(device, non_blocking=True) for each in batch)

    @property
    def lr_factor(self) -> float:
        """Factor on the peak learning rates for the next update."""
        train = self.run.train
        return lr_factor(
            self.step,
            num_steps=self.run.num_steps,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            decay_frac=train.decay_frac,
            decay_shape=train.decay_shape,
            final_lr_frac=train.final_lr_frac,
        )

    def train_metrics(self, stats: StepStats) -> dict[str, float]:
        """Metrics of the step just done; speed over the steps since the last call. All ranks call this."""
        metrics = self.routing_metrics(stats.reduce())
        lr = {group["use_muon"]: group["lr"] for group in self.engine.optimizer.param_groups}
        metrics |= {"train/lr": lr[True], "train/adam_lr": lr[False]} if len(lr) == 2 else {"train/lr": lr[False]}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        if True in lr:
            metrics.pop("train/grad_norm", None)  # of Muon's updates (deepspeed 0.19.8): finite or not is all it says
        metrics |= self.guard.metrics()
        self.peak_memory_mib = max_over_ranks(peak_memory_mib(self.engine.device), self.engine.device)
        metrics |= {
            "train/tokens": float(self.step * self.run.tokens_per_step),
            "train/peak_mem_mib": self.peak_memory_mib,
            "time/total_s": time.monotonic() - self.began,
        }
        metrics["time/save_stall_s"] = self.writer.stall_s
        if self.compiles.graphs:
            metrics["time/compile_s"] = self.compiles.seconds
        return metrics | self.speed(self.timer.since_last_call()) | self.gpu_monitor.since_last_call()

    def routing_metrics(self, totals: StepTotals) -> dict[str, float]:
        """Loss and routing of the step just done; the load of every expert goes into a file of its own."""
        layers = self.run.model.moe_layers
        metrics = totals.metrics(layers)
        if not layers:
            return metrics
        bias_ME = selection_bias_ME(self.engine.module)
        detail = {"layers": layers, "tokens_per_expert": totals.tokens_per_expert_ME.long().tolist(), **self.forced}
        if bias_ME is not None:
            metrics |= bias_metrics(bias_ME, layers)
            detail["selection_bias"] = bias_ME.tolist()
        if self.step == 1 or self.is_due(self.run.train.expert_load_every or self.run.train.log_every):
            self.log.log_expert_load(self.step, detail)
        return metrics

    def speed(self, seconds: list[float]) -> dict[str, float]:
        """Time and throughput of the given steps, without an attempt's warm-up steps."""
        if not seconds:
            return {}
        mean = sum(seconds) / len(seconds)
        tok_per_sec = self.run.tokens_per_step / mean
        per_gpu = tok_per_sec / self.topology.ranks
        metrics = {
            "train/dt_ms": 1000 * mean,
            "train/tok_per_sec": tok_per_sec,
            "train/tok_per_sec_per_gpu": per_gpu,
        }
        mfu = mfu_percent(per_gpu, self.flops_per_token, self.peak_flops)
        return metrics if mfu is None else metrics | {"train/mfu": mfu}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss over every whole val split, in nats per token and in bits per byte of its text. All ranks call this.

        Nothing where a stop cuts it short: whoever continues the run does it (owes_validation).
        """
        if self.data.val is None or self.stop.agreed:
            return {}
        refuse_stale(self.engine.module)
        self.engine.eval()
        sums = torch.zeros(len(self.data.val.batches), 2, dtype=torch.float64, device=self.engine.device)
        for nats_and_targets, batches in zip(sums, self.data.val.batches, strict=True):
            for batch in batches:
                if self.stop.agreed_by_all_ranks(self.engine.device):
                    return {}
                reached("validation")
                _, stats = self.engine.module(*self.on_device(batch))
                targets = stats.num_targets.double()
                nats_and_targets += torch.stack([stats.cross_entropy.double() * targets, targets])
        dist.all_reduce(sums)
        nats, targets = sums.t().tolist()
        metrics = self.data.val.metrics(nats, targets)
        if not math.isfinite(metrics.get("val/loss", 0.0)):
            raise NotFinite(f"val/loss={metrics['val/loss']} at step {self.step}")
        self.tell_recompiles("validation")
        return metrics

    def sample(self) -> None:
        """Let the model continue the prompt. All ranks call this: their experts are needed."""
        train = self.run.train
        tokenizer = self.data.train.text_split.tokenizer
        if tokenizer is None or train.sample_tokens == 0:
            return
        if self.stop.agreed_by_all_ranks(self.engine.device, wait=True):
            return
        reached("sample")
        self.engine.eval()
        prompt = [self.data.train.text_split.eod_id, *tokenizer.encode(train.sample_prompt)]  # as a document begins
        with torch.compiler.set_stance("force_eager"):  # every length of the context would be a graph of its own
            tokens = self.engine.module.generate(prompt, train.sample_tokens, train.seed)
        self.log.say(f"sample after step {self.step}: {train.sample_prompt + tokenizer.decode(tokens)!r}")

    def save(self) -> None:
        """Save this step, once. All ranks call this."""
        if self.saved_step == self.step:
            return
        self.save_due = False
        refuse_stale(self.engine.module)
        refuse_not_finite_weights(self.engine.module, self.step)
        state = {"step": self.step, "samples": self.samples, "guard": self.guard.state()}
        partition = TrainingPartition(self.engine, self.topology.ep_size)
        self.writer.save(partition, checkpoint_name(self.step), self.state.model_copy(update=state))
        self.saved_step = self.step
        self.watch.state_is_saved(self.writer.finish_alone)

    def record(self, metrics: dict[str, float]) -> None:
        if not metrics:
            self.log.progress(self.step)
            return
        metrics = metrics | self.forced
        self.latest |= metrics
        self.log.log(self.step, metrics)

    @property
    def forced(self) -> dict[str, float]:
        """What no result is without where the load of experts is forced: such a run says nothing of a model."""
        moe = self.run.model.moe
        return {"moe/force_balanced": 1.0} if moe is not None and moe.force_balanced else {}

    def is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def last_saved(self) -> str:
        step = latest_step(self.run_dir)
        return "none" if step is None else checkpoint_name(step)

    def describe(self) -> None:
        """Say once what is about to run."""
        run, counts, train = self.run, self.counts, self.data.train
        self.log.say(self.topology.picture())
        self.log.say(
            f"parameters: {counts.total:,} total, {counts.active:,} active, {counts.inactive:,} inactive; "
            f"{self.flops_per_token:,} FLOPs per token ({counts.active_matmul:,} active matmul parameters)"
        )
        epochs = train.epochs(run.num_steps * run.train_batch_size)
        for split, share, repeats in zip(train.splits, train.shares, epochs, strict=True):
            drawn = f"{100 * float(share):.1f}% of the samples, " if len(train.splits) > 1 else ""
            self.log.say(f"data: {split.name}, {drawn}{split.source.num_tokens:,} tokens, repeated {repeats:.2f} times")
        self.log.say(
            f"steps: {run.num_steps:,} of {run.tokens_per_step:,} tokens, "
            f"{self.topology.accumulation_steps} micro-steps each"
        )
        if run.model.moe is not None:
            self.log.say(f"experts: {run.model.moe.expert_backend}; blocks: compile {run.compile.mode}")
        peak = "unknown, so no MFU" if self.peak_flops is None else f"{self.peak_flops / 1e12:.0f} TFLOP/s"
        self.log.say(f"device: {self.device_name}, BF16 peak {peak}")
        if not on_gpu() and self.engine.bfloat16_enabled() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.log.say("this processor has no bf16 instructions: fp32 (--set bf16.enabled=false) is far faster")
        backend = attention_backend(run.model, self.engine.module.lm_head.weight.dtype, self.engine.device)
        self.log.say(f"attention: {backend}, as torch chooses; cross-entropy: {run.train.cross_entropy}")
        for note in self.beginning.notes:
            self.log.say(note)
        if self.beginning.checkpoint is not None:
            self.log.say(f"continued from {self.beginning.checkpoint.name}")

    def figures(self, timed: bool = True) -> dict[str, Any]:
        """What summary.json keeps besides status and times; None is left out. Not timed after a fault of the device."""
        seconds = self.timer.measured() if timed else []
        splits = self.data.val.splits if self.data.val is not None else []
        val = splits[0].figures if len(splits) == 1 else {}
        return {
            "step": self.step,
            "num_steps": self.run.num_steps,
            "skipped_steps": self.guard.skipped_steps,
            "tokens": self.step * self.run.tokens_per_step,
            **self.latest,
            **self.forced,
            **tail_figures(
                seconds, self.run.tokens_per_step, self.topology.ranks, self.flops_per_token, self.peak_flops
            ),
            "peak_mem_mib": self.peak_memory_mib or None,
            "time/compile_s": self.compiles.seconds if self.compiles.graphs else None,  # the last validation included
            "compiled_graphs": len(self.compiles.graphs),
            "time/save_stall_s": self.writer.stall_s,
            "time/last_save_s": self.writer.last_save_s or None,
            "recompiles": self.compiles.recompiles,
            "fp8_matrices": self.fp8_matrices,
            **self.gpu_monitor.figures(),
            "val/unigram_bpb": val.get("unigram_bits_per_byte"),
            "val/uniform_bpb": val.get("uniform_bits_per_byte"),
            "data": self.run.data.train,
            "device": self.device_name,
            "world_size": self.topology.ranks,
            "ep_size": self.topology.ep_size,
            "flops_per_token": self.flops_per_token,
            "peak_flops": self.peak_flops,
            "parameters": vars(self.counts),
        }


# --- the end --------------------------------------------------------------------------------------------------------


def end_process(code: int) -> None:
    """Leave without the interpreter's teardown, where gloo's threads now and then abort (torch 2.13, deepspeed 0.19.8).

    After a fault the peers may be gone, and leaving the group in good order would wait for them.
    """
    if dist.is_initialized() and code != EXIT_FAILED:
        dist.destroy_process_group()
    with contextlib.suppress(OSError):  # nobody reads any more (launch/screen.py)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main(START))
