"""A pool of processes that are each other's ranks, so that a test pays for torch, deepspeed and gloo once a session."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from launch.shared_memory import remove_unused_buffers

SECONDS_PER_CALL = 240  # a hang is a failure; no test is near this


class RankPool:
    """`run(function, *arguments)` calls a module-level function on every rank; results in rank order."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = max(1, len(os.sched_getaffinity(0)) // world_size)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, world_size, port, threads, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS_PER_CALL):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {SECONDS_PER_CALL} s")
            answers.append(pipe.recv())
        faults = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if faults:
            raise AssertionError("\n".join(faults))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        remove_unused_buffers()


def serve(rank: int, world_size: int, port: int, threads: int, pipe: Connection) -> None:
    """One rank: join the others, then answer calls until the pool ends."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
        DS_ACCELERATOR="cpu",
    )
    import deepspeed
    import torch

    torch.set_num_threads(threads)
    deepspeed.init_distributed()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except Exception:  # the test that asked reports it
            pipe.send((False, traceback.format_exc()))


def train_on_this_rank(config: Path, run_dir: Path, assignments: list[str]) -> int:
    """On every rank of a pool: what `train.py --config config --run_dir run_dir --set assignments` does; its exit code.

    One run after another in the same processes, without the seconds that starting them takes.
    """
    import torch.distributed as dist

    import train
    from launch.begin import Start
    from launch.command_line import parse_train_arguments
    from launch.run_config import load_run
    from launch.run_dir import decide_beginning
    from launch.topology import resolve_topology

    rank, world_size = dist.get_rank(), dist.get_world_size()
    run = load_run(config, assignments)
    beginning = decide_beginning(run_dir, run.config_hash, "auto")
    args = parse_train_arguments(["--config", str(config), "--run_dir", str(run_dir)])
    dist.barrier()  # all have looked at the folder before one of them writes to it
    return train.main(Start(args, run, resolve_topology(run, 1, world_size), beginning, rank, rank))
