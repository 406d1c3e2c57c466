"""A rank that is gone is told from an error of one's own, by what torch's collectives really say of it."""

import os
import socket
import subprocess
import sys

import torch.distributed as dist

from launch.faults import lost_peer
from launch.run_config import REPO_ROOT

LOSE_RANK_1 = """
import os, sys, time, torch, torch.distributed as dist
from launch.faults import lost_peer
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    os.kill(os.getpid(), 9)
try:
    for _ in range(100):
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print("lost_peer", lost_peer(error), flush=True)
    os._exit(0)
"""


def test_gloo_tells_that_a_peer_is_gone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOSE_RANK_1],
            env={**os.environ, **meeting, "RANK": str(rank)},
            cwd=REPO_ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert ranks[1].wait(timeout=120) == -9
    assert ranks[0].communicate(timeout=120)[0].strip() == "lost_peer True"


def test_nccls_errors_are_a_lost_peer_and_an_error_of_the_model_is_not() -> None:
    assert lost_peer(dist.DistBackendError("NCCL communicator was aborted"))
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_peer(ValueError("gloo/transport"))
