"""Who may import whom, read from the source of every file. CONTRIBUTING.md has the picture.

    tests                               anything
    tools/, train.py                    launch, model; tools never each other (golden and gpu_check also train), but
                                        the files of a tool that is a folder belong together
    launch/                             launch, model.config, model.flops; no torch
    model/                              model; no command line, no environment variables
    model/config.py, model/flops.py     pydantic and the standard library

Each third party has one door, so that upgrading it means reading few files. An import inside a function counts.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
OURS = ("launch", "model", "tools", "tests", "train")
SOURCES = {
    str(path.relative_to(REPO_ROOT)): path
    for pattern in ("*.py", "launch/**/*.py", "model/**/*.py", "tools/**/*.py", "benchmarks/**/*.py")
    for path in sorted(REPO_ROOT.glob(pattern))
}

# What a folder or file may import of ours, the first entry that fits its path.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model/config.py", ()),
    ("model/flops.py", ("model.config",)),
    ("model/", ("model",)),
    ("launch/", ("launch", "model.config", "model.flops")),
    ("tools/golden.py", ("launch", "model", "train")),  # its runs are train.py's own, many in one process
    ("tools/bench_moe/", ("launch", "model", "tools.bench_moe")),
    ("tools/gpu_check/leg.py", ("launch", "tools.gpu_check", "train")),  # a run of train.py's that keeps its times
    ("tools/gpu_check/", ("launch", "model", "tools.gpu_check")),
    ("tools/", ("launch", "model")),
    ("train.py", ("launch", "model")),
    ("setup.py", ()),
)

# Which files may import a third party, the first entry that fits the import.
DOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # how the engine wants parameter groups split, and which parameters are experts
    ("deepspeed.moe.utils", ("model/optim.py", "model/partition.py")),
    ("deepspeed.moe.layer", ("model/moe.py", "tools/bench_moe/blocks.py")),  # the latter as a peer
    ("deepspeed.moe", ("model/moe.py", "model/router.py")),
    (
        "deepspeed",
        ("train.py", "model/device.py", "model/partition.py", "model/moe.py", "model/router.py", "model/optim.py"),
    ),
    ("safetensors", ("model/tensor_files.py",)),
    ("torchao", ("model/fp8.py", "model/fp8_casts.py")),
    ("triton", ("model/fp8_kernels.py",)),
    ("liger_kernel", ("model/loss.py",)),
    ("pynvml", ("launch/gpu_monitor.py",)),
    ("wandb", ("launch/wandb_run.py", "launch/wandb_records.py")),
    ("matplotlib", ("launch/figures.py",)),
    ("plotly", ("launch/report_html.py",)),
    ("scipy", ("launch/noise.py",)),
    ("rich", ("launch/ablate.py",)),
    ("selenium", ()),  # tests alone drive a browser
    ("transformers", ("tools/hf.py", "tools/bench_moe/blocks.py")),
)

# What a folder may not touch, whoever holds the door.
FORBIDDEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("launch/", ("torch", "numpy")),
    ("model/", ("argparse", "wandb", "os.environ", "os.environb", "os.getenv", "os.putenv")),
)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of attributes of a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (parent := dotted(node.value)):
        return f"{parent}.{node.attr}"
    return ""


def uses(source: str, package: str) -> Iterator[str]:
    """Full names that a file imports, or reaches as attributes of a module it imports."""
    modules: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                modules[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(part for part in ((package if node.level else ""), node.module or "") if part)
            for alias in node.names:
                yield f"{parent}.{alias.name}"
                modules[alias.asname or alias.name] = f"{parent}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            first, _, rest = name.partition(".")
            if first in modules:
                yield f"{modules[first]}.{rest}"


def violations(path: str, source: str) -> list[str]:
    """What a file at `path` with this source does against the rules."""
    package = path.partition("/")[0]
    allowed = next((names for prefix, names in LAYERS if path.startswith(prefix)), None)
    if allowed is None:
        return [f"{path}: no rule in LAYERS says what it may import"]
    found = set()
    for name in uses(source, package):
        root = name.partition(".")[0]
        if root in OURS and not any(is_within(name, each) for each in allowed):
            found.add(f"{path} uses {name}: of ours it may import {', '.join(allowed) or 'nothing'}")
        if path.startswith("tools/") and root == "tools" and not any(is_within(name, each) for each in allowed):
            found.add(f"{path} uses {name}: tools never import each other")
        if path in ("model/config.py", "model/flops.py") and root not in {
            *sys.stdlib_module_names,
            "pydantic",
            "model",
        }:
            found.add(f"{path} uses {name}: pydantic and the standard library only")
        door = next(((third, files) for third, files in DOORS if is_within(name, third)), None)
        if door and path not in door[1]:
            found.add(f"{path} uses {name}: {door[0]} is for {', '.join(door[1]) or 'tests'}")
        for prefix, names in FORBIDDEN:
            if path.startswith(prefix) and any(is_within(name, each) for each in names):
                found.add(f"{path} uses {name}: not in {prefix}")
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_imports_what_its_layer_may(path: str) -> None:
    assert violations(path, SOURCES[path].read_text()) == []


@pytest.mark.parametrize(
    "path",
    [path for path in REPO_ROOT.glob("*/**/__init__.py") if path.relative_to(REPO_ROOT).parts[0] in OURS],
    ids=lambda path: path.parent.name,
)
def test_an_init_file_is_empty(path: Path) -> None:
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("path", "source", "culprit"),
    [
        ("launch/x.py", "from model.gpt import GPT", "model.gpt.GPT"),
        ("launch/x.py", "from model import gpt", "model.gpt"),
        ("launch/x.py", "import model", "model"),
        ("launch/x.py", "def f():\n    import torch.distributed as dist", "torch.distributed"),
        ("launch/x.py", "import train", "train"),
        ("launch/x.py", "import wandb", "wandb"),
        ("launch/x.py", "import pynvml", "pynvml"),
        ("launch/x.py", "def f():\n    import plotly.offline", "plotly.offline"),
        ("tools/x.py", "from selenium import webdriver", "selenium.webdriver"),
        ("model/x.py", "from launch.run_config import Run", "launch.run_config.Run"),
        ("model/x.py", "import os\nprint(os.environ['RANK'])", "os.environ"),
        ("model/x.py", "from os import getenv", "os.getenv"),
        ("model/x.py", "import argparse", "argparse"),
        ("model/x.py", "import torchao.float8", "torchao.float8"),
        ("model/fp8_casts.py", "import triton.language as tl", "triton.language"),
        ("model/config.py", "import numpy as np", "numpy"),
        ("model/flops.py", "from model.gpt import GPT", "model.gpt.GPT"),
        ("model/checkpoint.py", "import deepspeed\ndeepspeed.moe.layer.MoE", "deepspeed.moe.layer.MoE"),
        ("model/gpt.py", "import deepspeed", "deepspeed"),
        ("model/optim.py", "from deepspeed.moe.layer import MoE", "deepspeed.moe.layer.MoE"),
        ("tools/x.py", "from tools.prepare_data import main", "tools.prepare_data.main"),
        ("tools/x.py", "from . import prepare_data", "tools.prepare_data"),
        ("tools/x.py", "from tools.bench_moe import shapes", "tools.bench_moe.shapes"),
        ("tools/bench_moe/x.py", "from tools.prepare_data import main", "tools.prepare_data.main"),
        ("tools/gpu_check/x.py", "from tools.bench_moe import blocks", "tools.bench_moe.blocks"),
        ("tools/gpu_check/x.py", "import train", "train"),
        ("tools/x.py", "import train", "train"),
        ("tools/x.py", "import transformers", "transformers"),
        ("model/gpt.py", "from liger_kernel.ops import X", "liger_kernel.ops.X"),
        ("elsewhere/x.py", "import json", "no rule"),
    ],
)
def test_the_walk_sees_what_breaks_a_rule(path: str, source: str, culprit: str) -> None:
    found = violations(path, source)
    assert found
    assert culprit in found[0]


def test_the_walk_allows_what_the_rules_allow() -> None:
    assert violations("launch/x.py", "import os\nfrom model.config import ConfigError\nos.environ['A']") == []
    assert violations("model/moe.py", "import torch\nfrom deepspeed.moe.layer import MoE") == []
    assert violations("tools/x.py", "import argparse, torch\nfrom launch import run_dir\nimport model.gpt") == []
    assert violations("tools/bench_moe/x.py", "import launch.run_dir\nfrom tools.bench_moe.shapes import Shape") == []


def test_importing_launch_imports_nothing_slow() -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in SOURCES if path.startswith("launch/")]
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
slow = ("torch", "deepspeed", "wandb", "numpy", "scipy", "matplotlib", "plotly")
print([name for name in slow if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
