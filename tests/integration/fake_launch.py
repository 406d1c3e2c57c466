"""A stand-in for launch.run that needs no torch: a run of the suite's leg that FAKE_LEGS describes, in one process.

FAKE_LEGS={"slow": {"dt_ms": 120}, "broken": {"end": "crash"}}; the leg is the run's last W&B tag. A run has the number
of steps of its run file and takes SECONDS a step; it saves every 5 steps, and continues from there.
"""

import json
import os
import random
import signal
import sys
import time

from launch.command_line import parse_launch_arguments
from launch.run_config import load_run
from launch.run_dir import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, checkpoint_name, decide_beginning
from launch.run_log import RunLog, tail_figures
from launch.supervise import refuse_if_in_use, settle
from model.config import CheckpointError, ConfigError

SECONDS = 0.02


def main() -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    args = parse_launch_arguments()
    run = load_run(args.config)
    leg = json.loads(os.environ.get("FAKE_LEGS", "{}")).get(run.wandb.tags[-1], {})
    try:
        beginning = decide_beginning(args.run_dir, run.config_hash, args.resume)
        refuse_if_in_use(args.run_dir)
        if leg.get("end") == "refuse":
            raise ConfigError("run.data.train=nowhere: no token files.")
        if leg.get("end") == "refuse to continue" and beginning.step:
            raise CheckpointError("step 5 was saved by 2 ranks.")
    except (ConfigError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    if "never_begins" in leg:
        deepspeed_code, stop_requests = leg["never_begins"]
        return settle(args.run_dir, None, deepspeed_code, args.run_dir / "no_refusal", stop_requests)

    draws = random.Random(run.train.seed)
    offset = draws.gauss(0, 0.01)
    log = RunLog(
        args.run_dir,
        run,
        resumed_step=beginning.step,
        total_steps=run.num_steps,
        enabled=True,
        environment=circumstances(),
    )
    (args.run_dir / "checkpoints").mkdir(exist_ok=True)
    seconds = []
    for step in range(beginning.step + 1, run.num_steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", SECONDS)))
        seconds.append(leg.get("dt_ms", 100) / 1000 * (1 + 0.02 * random.random()))
        loss = 5 - 3 * step / run.num_steps + offset
        log.log(step, {"train/loss": loss, "train/dt_ms": 1000 * seconds[-1], "train/tok_per_sec": 1e4 / seconds[-1]})
        if asked or (step % 5 == 0 and leg.get("saves", True)):
            (args.run_dir / "checkpoints" / checkpoint_name(step)).mkdir(exist_ok=True)
            (args.run_dir / "checkpoints" / "latest").write_text(checkpoint_name(step))
        if asked:
            log.finish("stopped", "asked by a signal", {})
            return EXIT_STOPPED
        if step > run.num_steps // 2 and leg.get("end") == "crash":
            log.finish("failed", "RuntimeError: no reason", {})
            return EXIT_FAILED
        if step > run.num_steps // 2 and leg.get("end") == "nan":
            log.finish("nan", f"train/loss=nan at step {step}", {})
            return EXIT_FAILED
        if step > run.num_steps // 2 and leg.get("end") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    tail = tail_figures(seconds, run.tokens_per_step, 1, 1, None)
    figures = {"peak_mem_mib": 100.0, "val/bpb": 2.0 + offset, "train/loss": loss, "num_steps": run.num_steps}
    log.finish("completed", "all steps done", {**figures, **tail})
    return EXIT_COMPLETED


def circumstances() -> dict[str, object]:
    """What env.json of a real run says of its machine; FAKE_ENV changes it."""
    told = {"devices": ["cpu"], "cpu": "a processor", "cpu_count_usable": 2, "world_size": 1, "commit": "c0ffee" * 7}
    data = {"data": {"train": "train hash", "val": "val hash"}, "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"}}
    return {**told, **data, **json.loads(os.environ.get("FAKE_ENV", "{}")), "pid_of_rank": os.getpid()}


if __name__ == "__main__":
    sys.exit(main())
