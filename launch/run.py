"""Start one run: `python -m launch.run FILE` refuses what cannot work, else starts `deepspeed` and watches.

Exit codes: 0 completed, 2 refused, 3 stopped on request with a checkpoint saved, 4 failed (summary.json says why).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.ancestors import OWN_LAUNCHER
from launch.command_line import parse_launch_arguments
from launch.environment import variables_of_interpreter
from launch.memory import GIB, estimate_memory
from launch.nodes import (
    FIRST_NODE,
    Elsewhere,
    environment_file,
    find_hosts,
    kill_over_pdsh,
    pdsh_options,
    quoted_for_pdsh,
    srun_command,
)
from launch.restarts import run_with_restarts
from launch.run_config import REPO_ROOT, Run, load_run
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED, Beginning, decide_beginning
from launch.screen import show
from launch.supervise import StopRequests, refuse_if_in_use, supervise
from launch.topology import Topology, resolve_num_gpus, resolve_topology, visible_gpus
from model.config import ConfigError
from model.flops import count_parameters, flops_per_token

TRAIN_SCRIPT = REPO_ROOT / "train.py"
DEFAULT_PORT = 29500  # as in deepspeed, for the line that a person may paste; launch.run takes one that is free
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
    with StopRequests() as stop:
        return run_with_restarts(lambda number: run_once(args, script, stop, number), args.run_dir, args.restarts, stop)


def run_once(args: argparse.Namespace, script: Path, stop: StopRequests, number: int) -> int:
    """One attempt; any but the first continues from the last checkpoint, wherever that one was told to begin."""
    if number > 0:
        args = argparse.Namespace(**{**vars(args), "resume": "auto"})
    try:
        plan = make_plan(args)
        if args.dry_run:
            print(describe_plan(plan, args, script))
            return EXIT_COMPLETED
        if plan.beginning.action == "completed":
            print(f"{args.run_dir}: completed at step {plan.beginning.step}. Nothing to do.")
            return EXIT_COMPLETED
        refuse_if_in_use(args.run_dir)
        hosts = hosts_of(plan)
        shown = shown_command(plan, args, script)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED

    show(f"launch.run: {shown}")
    if hosts:
        args.run_dir.parent.mkdir(parents=True, exist_ok=True)
    # what is said between here and the ranks; beside the run folder, since all nodes see that place
    beside = args.run_dir.parent if hosts else None
    with tempfile.TemporaryDirectory(prefix=".launch_", dir=beside, ignore_cleanup_errors=True) as folder:
        return supervise(
            command_of_ranks(plan, args, script, Path(folder)),
            stop,
            run_dir=args.run_dir,
            script=script,
            refusal_file=Path(folder) / "refusal",
            environment=environment_of_ranks(plan, dict(os.environ), hosts, Path(folder)),
            elsewhere=reach_elsewhere(plan, hosts, Path(folder)),
        )


def make_plan(args: argparse.Namespace) -> Plan:
    """Read and check the run file, fit it to its ranks, and see how it begins in its folder. Writes nothing."""
    run = load_run(args.config, args.assignments)
    plan = launch_plan(run)
    return dataclasses.replace(plan, beginning=decide_beginning(args.run_dir, run.config_hash, args.resume))


def launch_plan(run: Run) -> Plan:
    """A run fitted to its ranks, in a fresh folder. Raises ConfigError if it does not fit."""
    num_gpus, on_gpus, reason = resolve_num_gpus(run)
    topology = resolve_topology(run, run.launch.num_nodes, num_gpus)
    return Plan(run, topology, on_gpus or run.launch.num_nodes > 1, reason, Beginning("fresh", 0))


def hosts_of(plan: Plan) -> list[str]:
    """The hosts of a run on several nodes, none for one on this machine. Raises ConfigError if it cannot start here."""
    if plan.topology.num_nodes > 1:
        return find_hosts(plan.run.launch, plan.topology.gpus_per_node)
    if (refusal := missing_devices(plan)) is not None:
        raise ConfigError(refusal)
    device_options(plan.topology.gpus_per_node)
    return []


def missing_devices(plan: Plan) -> str | None:
    """That this machine lacks the GPUs, or the cores, that run.launch.num_gpus asks for; None if it has them.

    Without any GPU a number means CPU ranks. With several nodes this may be a head node, so nothing is checked.
    """
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
    """The options that tell `deepspeed` how many ranks to start, on which devices, and where they meet."""
    launch, num_gpus = plan.run.launch, plan.topology.gpus_per_node
    options = pdsh_options(launch, num_gpus) if launch.hostfile is not None else device_options(num_gpus)
    return [*options, "--master_port", str(launch.master_port)] if launch.master_port is not None else options


def device_options(num_gpus: int) -> list[str]:
    """Devices of this machine. With --num_gpus deepspeed 0.19.8 takes 0, 1, ... whatever CUDA_VISIBLE_DEVICES says."""
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


def command_of_ranks(plan: Plan, args: argparse.Namespace, script: Path, folder: Path) -> list[str]:
    """What starts the ranks and ends with them: `deepspeed`, or srun for the nodes of a Slurm job."""
    arguments = [*train_arguments(args), "--refusal_file", str(folder / "refusal")]
    if plan.topology.num_nodes > 1:
        arguments += ["--stop_file", str(folder / "stop")]
    if is_over_slurm(plan):
        return [*srun_command(plan.run.launch, plan.topology.gpus_per_node, os.environ), *under_srun(script, arguments)]
    options = [*QUIET, *where_options(plan)]
    if plan.run.launch.master_port is None:
        options += ["--master_port", str(free_port())]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *under_deepspeed(plan, script, arguments)]


def is_over_slurm(plan: Plan) -> bool:
    return plan.topology.num_nodes > 1 and plan.run.launch.hostfile is None


def under_srun(script: Path, arguments: list[str]) -> list[str]:
    return [sys.executable, "-u", str(script), *arguments, "--slurm_ranks"]


def under_deepspeed(plan: Plan, script: Path, arguments: list[str]) -> list[str]:
    command = [str(script), *arguments]
    return [quoted_for_pdsh(part) for part in command] if plan.topology.num_nodes > 1 else command


def reach_elsewhere(plan: Plan, hosts: list[str], folder: Path) -> Elsewhere | None:
    """How to stop and kill ranks on other nodes; None for a run on this machine alone."""
    if not hosts:
        return None
    return Elsewhere(folder / "stop", None if is_over_slurm(plan) else kill_over_pdsh(hosts, folder))


def environment_of_ranks(plan: Plan, environment: Mapping[str, str], hosts: list[str], folder: Path) -> dict[str, str]:
    """The user's environment, what this interpreter needs, and what ranks cannot know: CPU or not, where they meet.

    srun hands all of it on. Over pdsh DeepSpeed exports what a file lists, which is written into `folder` here.
    """
    launch = plan.run.launch
    variables = {**environment, **variables_of_interpreter(environment), **cpu_variables(plan)}
    variables[OWN_LAUNCHER] = str(os.getpid())
    if is_over_slurm(plan):
        port = launch.master_port or free_port()
        variables |= {"MASTER_ADDR": launch.master_addr or hosts[0], "MASTER_PORT": str(port)}
    elif hosts:
        (folder / "environment").write_text(environment_file(environment), encoding="utf-8")
        variables["DS_ENV_FILE"] = str(folder / "environment")
    return variables


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
    """The `deepspeed` or srun line for a person to paste; it starts the same ranks, unwatched."""
    launch, arguments = plan.run.launch, train_arguments(args)
    if is_over_slurm(plan):
        address = FIRST_NODE if launch.master_addr is None else shlex.quote(launch.master_addr)
        meeting = f"MASTER_ADDR={address} MASTER_PORT={launch.master_port or DEFAULT_PORT}"
        srun = srun_command(launch, plan.topology.gpus_per_node, os.environ)
        return f"{meeting} {shlex.join([*srun, *under_srun(script, arguments)])}"
    startable = missing_devices(plan) is None  # where it is not, the line is meant for a machine with GPUs
    variables = [f"{name}={value}" for name, value in cpu_variables(plan).items() if startable]
    deepspeed = ["deepspeed", *where_options(plan), *under_deepspeed(plan, script, arguments)]
    return " ".join([*variables, shlex.join(deepspeed)])


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
    try:
        hosts_of(plan)
    except ConfigError as refusal:
        lines += ["", f"Not here: {refusal}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
