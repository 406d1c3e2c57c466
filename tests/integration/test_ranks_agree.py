"""What one rank is refused, all are refused, with the same words: no rank goes on to wait for the others for ever."""

from __future__ import annotations

import argparse

import pytest

from launch.run_config import REPO_ROOT, load_run
from ranks import RankPool

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"


def refusal_on_this_rank(changes_by_rank: list[list[str]]) -> str:
    """On every rank: open the data of its own version of the run; the error that comes of it."""
    import torch.distributed as dist

    import train
    from launch.begin import Start
    from launch.run_dir import Beginning
    from launch.topology import resolve_topology

    rank = dist.get_rank()
    run = load_run(TINY, changes_by_rank[rank])
    beginning = Beginning("fresh", 0)
    start = Start(argparse.Namespace(), run, resolve_topology(run, 1, 2), beginning, rank, rank)
    try:
        train.open_on_all_ranks(start)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [], "none"),
        ([], ["run.data.train=nowhere/train"], "DataError: rank 1: nowhere/train"),
        (["run.data.train=nowhere/train"], [], "DataError: nowhere/train"),
        ([], ["run.launch.ep_size=1"], "ConfigError: ep_size: the ranks see different ones (1, 2)."),
        ([], ["run.model.hidden_size=64"], "ConfigError: run file: the ranks see different ones"),
    ],
)
def test_a_refusal_is_the_same_on_all_ranks(
    two_ranks: RankPool, first: list[str], second: list[str], expected: str
) -> None:
    answers = two_ranks.run(refusal_on_this_rank, [first, second])
    assert answers[0] == answers[1]
    assert answers[0].startswith(expected)
