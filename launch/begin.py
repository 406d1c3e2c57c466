"""What train.py decides before torch is imported: the run, its ranks, and whether its folder is fresh or continued."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import dataclass, field

import psutil

from launch.ancestors import launchers_above, own_launcher
from launch.command_line import parse_train_arguments
from launch.environment import variables_of_interpreter
from launch.nodes import rank_variables_of_slurm
from launch.run_config import Run, load_run
from launch.run_dir import EXIT_REFUSED, Beginning, decide_beginning, write_text
from launch.supervise import refuse_if_in_use
from launch.topology import Topology, resolve_topology
from model.config import ConfigError


@dataclass(frozen=True)
class Start:
    """All that a rank knows before it meets the others."""

    args: argparse.Namespace
    run: Run
    topology: Topology
    beginning: Beginning
    rank: int
    local_rank: int
    launchers: dict[str, psutil.Process | None] = field(default_factory=dict)  # above this process; None: gone already


def begin_or_exit(argv: list[str] | None = None) -> Start:
    """Parse, load, check; a refusal is one line on rank 0's stderr and exit code 2, with nothing created."""
    args = parse_train_arguments(argv)
    launchers: dict[str, psutil.Process | None] = {**launchers_above()}  # at once: one that goes from now on is missed
    if args.refusal_file is not None and args.stop_file is None:  # launch.run is on this machine
        launchers["launch.run"] = own_launcher(os.environ)
    os.environ.update(variables_of_interpreter(os.environ))
    if args.slurm_ranks:
        os.environ.update(rank_variables_of_slurm(os.environ))
    become_single_rank_without_launcher()
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = ranks_of_this_node(world_size)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    try:
        run = load_run(args.config, args.assignments)
        topology = resolve_topology(run, world_size // local_world_size, local_world_size)
        beginning = decide_beginning(args.run_dir, run.config_hash, args.resume)
        refuse_if_in_use(args.run_dir)
    except ConfigError as error:
        say_refusal(error, rank, args)
        sys.exit(EXIT_REFUSED)
    return Start(args, run, topology, beginning, rank, local_rank, launchers)


def ranks_of_this_node(world_size: int) -> int:
    """torchrun says LOCAL_WORLD_SIZE, deepspeed 0.19.8 LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)


def say_refusal(error: ValueError, rank: int, args: argparse.Namespace) -> None:
    """Say why the run is refused, once, on rank 0. launch.run reads the line from the refusal file."""
    if rank == 0:
        line = f"{type(error).__name__}: {error}"
        if args.refusal_file is not None and args.refusal_file.parent.is_dir():
            write_text(args.refusal_file, line + "\n")
        print(line, file=sys.stderr, flush=True)


def become_single_rank_without_launcher() -> None:
    """`python train.py`: give this process the variables that a launcher would have set for one rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
