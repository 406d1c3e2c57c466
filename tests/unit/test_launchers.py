"""What launch.run would start, as whole commands, and where it refuses to; nothing is started here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch.run
from launch.command_line import parse_launch_arguments
from launch.nodes import environment_file, kill_over_pdsh, quoted_for_pdsh, rank_variables_of_slurm, read_hostfile
from launch.run import command_of_ranks, environment_of_ranks, hosts_of, make_plan, reach_elsewhere, shown_command
from launch.run_config import REPO_ROOT
from model.config import ConfigError

MOE = REPO_ROOT / "ds_configs" / "moe_d12.json"
TRAIN = str(REPO_ROOT / "train.py")
RUN_DIR = "/shared/runs/mine"
FOLDER = Path("/shared/runs/.launch_a1b2")
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
TWO_NODES = ("run.launch.num_nodes=2", "run.launch.num_gpus=8")
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPUs, no Slurm job, and no tool on PATH."""
    monkeypatch.setattr("launch.topology.query_gpus", lambda: [])
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch.run, "free_port", lambda: 40_000)


def install(tmp_path: Path, **tools: str) -> None:
    """Programs that run a line of shell."""
    for name, line in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)


def in_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changed: str) -> None:
    for name, value in {**IN_A_JOB, **changed}.items():
        monkeypatch.setenv(name, value)
    install(tmp_path, srun="", scontrol='test "$*" = "show hostnames n[1-2]" && printf "n1\\nn2\\n"')


def hostfile(tmp_path: Path, text: str) -> str:
    (tmp_path / "hosts").write_text(text)
    return f"run.launch.hostfile={tmp_path / 'hosts'}"


def planned(*assignments: str) -> tuple:
    args = parse_launch_arguments([str(MOE), "--run_dir", RUN_DIR, "--set", *assignments])
    return make_plan(args), args


def command(*assignments: str) -> list[str]:
    plan, args = planned(*assignments)
    return command_of_ranks(plan, args, Path(TRAIN), FOLDER)


def shown(*assignments: str) -> list[str]:
    plan, args = planned(*assignments)
    return shlex.split(shown_command(plan, args, Path(TRAIN)))


def environment(*assignments: str, folder: Path = FOLDER) -> dict[str, str]:
    plan, _ = planned(*assignments)
    return environment_of_ranks(plan, dict(os.environ), hosts_of(plan), folder)


def train_arguments(*assignments: str) -> list[str]:
    return ["--config", str(MOE), "--run_dir", RUN_DIR, "--resume", "auto", "--set", *assignments]


REFUSAL, STOP = ["--refusal_file", f"{FOLDER}/refusal"], ["--stop_file", f"{FOLDER}/stop"]


# --- commands -------------------------------------------------------------------------------------------------------


def test_one_node_runs_deepspeed_on_this_machine() -> None:
    one = ("run.launch.num_gpus=2",)
    where = ["--num_gpus", "2", "--master_port", "40000"]
    assert command(*one) == [*RUNNER, *where, TRAIN, *train_arguments(*one), *REFUSAL]


def test_one_node_meets_at_the_port_that_is_stated() -> None:
    one = ("run.launch.num_gpus=2", "run.launch.master_port=29511")
    where = ["--num_gpus", "2", "--master_port", "29511"]
    assert command(*one) == [*RUNNER, *where, TRAIN, *train_arguments(*one), *REFUSAL]
    assert shown(*one)[-len(where) - len(train_arguments(*one)) - 2 :] == [
        "deepspeed", *where, TRAIN, *train_arguments(*one),
    ]  # fmt: skip


def test_several_nodes_with_a_hostfile_run_deepspeed_over_pdsh(tmp_path: Path) -> None:
    two = (*TWO_NODES, hostfile(tmp_path, "a slots=8\nb slots=8\n"))
    where = ["--hostfile", f"{tmp_path / 'hosts'}", "--num_nodes", "2", "--num_gpus", "8"]
    assert command(*two) == [
        *RUNNER, *where, "--master_port", "40000", TRAIN, *train_arguments(*two), *REFUSAL, *STOP,
    ]  # fmt: skip
    assert shown(*two) == ["deepspeed", *where, TRAIN, *train_arguments(*two)]

    stated = (*two, "run.launch.master_addr=10.0.0.1", "run.launch.master_port=29511")
    assert command(*stated)[len(RUNNER) + len(where) :][:4] == ["--master_addr", "10.0.0.1", "--master_port", "29511"]


