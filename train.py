"""Train one run file: `deepspeed --num_gpus 8 train.py --config ds_configs/moe_d12.json`.

The same program runs under torchrun and, with one rank, under plain python. Read it top to bottom: start, data, model
and engine, the loop, validation, and how it ends. What the files in the run folder mean stands in launch/run_dir.py.
"""

from __future__ import annotations

from launch.begin import begin_or_exit, say_refusal

if __name__ == "__main__":
    START = begin_or_exit()  # a run that cannot work is refused here, before the seconds that torch takes to import

import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from launch.begin import Start
from launch.environment import describe_environment
from launch.run_config import REPO_ROOT, Run
from launch.run_dir import EXIT_CODES, EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, Status, checkpoint_name
from launch.run_log import RunLog, tail_figures
from model.checkpoint import TrainingState, check_checkpoint, load_checkpoint, save_checkpoint
from model.config import CheckpointError, DataError
from model.data import (
    SyntheticTokens,
    TokenFile,
    Tokenizer,
    TokenSource,
    TrainBatches,
    ValBatches,
    builtin_dir,
    data_fingerprint,
    read_manifest,
)
from model.flops import count_parameters, flops_per_token, mfu_percent, peak_flops
from model.gpt import GPT
from model.optim import build_optimizer, lr_factor, set_lr
from model.stats import StepStats

WARM_UP_STEPS = 3  # first steps of every start: allocator, caches and kernels warm up; kept out of throughput
SYNTHETIC_TRAIN_TOKENS = 2**24
SYNTHETIC_VAL_SEQUENCES = 64


class NonFiniteLoss(RuntimeError):
    """The training loss is NaN or infinite."""


def main(start: Start) -> int:
    """Run to an end of any kind and return the exit code; summary.json says the same in words."""
    run, run_dir = start.run, start.args.run_dir
    if start.beginning.action == "completed":
        if start.rank == 0:
            print(f"{run_dir} is completed ({start.beginning.step} steps). Nothing to do.")
        return EXIT_COMPLETED

    stop = StopRequest()
    try:
        prepare_builtin_data(run, start.local_rank)
        set_up_process(start)
        data = open_data(start)
        state = state_to_begin_with(start, data)
    except (DataError, CheckpointError) as error:
        say_refusal(error, start.rank, start.args)
        return EXIT_REFUSED

    log = RunLog(
        run_dir,
        run,
        resumed_step=state.step,
        total_steps=run.num_steps,
        enabled=start.rank == 0,
        environment=environment_of(start, data),
    )
    trainer = Trainer(start, log, data, state, stop)
    status: Status
    try:
        status, reason = trainer.run_to_end()
    except torch.OutOfMemoryError as error:
        status, reason = "oom", str(error).splitlines()[0]
        record_fault(run_dir, start.rank, log)
    except NonFiniteLoss as error:
        status, reason = "nan", str(error)
    except BaseException as error:  # of any kind: it is written down, and the run has failed
        status, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        record_fault(run_dir, start.rank, log)
    log.finish(status, reason, trainer.figures())
    return EXIT_CODES.get(status, EXIT_FAILED)


# --- before the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Tokens to train on or to validate with, and what is known of them."""

    source: TokenSource
    fingerprint: str
    tokenizer: Path | None
    eod_id: int
    figures: dict[str, Any]  # the manifest's entry: tokens, bytes, unigram_bits_per_byte ...; empty where unknown


