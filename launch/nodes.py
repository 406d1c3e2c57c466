"""Ranks on several nodes: where they are, the command that starts them there, and what reaches them from here.

    run.launch.hostfile     launch.run -> deepspeed -> pdsh -> ssh -> launch.py -> ranks     on every host
    a Slurm allocation      launch.run -> srun -> ranks                                      on every node

The same checkout, interpreter and data are at the same paths on all nodes, and the run folder is on storage that they
share. Nothing here has been run on more than one host yet: the commands are tested with stand-ins for pdsh and srun.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.environment import SECRET
from launch.run_config import LaunchConfig
from model.config import ConfigError

# What ranks over pdsh get of the environment here, besides what deepspeed 0.19.8 exports (PYTHON*, UCX*, and NCCL* if
# this machine has GPUs). A secret never: it would stand in the command lines on all nodes, where others can read it.
EXPORTED = (
    "CUDA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "WANDB_", "DS_ACCELERATOR", "LD_LIBRARY_PATH",
)  # fmt: skip
FIRST_NODE = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'  # for a person's shell


# --- where the ranks go ---------------------------------------------------------------------------------------------


def find_hosts(launch: LaunchConfig, num_gpus: int) -> list[str]:
    """The hosts that ranks would be started on from here, the first first; raises ConfigError if they cannot be."""
    return hosts_over_pdsh(launch, num_gpus) if launch.hostfile is not None else hosts_of_allocation(launch, num_gpus)


def hosts_over_pdsh(launch: LaunchConfig, num_gpus: int) -> list[str]:
    """The first num_nodes hosts of the hostfile. deepspeed 0.19.8 starts num_gpus ranks whatever a host's slots say."""
    slots = read_hostfile(Path(str(launch.hostfile)))
    if len(slots) < launch.num_nodes:
        raise ConfigError(
            f"run.launch.num_nodes={launch.num_nodes}, but {launch.hostfile} lists {len(slots)}. "
            f"Add hosts, or use --set run.launch.num_nodes={len(slots)}."
        )
    hosts = list(slots)[: launch.num_nodes]
    for host in hosts:
        if slots[host] < num_gpus:
            raise ConfigError(
                f"run.launch.num_gpus={num_gpus}, but {launch.hostfile} gives {host} slots={slots[host]}. "
                "Correct the slots, or use fewer GPUs per node."
            )
    for tool in ("pdsh", "ssh"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"run.launch.hostfile={launch.hostfile}: {tool} is not installed here, and DeepSpeed starts ranks on "
                f"other hosts with it. Install it (Debian: apt install pdsh openssh-client), or run under Slurm."
            )
    return hosts


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order: `host slots=N` lines, as DeepSpeed reads them; `#` starts a comment line."""
    key = f"run.launch.hostfile={path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{key}: cannot be read ({why}). Name a file with a line `host slots=N` per host.") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = re.fullmatch(r"([^\s,:\[\]]+)\s+slots=([1-9]\d*)(\s.*)?", line.strip())
        if match is None:
            raise ConfigError(f"{key} line {number}: {line.strip()!r} is not of the form `host slots=N`. Correct it.")
        if match[1] in slots:
            raise ConfigError(f"{key} line {number}: {match[1]} is listed twice. Give each host one line.")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{key}: lists no host. Write a line `host slots=N` per host.")
    return slots


def hosts_of_allocation(launch: LaunchConfig, num_gpus: int) -> list[str]:
    """The nodes of the Slurm job that launch.run runs in."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            f"run.launch.num_nodes={launch.num_nodes} needs a Slurm allocation (SLURM_JOB_ID is not set) or "
            "run.launch.hostfile. Submit launch/slurm.sbatch, name a hostfile, or use num_nodes=1."
        )
    allocated = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if allocated != str(launch.num_nodes):
        raise ConfigError(
            f"run.launch.num_nodes={launch.num_nodes}, but the Slurm job {os.environ['SLURM_JOB_ID']} has "
            f"{allocated or 'an unknown number'} of them. Use sbatch --nodes={launch.num_nodes}, or another num_nodes."
        )
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) < num_gpus:
        raise ConfigError(
            f"run.launch.num_gpus={num_gpus}, but the Slurm job {os.environ['SLURM_JOB_ID']} has {gpus} GPUs on this "
            f"node. Use sbatch --gpus-per-node={num_gpus}, or another num_gpus."
        )
    for tool in ("srun", "scontrol"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"run.launch.num_nodes={launch.num_nodes}: {tool} is not on PATH in the Slurm job "
                f"{os.environ['SLURM_JOB_ID']}. Add Slurm's programs to PATH, or name run.launch.hostfile."
            )
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    hosts = done.stdout.split()
    if done.returncode or len(hosts) != launch.num_nodes:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing"
        raise ConfigError(
            f"SLURM_JOB_NODELIST={os.environ.get('SLURM_JOB_NODELIST')}: scontrol show hostnames says {said!r}, not "
            f"{launch.num_nodes} hosts. Run inside the job, or name run.launch.hostfile."
        )
    return hosts