def test_several_nodes_without_a_hostfile_run_under_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, tmp_path, SLURM_CPUS_PER_TASK="12")
    shape = ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"]
    srun = ["srun", *shape, "--kill-on-bad-exit=1", "--input=none", sys.executable, "-u", TRAIN]
    assert command(*TWO_NODES) == [*srun, *train_arguments(*TWO_NODES), *REFUSAL, *STOP, "--slurm_ranks"]
    assert environment(*TWO_NODES).items() >= {"MASTER_ADDR": "n1", "MASTER_PORT": "40000"}.items()
    stated = (*TWO_NODES, "run.launch.master_addr=10.0.0.1", "run.launch.master_port=29511")
    assert environment(*stated).items() >= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}.items()
    plan, args = planned(*TWO_NODES)
    first = 'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" MASTER_PORT=29500 '
    line = shown_command(plan, args, Path(TRAIN))
    assert line == first + shlex.join([*srun, *train_arguments(*TWO_NODES), "--slurm_ranks"])


def test_cpus_per_task_is_passed_on_only_if_the_job_states_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, tmp_path)
    assert not any("cpus" in part for part in command(*TWO_NODES))


def test_a_rank_under_slurm_knows_its_place() -> None:
    step = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
    assert rank_variables_of_slurm(step) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }


def test_ranks_on_other_nodes_are_killed_by_the_folder_of_their_attempt(tmp_path: Path) -> None:
    install(tmp_path, pdsh="", ssh="")
    plan, _ = planned(*TWO_NODES, hostfile(tmp_path, "a slots=8\nb slots=8\nc slots=8\n"))
    elsewhere = reach_elsewhere(plan, hosts_of(plan), FOLDER)
    assert elsewhere is not None
    assert elsewhere.stop_file == FOLDER / "stop"
    assert elsewhere.kill == ["pdsh", "-R", "ssh", "-w", "a,b", "pkill -KILL -f '[.]launch_a1b2' || true"]
    pattern = elsewhere.kill[-1].split("'")[1]
    assert re.search(pattern, shlex.join(command(*TWO_NODES)))
    assert not re.search(pattern, shlex.join(kill_over_pdsh(["a"], FOLDER)))  # nor the shell that runs pkill


# --- what the node's shell makes of it ------------------------------------------------------------------------------


def as_deepspeed_passes_on(argument: str) -> str:
    """PDSHRunner.parse_user_args of deepspeed 0.19.8."""
    return '"{}"'.format(argument.replace('"', '\\"')) if " " in argument else argument


@pytest.mark.parametrize(
    "argument",
    [
        "plain",
        "a b",
        'tags=["a","b"]',
        'tags=["a b"]',
        "$HOME `id` \\ \"q\" 'q' %n",
        "$HOME`id`\\\"q\"'q'%n",
        "a;b",
        "*",
    ],
)
def test_an_argument_over_pdsh_reaches_the_rank_as_it_is(argument: str) -> None:
    line = as_deepspeed_passes_on(quoted_for_pdsh(argument))
    assert re.search(r"(?<!%)%(%%)*[hnu]", line) is None
    done = subprocess.run(
        ["/bin/sh", "-c", f"printf %s {line.replace('%%', '%')}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == argument


def test_deepspeed_passes_arguments_on_as_quoted_here_expects() -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    arguments = ["a b", 'a"b', 'a "b"', "$HOME"]
    runner = PDSHRunner(parse_args(["train.py", *arguments]), "")
    assert runner.user_arguments == [as_deepspeed_passes_on(argument) for argument in arguments]


def test_ranks_over_pdsh_get_what_they_need_of_the_environment_and_no_secret(tmp_path: Path) -> None:
    content = environment_file(
        {
            "NCCL_IB_HCA": "mlx5_0,mlx5_1",
            "TORCH_EXTENSIONS_DIR": "/a b/$x",
            "WANDB_MODE": "offline",
            "WANDB_API_KEY": "secret",
            "CUDA_NOTE": "two\nlines",
            "EDITOR": "vi",
        }
    )
    assert content == "NCCL_IB_HCA=mlx5_0,mlx5_1\nTORCH_EXTENSIONS_DIR=/a b/\\$x\nWANDB_MODE=offline\n"


def test_the_users_own_deepspeed_env_still_counts_and_comes_last(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    assert environment_file({"NCCL_DEBUG": "WARN"}) == "NCCL_DEBUG=WARN\nNCCL_DEBUG=INFO\n"


def test_the_exported_variables_stand_in_the_attempts_folder_and_not_at_home(tmp_path: Path) -> None:
    install(tmp_path, pdsh="", ssh="")
    folder = tmp_path / "attempt"
    folder.mkdir()
    variables = environment(*TWO_NODES, hostfile(tmp_path, "a slots=8\nb slots=8\n"), folder=folder)
    assert variables["DS_ENV_FILE"] == str(folder / "environment")
    assert (folder / "environment").is_file()
    assert not (tmp_path / ".deepspeed_env").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ": lists no host. Write a line `host slots=N` per host."),
        ("# a slots=8\n", ": lists no host. Write a line `host slots=N` per host."),
        ("a slots=8\nb 8\n", " line 2: 'b 8' is not of the form `host slots=N`. Correct it."),
        ("a slots=0\n", " line 1: 'a slots=0' is not of the form `host slots=N`. Correct it."),
        ("n[1-2] slots=8\n", " line 1: 'n[1-2] slots=8' is not of the form `host slots=N`. Correct it."),
        ("a slots=8\n\na slots=8\n", " line 3: a is listed twice. Give each host one line."),
    ],
)
def test_a_hostfile_that_cannot_be_read_is_refused(tmp_path: Path, text: str, error: str) -> None:
    hostfile(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        read_hostfile(tmp_path / "hosts")
    assert str(refusal.value) == f"run.launch.hostfile={tmp_path / 'hosts'}{error}"


def test_a_hostfile_reads_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hostfile(tmp_path, "# ours\n\n  b slots=4  \nuser@a.example.org\tslots=16 max_slots=16\n")
    expected = {"b": 4, "user@a.example.org": 16}
    assert list(read_hostfile(tmp_path / "hosts").items()) == list(expected.items())
    assert list(fetch_hostfile(str(tmp_path / "hosts")).items()) == list(expected.items())


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\). Name a file with a line"):
        read_hostfile(tmp_path / "none")


