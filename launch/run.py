"""Start one run: `python -m launch.run FILE` refuses what cannot work, else starts `deepspeed` and watches.

Exit codes: 0 completed, 2 refused, 3 stopped on request with a checkpoint saved, 4 failed (summary.json says why).
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from launch.command_line import parse_launch_arguments
from launch.environment import variables_of_interpreter
from launch.memory import GIB, estimate_memory
from launch.run_config import REPO_ROOT, Run, load_run
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED, Beginning, decide_beginning
from launch.supervise import refuse_if_in_use, supervise
from launch.topology import Topology, resolve_num_gpus, resolve_topology, visible_gpus
from model.config import ConfigError
from model.flops import count_parameters, flops_per_token

TRAIN_SCRIPT = REPO_ROOT / "train.py"
QUIET = ("--log_level", "critical")  # of the launcher alone; it would call every exit code but 0 an error, a stop's too


@dataclass(frozen=True)
class Plan:
    """What launch.run is about to do."""

    run: Run
    topology: Topology
    on_gpus: bool
    num_gpus_reason: str
    beginning: Beginning


def main(argv: list[str] | None = None, script: Path = TRAIN_SCRIPT) -> int:
    args = parse_launch_arguments(argv)
    try:
        plan = make_plan(args)
        if args.dry_run:
            print(describe_plan(plan, args, script))
            return EXIT_COMPLETED
        if plan.beginning.action == "completed":
            print(f"{args.run_dir}: completed at step {plan.beginning.step}. Nothing to do.")
            return EXIT_COMPLETED
        refuse_if_in_use(args.run_dir)
        refuse_missing_devices(plan)
        where = where_options(plan)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED

    print(f"launch.run: {shown_command(plan, args, script)}", flush=True)
    handle, refusal_file = tempfile.mkstemp(
        prefix="moelab_refusal_"
    )  # a file, not a folder: its parent is on every node
    os.close(handle)
    try:
        return supervise(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", *QUIET, *where, "--master_port", str(free_port())),
                *(str(script), *train_arguments(args), "--refusal_file", refusal_file),
            ],
            run_dir=args.run_dir,
            script=script,
            refusal_file=Path(refusal_file),
            environment=environment_of_ranks(plan, dict(os.environ)),
            num_nodes=plan.topology.num_nodes,
        )
    finally:
        os.unlink(refusal_file)


def make_plan(args: argparse.Namespace) -> Plan:
    """Read and check the run file, fit it to its ranks, and see how it begins in its folder. Writes nothing."""
    run = load_run(args.config, args.assignments)
    num_gpus, on_gpus, reason = resolve_num_gpus(run)
    topology = resolve_topology(run, run.launch.num_nodes, num_gpus)
    beginning = decide_beginning(args.run_dir, run.config_hash, args.resume)
    return Plan(run, topology, on_gpus or run.launch.num_nodes > 1, reason, beginning)


def refuse_missing_devices(plan: Plan) -> None:
    """Raise ConfigError if this machine lacks the GPUs, or the cores, that run.launch.num_gpus asks for.

    Without any GPU a number means CPU ranks. With several nodes this may be a head node, so nothing is checked.
    """
    if (refusal := missing_devices(plan)) is not None:
        raise ConfigError(refusal)


def missing_devices(plan: Plan) -> str | None:
    asked, visible, cores = plan.run.launch.num_gpus, visible_gpus(), usable_cores()
    if plan.run.launch.num_nodes > 1 or not isinstance(asked, int):
        return None
    if visible and asked > visible:
        return (
            f"run.launch.num_gpus={asked}, but {visible} GPU{'s are' if visible > 1 else ' is'} visible here. "
            f"Use --set run.launch.num_gpus={visible}, or 'auto'."
        )
    if not visible and asked > cores:
        return (
            f"run.launch.num_gpus={asked}, but this machine has no GPU and {cores} core{'s' * (cores > 1)}. "
            f"Use --set run.launch.num_gpus={cores} for CPU ranks, or a machine with GPUs."
        )
    return None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def where_options(plan: Plan) -> list[str]:
    """The options that tell `deepspeed` how many ranks to start, and on which devices.

    With --num_gpus deepspeed 0.19.8 takes devices 0, 1, ... whatever CUDA_VISIBLE_DEVICES says, so those are named.
    """
    launch, num_gpus = plan.run.launch, plan.topology.gpus_per_node
    if launch.num_nodes > 1:
        return [
            "--hostfile",
            str(Path(str(launch.hostfile)).absolute()),
            "--num_nodes",
            str(launch.num_nodes),
            "--num_gpus",
            str(num_gpus),
        ]
    devices = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if not visible_gpus() or not devices:
        return ["--num_gpus", str(num_gpus)]
    if not all(device.isdecimal() for device in devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: deepspeed's launcher takes numbers only. "
            "Use the numbers that nvidia-smi -L shows."
        )
    return ["--include", f"localhost:{','.join(devices[:num_gpus])}"]


def train_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of train.py; what was asked of launch.run is passed on."""
    assignments = ["--set", *args.assignments] if args.assignments else []
    return ["--config", str(args.config), "--run_dir", str(args.run_dir), "--resume", args.resume, *assignments]


def environment_of_ranks(plan: Plan, environment: dict[str, str]) -> dict[str, str]:
    """The user's environment, what this interpreter needs, and for CPU ranks what makes DeepSpeed use the CPU."""
    return {**environment, **variables_of_interpreter(environment), **cpu_variables(plan)}


def cpu_variables(plan: Plan) -> dict[str, str]:
    if plan.on_gpus:
        return {}
    threads = max(1, usable_cores() // plan.topology.ranks)
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# --- telling --------------------------------------------------------------------------------------------------------


def shown_command(plan: Plan, args: argparse.Namespace, script: Path) -> str:
    """The `deepspeed` line for a person to paste; it starts the same ranks, unwatched."""
    startable = missing_devices(plan) is None  # where it is not, the line is meant for a machine with GPUs
    variables = [f"{name}={value}" for name, value in cpu_variables(plan).items() if startable]
    return " ".join([*variables, shlex.join(["deepspeed", *where_options(plan), str(script), *train_arguments(args)])])


def describe_plan(plan: Plan, args: argparse.Namespace, script: Path) -> str:
    """What --dry_run prints."""
    run, topology = plan.run, plan.topology
    counts, memory = count_parameters(run.model), estimate_memory(run, topology.ranks, topology.ep_size)
    beginning = {
        "fresh": "a fresh run",
        "resume": f"continues from step {plan.beginning.step}",
        "completed": f"completed at step {plan.beginning.step}: nothing to do",
    }[plan.beginning.action]
    lines = [
        shown_command(plan, args, script),
        "",
        topology.picture(),
        "",
        f"num_gpus            {topology.gpus_per_node} ({plan.num_gpus_reason})",
        f"parameters          {counts.total:,} total, {counts.active:,} active, {counts.inactive:,} inactive, "
        f"{counts.active_matmul:,} active matmul",
        f"FLOPs per token     {flops_per_token(run.model):,}",
        f"tokens per step     {run.tokens_per_step:,}",
        f"steps               {run.num_steps:,} ({run.num_steps * run.tokens_per_step:,} tokens)",
        f"accumulation steps  {topology.accumulation_steps}",
        f"memory per rank     about {memory.total / GIB:.2f} GiB ({memory.states / GIB:.2f} states, "
        f"{memory.activations / GIB:.2f} activations)",
        f"run folder          {args.run_dir} ({beginning})",
    ]
    if (refusal := missing_devices(plan)) is not None:
        lines += ["", f"Not here: {refusal}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