# --- the commands ---------------------------------------------------------------------------------------------------


def pdsh_options(launch: LaunchConfig, num_gpus: int) -> list[str]:
    """Options of `deepspeed` for its pdsh launcher. A relative hostfile is relative to where the user stands."""
    options = ["--hostfile", str(Path(str(launch.hostfile)).absolute())]
    options += ["--num_nodes", str(launch.num_nodes), "--num_gpus", str(num_gpus)]
    return [*options, "--master_addr", launch.master_addr] if launch.master_addr is not None else options


def srun_command(launch: LaunchConfig, num_gpus: int, environment: Mapping[str, str]) -> list[str]:
    """What starts python on every rank of this job. Ranks find MASTER_ADDR and MASTER_PORT in the environment.

    srun itself, because deepspeed 0.19.8's --launcher slurm adds nothing to it but traps: it wants a hostfile and ssh,
    leaves the spread of ranks over nodes to Slurm, cuts exported values at commas (NCCL_IB_HCA=mlx5_0,mlx5_1 becomes
    mlx5_0) and leaves ranks without RANK too. Ranks are Slurm's own tasks, so they hear of a preemption themselves.
    """
    nodes = launch.num_nodes
    shape = [f"--nodes={nodes}", f"--ntasks={nodes * num_gpus}", f"--ntasks-per-node={num_gpus}"]
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):  # since Slurm 22.05 srun takes one core unless told
        shape.append(f"--cpus-per-task={cpus}")
    return ["srun", *shape, "--kill-on-bad-exit=1", "--input=none"]


def rank_variables_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What launchers tell a rank, in Slurm's words. srun_command gives every node the same number of ranks."""
    world_size, num_nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size // num_nodes),
    }


@dataclass(frozen=True)
class Elsewhere:
    """How to reach ranks that are no processes of this machine."""

    stop_file: Path  # on shared storage; rank 0 looks for it at every step
    kill: list[str] | None  # a command that kills the ranks on all nodes; None: SIGTERM makes srun do that


def kill_over_pdsh(hosts: list[str], launch_dir: Path) -> list[str]:
    """Kill what has this attempt's folder in its command line: launch.py and ranks, on all hosts.

    Not by SIGTERM to the runner: deepspeed 0.19.8 then kills every launch.py on these hosts, of other runs too. The
    brackets keep the pattern from matching the shell that carries it.
    """
    pattern = f"[{launch_dir.name[0]}]{launch_dir.name[1:]}"
    return ["pdsh", "-R", "ssh", "-w", ",".join(hosts), f"pkill -KILL -f '{pattern}' || true"]


# --- what pdsh's shell would change ---------------------------------------------------------------------------------


def quoted_for_pdsh(argument: str) -> str:
    """An argument that reaches the rank as it is, through deepspeed 0.19.8, pdsh and the shell on the node.

    DeepSpeed puts an argument with a space between double quotes, escapes those within, and leaves all else to the
    shell; pdsh replaces %h, %n and %u.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)
    return quoted.replace("%", "%%")


def environment_file(environment: Mapping[str, str]) -> str:
    """The content of DS_ENV_FILE: name=value lines that DeepSpeed exports on all nodes; the user's own come last.

    deepspeed 0.19.8 reads `.deepspeed_env` in the home folder and in the current one, or what DS_ENV_FILE names
    instead; it puts a value between double quotes if it needs them, and escapes nothing.
    """
    lines = []
    for name, value in sorted(environment.items()):
        if name.startswith(EXPORTED) and not SECRET.search(name.upper()) and "\n" not in value:
            escaped = re.sub(r'([\\$`"])', r"\\\1", value)
            lines.append(f"{name}={escaped.replace('%', '%%')}")
    for folder in (Path.home(), Path.cwd()):
        theirs = folder / environment.get("DS_ENV_FILE", ".deepspeed_env")
        if theirs.is_file():
            lines += [line for line in theirs.read_text(encoding="utf-8").splitlines() if "=" in line]
    return "".join(f"{line}\n" for line in lines)
