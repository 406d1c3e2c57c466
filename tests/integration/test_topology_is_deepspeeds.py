"""The groups that launch.run shows are those that DeepSpeed makes."""

from __future__ import annotations

import pytest

from launch.topology import Topology
from ranks import RankPool


def groups_of_this_rank(ep_size: int) -> tuple[list[int], list[int]]:
    """On every rank: the members of its expert-parallel and expert-data groups, as DeepSpeed made them."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    expert, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    return dist.get_process_group_ranks(expert), dist.get_process_group_ranks(data)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_groups_are_deepspeeds(two_ranks: RankPool, ep_size: int) -> None:
    topology = Topology(1, 2, ep_size, "", 1)
    for rank, (expert, data) in enumerate(two_ranks.run(groups_of_this_rank, ep_size)):
        assert [group for group in topology.expert_parallel_groups if rank in group] == [expert]
        assert [group for group in topology.expert_data_groups if rank in group] == [data]
