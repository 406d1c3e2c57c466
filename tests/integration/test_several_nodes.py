"""Two nodes with one rank each, over DeepSpeed's pdsh launcher and under srun; fake_cluster.py stands in for the tools.

What is real: launch.run, `deepspeed`, its launch.py on each "node". Ranks run fake_train.py, without torch.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fake_cluster
import psutil
import pytest

from launched import LAUNCH_FAKE, Launched

TWO_NODES = ("run.launch.num_nodes=2", "run.launch.num_gpus=1")
ODD = 'run.wandb.name=It\'s "$HOME" `at` 100%n \\ 50'


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Variables that put the stand-ins on PATH; after the test nothing may run on any node."""
    fake_cluster.install(tmp_path / "bin")
    folder = tmp_path / "sessions"
    folder.mkdir()
    yield {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_CLUSTER": str(folder)}
    sessions = [int(file.name) for file in folder.iterdir()]
    left = [" ".join(process.cmdline()) for session in sessions for process in fake_cluster.members(session)]
    for session in sessions:
        fake_cluster.kill(session)
    assert left == []
    assert list(tmp_path.glob(".launch_*")) == []


def over_pdsh(tmp_path: Path, cluster: dict[str, str], end: str, *assignments: str) -> Launched:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=8\n")
    hostfile = f"run.launch.hostfile={tmp_path / 'hosts'}"
    return Launched(tmp_path, end, "--set", *TWO_NODES, hostfile, *assignments, **cluster, NCCL_IB_HCA='a"$1",b')


def under_slurm(tmp_path: Path, cluster: dict[str, str], end: str) -> Launched:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_PROCID": "0"}
    return Launched(tmp_path, end, "--set", *TWO_NODES, **cluster, **job)


def rank_process(launched: Launched, rank: int) -> psutil.Process:
    return psutil.Process(int((launched.notes / f"rank{rank}").read_text().split()[0]))


def test_over_pdsh_ranks_get_their_arguments_and_environment_and_one_signal_stops_all_nodes(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    launched = over_pdsh(tmp_path, cluster, "never", ODD, 'run.wandb.tags=["a","b$"]')
    launched.await_training()
    for rank in (0, 1):
        arguments, variables = rank_process(launched, rank).cmdline(), rank_process(launched, rank).environ()
        assert ODD in arguments
        assert 'run.wandb.tags=["a","b$"]' in arguments
        found = {name: variables[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")}
        assert found == {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        assert (variables["NCCL_IB_HCA"], variables["DS_ACCELERATOR"]) == ('a"$1",b', "cpu")
    launched.process.send_signal(signal.SIGUSR1)
    assert launched.end() == 3, launched.printed()
    assert launched.summary()["status"] == "stopped"


def test_over_pdsh_a_rank_that_waits_for_a_failed_one_on_another_node_is_killed(
    tmp_path: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launched.LAUNCH_FAKE", f"import launch.supervise as s; s.GRACE_SECONDS = 1; {LAUNCH_FAKE}")
    launched = over_pdsh(tmp_path, cluster, "one crashes")
    assert launched.end() == 4, launched.printed()
    assert "a rank has failed" in launched.printed()
    assert launched.summary()["status"] == "failed"
    assert "rank1.err" in launched.summary()["reason"]


def test_under_slurm_one_signal_stops_all_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    launched = under_slurm(tmp_path, cluster, "never")
    launched.await_training()
    variables = rank_process(launched, 1).environ()
    assert variables["MASTER_ADDR"] == "localhost"
    assert 1024 <= int(variables["MASTER_PORT"]) <= 65535
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 3, launched.printed()
    assert launched.summary()["status"] == "stopped"


def test_under_slurm_a_second_signal_kills_all_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    launched = under_slurm(tmp_path, cluster, "deaf")
    launched.await_training()
    launched.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # within a second it would be the same signal, passed on twice
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 4, launched.printed()
    assert launched.summary()["reason"] == "ended by a request to stop, before a checkpoint was saved"


def test_under_slurm_a_rank_that_fails_ends_all_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    launched = under_slurm(tmp_path, cluster, "one crashes")
    assert launched.end() == 4, launched.printed()
    assert launched.summary()["reason"] == "ranks ended without a final status; launcher exit code 137; see rank1.err"