def prepare_builtin_data(run: Run, local_rank: int) -> None:
    """Make the built-in dataset on first use, on local rank 0; the other ranks wait for it at the rendezvous."""
    folder = builtin_dir(run.model.vocab_size)
    if local_rank != 0 or "builtin" not in (run.data.train, run.data.val) or (folder / "manifest.json").exists():
        return
    command = [sys.executable, "-m", "tools.prepare_data", "--builtin", "--vocab_size", str(run.model.vocab_size)]
    done = subprocess.run(command, cwd=REPO_ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("DataError: ")
        raise DataError(f"run.data: the built-in dataset could not be prepared: {last}")


@dataclass(frozen=True)
class Data:
    """Both splits, and this rank's batches of them."""

    train: Split
    val: Split | None
    batches: TrainBatches
    val_batches: ValBatches | None


def open_data(start: Start) -> Data:
    """Open what run.data names. Raises DataError if token files are missing, damaged or too short."""
    run = start.run
    shape = {"seq_len": run.model.seq_len, "micro_batch_size": run.micro_batch_size}
    place = {"rank": start.rank, "world_size": start.topology.ranks}
    train = open_split(run, "train", run.data.train)
    batches = TrainBatches(train.source, seed=run.train.seed, **shape, **place)
    if run.data.val is None:
        return Data(train, None, batches, None)
    val = open_split(run, "val", run.data.val)
    return Data(train, val, batches, ValBatches(val.source, eod_id=val.eod_id, **shape, **place))


def open_split(run: Run, split: str, name: str) -> Split:
    """Open what run.data names for a split. Raises DataError if the token files are missing or damaged."""
    model = run.model
    if name == "synthetic":
        seed = run.train.seed + (split == "val")
        count = SYNTHETIC_TRAIN_TOKENS if split == "train" else SYNTHETIC_VAL_SEQUENCES * model.seq_len
        return Split(SyntheticTokens(count, model.vocab_size, seed), f"synthetic-{seed}-{count}", None, 0, {})
    prefix = builtin_dir(model.vocab_size) / split if name == "builtin" else Path(name)
    source, manifest = TokenFile(prefix), read_manifest(prefix)
    if manifest is None:
        return Split(source, data_fingerprint(prefix), None, 0, {})
    tokenizer = manifest["tokenizer"]
    if tokenizer["vocab_size"] > model.vocab_size:
        raise DataError(
            f"run.data.{split}={name}: its tokenizer has {tokenizer['vocab_size']} tokens, run.model.vocab_size is "
            f"{model.vocab_size}. Raise it, or prepare the data with a smaller vocabulary."
        )
    figures = manifest["splits"].get(prefix.name, {})
    return Split(source, data_fingerprint(prefix), prefix.parent / tokenizer["file"], tokenizer["eod_id"], figures)


def set_up_process(start: Start) -> None:
    """Join the other ranks; quiet DeepSpeed's logger; share the cores of a CPU machine among its ranks."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls what torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*all_gather_into_tensor.*")
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // start.topology.gpus_per_node))
    deepspeed.init_distributed()


def state_to_begin_with(start: Start, data: Data) -> TrainingState:
    """Step 0 under this topology, or what the checkpoint to continue says, once it is known to belong here."""
    state = TrainingState(
        step=0,
        samples=0,
        world_size=start.topology.ranks,
        ep_size=start.topology.ep_size,
        zero_stage=start.run.deepspeed.get("zero_optimization", {}).get("stage", 0),
        data_fingerprint=data.train.fingerprint,
    )
    if start.beginning.action == "fresh":
        return state
    return check_checkpoint(start.args.run_dir / "checkpoints" / checkpoint_name(start.beginning.step), state)


def environment_of(start: Start, data: Data) -> dict[str, Any]:
    """What this attempt ran on, for env.json."""
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    return {
        **describe_environment(start.run, sys.argv, devices),
        "world_size": start.topology.ranks,
        "ep_size": start.topology.ep_size,
        "accumulation_steps": start.topology.accumulation_steps,
        "data": {"train": data.train.fingerprint, "val": data.val.fingerprint if data.val else None},
    }


# --- the run --------------------------------------------------------------------------------------------------------


class Trainer:
    """One attempt at a run: model, engine, data, and the loop over optimizer steps."""

    def __init__(self, start: Start, log: RunLog, data: Data, state: TrainingState, stop: StopRequest) -> None:
        self.run, self.topology, self.log, self.data, self.stop = start.run, start.topology, log, data, stop
        self.checkpoints = start.args.run_dir / "checkpoints"
        self.resume_from = checkpoint_name(state.step) if start.beginning.action == "resume" else None
        self.state, self.step, self.samples = state, state.step, state.samples
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self.peak_memory_mib = 0.0
        self.counts, self.flops_per_token = count_parameters(self.run.model), flops_per_token(self.run.model)
        self.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.peak_flops = peak_flops(self.device_name)

    def run_to_end(self) -> tuple[Status, str]:
        """Build, loop, and return (status, reason)."""
        run, train = self.run, self.run.train
        self.build_engine()
        self.describe()
        self.timer = StepTimer(self.engine.device)
        if self.step == 0:
            self.record(self.validate())

        last = min(run.num_steps, train.stop_at_step or run.num_steps)
        while self.step < last:
            stats = self.train_step()
            is_logged = self.is_due(train.log_every) or self.step in (1, last)
            metrics = self.train_metrics(stats) if is_logged else {}
            stopping = self.stop.agreed_by_all_ranks(self.engine.device)
            if self.is_due(train.eval_every):
                metrics |= self.validate()
            self.record(metrics)
            if self.is_due(train.sample_every) and self.step < run.num_steps:
                self.sample()
            if self.is_due(train.save_every) and self.step < last:
                self.save()
            if stopping:
                break

        if self.step == run.num_steps:
            if not self.is_due(train.eval_every):
                self.record(self.validate())
            self.sample()
        self.save()
        if self.step == run.num_steps:
            return "completed", f"all {run.num_steps} steps done"
        wish = f"run.train.stop_at_step={train.stop_at_step}" if self.step == last else "asked by a signal"
        return "stopped", f"{wish}, after step {self.step} of {run.num_steps}"

    def build_engine(self) -> None:
        """Model, optimizer and engine; then the checkpoint, if this attempt continues one."""
        ep_size = self.topology.ep_size
        model = GPT(self.run.model, ep_size, dist.get_rank() % ep_size, self.run.train.seed)
        optimizer = build_optimizer(model, self.run.deepspeed["optimizer"]["params"])
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.run.deepspeed)
        assert self.engine.gradient_accumulation_steps() == self.topology.accumulation_steps
        if self.resume_from is not None:
            load_checkpoint(self.engine, self.checkpoints, self.resume_from)

    def train_step(self) -> StepStats:
        """One optimizer step: all its micro-steps, on this rank's share of the next train_batch_size sequences."""
        stats = StepStats()
        set_lr(self.engine.optimizer, self.lr)
        self.engine.train()
        self.timer.start()
        for _ in range(self.topology.accumulation_steps):
            tokens_BS, targets_BS = self.data.batches.micro_batch(self.samples)
            device = self.engine.device
            loss, micro_stats = self.engine(tokens_BS.to(device), targets_BS.to(device))
            self.engine.backward(loss)
            self.engine.step()
            stats.add(micro_stats)
            self.samples += self.data.batches.samples_per_micro_step
        self.timer.stop()
        self.step += 1
        return stats

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        train, base = self.run.train, self.run.deepspeed["optimizer"]["params"]["lr"]
        return base * lr_factor(
            self.step,
            num_steps=self.run.num_steps,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            decay_frac=train.decay_frac,
        )

    def train_metrics(self, stats: StepStats) -> dict[str, float]:
        """Metrics of the step just done; speed over the steps since the last call. All ranks call this."""
        metrics = stats.reduce(self.run.model.moe_layers)
        if not math.isfinite(metrics["train/loss"]):
            raise NonFiniteLoss(
                f"train/loss={metrics['train/loss']} at step {self.step}; last saved: {self.last_saved()}"
            )
        self.peak_memory_mib = max_over_ranks(peak_memory_mib(), self.engine.device)
        norm = self.engine.get_global_grad_norm()
        metrics |= {
            "train/lr": self.engine.optimizer.param_groups[0]["lr"],
            "train/tokens": float(self.step * self.run.tokens_per_step),
            "train/peak_mem_mib": self.peak_memory_mib,
        }
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        return metrics | self.speed(self.timer.since_last_call())

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
        """Loss over the whole val split, in nats per token and in bits per byte of its text. All ranks call this."""
        if self.data.val_batches is None or self.data.val is None:
            return {}
        self.engine.eval()
        nats_and_targets = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for tokens_BS, targets_BS in self.data.val_batches:
            _, stats = self.engine.module(tokens_BS.to(self.engine.device), targets_BS.to(self.engine.device))
            targets = stats.num_targets.double()
            nats_and_targets += torch.stack([stats.cross_entropy.double() * targets, targets])
        dist.all_reduce(nats_and_targets)
        nats, targets = nats_and_targets.tolist()
        metrics = {"val/loss": nats / targets}
        if "bytes" in self.data.val.figures:
            metrics["val/bpb"] = nats / math.log(2) / self.data.val.figures["bytes"]
        return metrics

    def sample(self) -> None:
        """Let the model continue the prompt. All ranks call this: their experts are needed."""
        train = self.run.train
        if self.data.train.tokenizer is None or train.sample_tokens == 0:
            return
        self.engine.eval()
        tokenizer = Tokenizer(self.data.train.tokenizer)
        tokens = self.engine.module.generate(tokenizer.encode(train.sample_prompt), train.sample_tokens, train.seed)
        self.log.say(f"sample after step {self.step}: {train.sample_prompt + tokenizer.decode(tokens)!r}")

    def save(self) -> None:
        state = TrainingState(**{**vars(self.state), "step": self.step, "samples": self.samples})
        save_checkpoint(self.engine, self.checkpoints, checkpoint_name(self.step), state, self.run.train.keep_last)

    def record(self, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        if metrics:
            self.log.log(self.step, metrics)
        else:
            self.log.progress(self.step)

    def is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def last_saved(self) -> str:
        latest = self.checkpoints / "latest"
        return latest.read_text() if latest.exists() else "none"

    def describe(self) -> None:
        """Say once what is about to run."""
        run, counts, batches = self.run, self.counts, self.data.batches
        epochs = run.num_steps * run.train_batch_size / batches.samples_per_epoch
        self.log.say(self.topology.picture())
        self.log.say(
            f"parameters: {counts.total:,} total, {counts.active:,} active, {counts.inactive:,} inactive; "
            f"{self.flops_per_token:,} FLOPs per token ({counts.active_matmul:,} active matmul parameters)"
        )
        self.log.say(
            f"data: {run.data.train}, {self.data.train.source.num_tokens:,} tokens, repeated {epochs:.2f} times over "
            f"{run.num_steps:,} steps of {run.tokens_per_step:,} tokens, {self.topology.accumulation_steps} micro-steps"
        )
        peak = "unknown, so no MFU" if self.peak_flops is None else f"{self.peak_flops / 1e12:.0f} TFLOP/s"
        self.log.say(f"device: {self.device_name}, BF16 peak {peak}")
        if self.resume_from is not None:
            self.log.say(f"continued from {self.resume_from}")

    def figures(self) -> dict[str, Any]:
        """What summary.json keeps besides status and times; None is left out."""
        timed = self.timer.measured() if hasattr(self, "timer") else []
        val = self.data.val.figures if self.data.val is not None else {}
        return {
            "step": self.step,
            "num_steps": self.run.num_steps,
            "tokens": self.step * self.run.tokens_per_step,
            **self.latest,
            **tail_figures(timed, self.run.tokens_per_step, self.topology.ranks, self.flops_per_token, self.peak_flops),
            "peak_mem_mib": self.peak_memory_mib or None,
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


# --- small instruments ----------------------------------------------------------------------------------------------


class StepTimer:
    """Seconds of every step: CUDA events on a GPU, so that nothing waits for the device, the clock elsewhere."""

    def __init__(self, device: torch.device | str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.seconds: list[float] = []
        self.read = 0

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begun = self._now()

    def stop(self) -> None:
        self.marks.append((self.begun, self._now()))

    def measured(self) -> list[float]:
        """Seconds of all steps after the warm-up; waits for the device."""
        if self.cuda and self.marks:
            torch.cuda.synchronize()
        for begun, ended in self.marks:
            self.seconds.append(begun.elapsed_time(ended) / 1000 if self.cuda else ended - begun)
        self.marks.clear()
        return self.seconds[WARM_UP_STEPS:]

    def since_last_call(self) -> list[float]:
        """Seconds of the steps since the last call, without the warm-up."""
        measured = self.measured()
        new, self.read = measured[self.read :], len(measured)
        return new


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop: all ranks agree on a step, save and end. A second SIGINT kills."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupts = 0
        self.pending: torch.Tensor | None = None
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def agreed_by_all_ranks(self, device: torch.device | str) -> bool:
        """Whether any rank had been asked one step ago; reading a step late keeps the host ahead of the device."""
        previous, self.pending = self.pending, torch.tensor(float(self.asked), device=device)
        dist.all_reduce(self.pending, op=dist.ReduceOp.MAX)
        return previous is not None and bool(previous.item())


def peak_memory_mib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a machine without."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def max_over_ranks(value: float, device: torch.device | str) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def record_fault(run_dir: Path, rank: int, log: RunLog) -> None:
    """Write the current exception's traceback to log.txt on rank 0, to rank<N>.err elsewhere."""
    trace = traceback.format_exc()
    if rank == 0:
        log.say(trace)
    else:
        (run_dir / f"rank{rank}.err").write_text(trace)


def end_process(code: int) -> None:
    """Leave without the interpreter's teardown, where gloo's threads now and then abort (torch 2.13, deepspeed 0.19.8).

    After a fault the peers may be gone, and leaving the group in good order would wait for them.
    """
    if dist.is_initialized() and code != EXIT_FAILED:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main(START))
