"""Fixtures that all tests share: CPU by default, and one pool of ranks for the tests that need several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports deepspeed
sys.path.insert(0, str(Path(__file__).parent))  # reference.py and ranks.py, for tests and for the ranks' processes

from ranks import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two processes joined by gloo through DeepSpeed; started once, on first use."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A process that is all ranks there are."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four such processes, for groups that two ranks cannot form."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture
def watch() -> Iterator[Any]:
    """A CompileWatch over a dynamo that has compiled nothing."""
    import torch

    from model.compiling import CompileWatch

    torch._dynamo.reset()
    watch = CompileWatch()
    yield watch
    watch.close()
    torch._dynamo.reset()