def refusal_of(*assignments: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        hosts_of(planned(*assignments)[0])
    return str(refusal.value)


def test_fewer_hosts_or_slots_than_asked_for_are_refused(tmp_path: Path) -> None:
    few = hostfile(tmp_path, "a slots=8\n")
    assert refusal_of(*TWO_NODES, few) == (
        f"run.launch.num_nodes=2, but {tmp_path / 'hosts'} lists 1. Add hosts, or use --set run.launch.num_nodes=1."
    )
    small = hostfile(tmp_path, "a slots=8\nb slots=4\n")
    assert refusal_of(*TWO_NODES, small) == (
        f"run.launch.num_gpus=8, but {tmp_path / 'hosts'} gives b slots=4. "
        "Correct the slots, or use fewer GPUs per node."
    )


def test_a_missing_pdsh_is_refused_with_the_way_out(tmp_path: Path) -> None:
    install(tmp_path, ssh="")
    assert refusal_of(*TWO_NODES, hostfile(tmp_path, "a slots=8\nb slots=8\n")) == (
        f"run.launch.hostfile={tmp_path / 'hosts'}: pdsh is not installed here, and DeepSpeed starts ranks on other "
        "hosts with it. Install it (Debian: apt install pdsh openssh-client), or run under Slurm."
    )


def test_several_nodes_outside_a_slurm_job_need_a_hostfile() -> None:
    assert refusal_of(*TWO_NODES) == (
        "run.launch.num_nodes=2 needs a Slurm allocation (SLURM_JOB_ID is not set) or run.launch.hostfile. "
        "Submit launch/slurm.sbatch, name a hostfile, or use num_nodes=1."
    )


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            {"SLURM_JOB_NUM_NODES": "4"},
            "run.launch.num_nodes=2, but the Slurm job 7 has 4 of them. Use sbatch --nodes=2, or another num_nodes.",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "4"},
            "run.launch.num_gpus=8, but the Slurm job 7 has 4 GPUs on this node. "
            "Use sbatch --gpus-per-node=8, or another num_gpus.",
        ),
        (
            {"SLURM_JOB_NODELIST": "elsewhere"},
            "SLURM_JOB_NODELIST=elsewhere: scontrol show hostnames says 'nothing', not 2 hosts. "
            "Run inside the job, or name run.launch.hostfile.",
        ),
    ],
)
def test_a_slurm_job_of_another_shape_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], error: str
) -> None:
    in_a_job(monkeypatch, tmp_path, **changed)
    assert refusal_of(*TWO_NODES) == error


def test_a_slurm_job_without_srun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, tmp_path)
    (tmp_path / "bin" / "srun").unlink()
    assert refusal_of(*TWO_NODES) == (
        "run.launch.num_nodes=2: srun is not on PATH in the Slurm job 7. "
        "Add Slurm's programs to PATH, or name run.launch.hostfile."
    )


def test_a_dry_run_shows_the_command_where_the_tools_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = hostfile(tmp_path, "a slots=8\nb slots=8\n")
    assert launch.run.main([str(MOE), "--run_dir", f"{tmp_path}/run", "--dry_run", "--set", *TWO_NODES, hosts]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"deepspeed --hostfile {tmp_path / 'hosts'} --num_nodes 2 --num_gpus 8 {TRAIN} ")
    assert f"\nNot here: run.launch.hostfile={tmp_path / 'hosts'}: pdsh is not installed here" in printed
    assert "2 nodes x 8 = 16 ranks" in printed
    assert not (tmp_path / "run").exists()


def test_what_cannot_start_here_is_refused_and_nothing_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.run.main([str(MOE), "--run_dir", f"{tmp_path}/runs/a", "--set", *TWO_NODES]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: run.launch.num_nodes=2 needs a Slurm allocation")
    assert not (tmp_path / "runs").exists()
