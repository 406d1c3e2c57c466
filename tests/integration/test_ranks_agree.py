"""What one rank is refused, all are refused, with the same words: no rank goes on to wait for the others for ever."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest

from launch.run_config import REPO_ROOT, load_run
from model.data import TokenFileWriter
from ranks import RankPool

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"


def refusal_on_this_rank(changes_by_rank: list[list[str]], stop_files: tuple[Path | None, ...] = (None, None)) -> str:
    """On every rank: open the data of its own version of the run; the error that comes of it."""
    import torch.distributed as dist

    import train
    from launch.begin import Start
    from launch.run_dir import Beginning
    from launch.topology import resolve_topology

    rank = dist.get_rank()
    run = load_run(TINY, changes_by_rank[rank])
    beginning = Beginning("fresh", 0)
    args = argparse.Namespace(run_dir=Path("runs/mine"), stop_file=stop_files[rank])
    start = Start(args, run, resolve_topology(run, 1, 2), beginning, rank, rank)
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


def refusal_in_a_folder_of_its_own(folders: list[Path], changes: list[str]) -> str:
    """As above, when a relative prefix means another file on every rank."""
    import torch.distributed as dist

    before = Path.cwd()
    os.chdir(folders[dist.get_rank()])
    try:
        return refusal_on_this_rank([changes, changes])
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("split", "words"), [("train", "training data"), ("val", "validation data")])
def test_ranks_that_see_other_tokens_are_refused(two_ranks: RankPool, tmp_path: Path, split: str, words: str) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        with TokenFileWriter(folder / "tokens", np.uint16) as writer:
            writer.add_document(np.arange(100 + number))
    answers = two_ranks.run(refusal_in_a_folder_of_its_own, folders, [f"run.data.{split}=tokens"])
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"ConfigError: {words}: the ranks see different ones (")


def test_a_node_that_does_not_see_the_run_folders_place_is_refused_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    answers = two_ranks.run(refusal_on_this_rank, [[], []], (tmp_path / "stop", tmp_path / "unshared" / "stop"))
    assert answers[0] == answers[1]
    assert answers[0].startswith("ConfigError: rank 1: --run_dir runs/mine: ")
    assert answers[0].endswith(" does not see the runs of launch.run. Name a folder on storage that all nodes share.")


def stops_agreed_on_this_rank() -> list[bool]:
    """What three calls say, and whether the watch was told. Rank 1 is asked at the second call."""
    import torch.distributed as dist

    import train

    asked, told = iter([False, dist.get_rank() == 1]), []
    stop = train.StopRequest(lambda: next(asked), lambda: told.append(True))
    return [*(stop.agreed_by_all_ranks("cpu") for _ in range(3)), told == [True]]


def test_what_one_rank_was_asked_stops_all_at_the_same_call_and_for_good(two_ranks: RankPool) -> None:
    assert two_ranks.run(stops_agreed_on_this_rank) == [[False, True, True, True]] * 2
