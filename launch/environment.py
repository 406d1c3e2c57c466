"""What a result depends on besides its run file: code, packages, hardware, launch line. The content of env.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from launch.run_config import REPO_ROOT, Run

PACKAGES = (
    "torch", "deepspeed", "torchao", "triton", "transformers", "tokenizers", "numpy", "pydantic", "wandb",
    "nvidia-ml-py", "liger-kernel",
)  # fmt: skip
VARIABLES = (
    "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "DS_", "DEEPSPEED_", "OMP_", "GOMP_", "KMP_",
    "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH", "PYTORCH", "PYTHON", "TRITON_", "TOKENIZERS_", "HF_",
    "TRANSFORMERS_", "LD_PRELOAD", "LD_LIBRARY_PATH", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE", "MASTER_", "WANDB_MODE", "WANDB_BASE_URL",
)  # fmt: skip
SECRET = re.compile("KEY|TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|JWT|AUTH|COOKIE")  # in the name of a variable
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # and in the value: https://user:password@host


def describe_environment(run: Run, argv: list[str], devices: list[str], **facts: Any) -> dict[str, Any]:
    """The content of env.json for one attempt. What cannot be known (no git, a package not installed) is absent.

    argv is the program's command line, devices the names of this run's accelerators; `facts` (world_size, ep_size, data
    hashes, what torch and NVML say ...) are added as they are.
    """
    return {
        "config_hash": run.config_hash,
        "started": utc_now(),
        "launch_line": shlex.join(argv),
        **facts,
        "devices": devices,
        **describe_checkout(REPO_ROOT),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_count_usable": len(os.sched_getaffinity(0)),
        "memory_total_mib": psutil.virtual_memory().total / 2**20,
        "hostname": socket.gethostname(),
        "variables": telling_variables(dict(os.environ)),
    }


def variables_of_interpreter(environment: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed needs to find what set-up built, when this interpreter is used without activating its environment.

    Its scripts' folder on PATH (ninja is there), and TORCH_EXTENSIONS_DIR where set-up put the ops: ranks that find
    none would all build them at the same time.
    """
    scripts, extensions = str(Path(sys.executable).parent), Path(sys.prefix) / "torch_extensions"
    path = environment.get("PATH", os.defpath)
    variables = {"PATH": path if scripts in path.split(os.pathsep) else f"{scripts}{os.pathsep}{path}"}
    if extensions.is_dir() and "TORCH_EXTENSIONS_DIR" not in environment:
        variables["TORCH_EXTENSIONS_DIR"] = str(extensions)
    return variables


def utc_now() -> str:
    return datetime.now(UTC).isoformat()


def describe_checkout(folder: Path) -> dict[str, Any]:
    """Commit, whether anything differs from it, and a hash of what does; empty where `folder` is not a git checkout.

    dirty_hash covers the diff of tracked files and the names and contents of files that git neither tracks nor ignores.
    """
    top = git(folder, "rev-parse", "--show-toplevel")
    commit = git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top.decode().strip()).resolve() != folder.resolve():
        return {}
    diff = git(folder, "diff", "HEAD", "--binary", "--no-ext-diff")
    untracked = git(folder, "ls-files", "--others", "--exclude-standard", "-z")
    if diff is None or untracked is None:
        return {"commit": commit.decode().strip()}
    digest = hashlib.sha256(diff)
    for name in filter(None, untracked.split(b"\0")):
        path = folder / os.fsdecode(name)
        digest.update(name + b"\0" + (hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""))
    dirty = bool(diff or untracked)
    found: dict[str, Any] = {"commit": commit.decode().strip(), "dirty": dirty}
    return {**found, "dirty_hash": digest.hexdigest()[:16]} if dirty else found


def git(folder: Path, *arguments: str) -> bytes | None:
    """What a git command prints; None if git is missing, slow or says no. Takes no lock, lest it disturb a commit."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def package_versions() -> dict[str, str]:
    """Installed versions, read from the package metadata: nothing is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def telling_variables(environment: dict[str, str]) -> dict[str, str]:
    """The variables that change how a run behaves, sorted; never one whose name smells of a secret, nor a login."""
    return {
        name: USER_IN_URL.sub("", value)
        for name, value in sorted(environment.items())
        if name.startswith(VARIABLES) and not SECRET.search(name.upper())
    }
