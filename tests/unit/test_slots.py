"""Which GPU, or share of the cores, runs that are side by side have."""

import pytest

import launch.run
import launch.run_queue
import launch.topology
from launch.run import hosts_of, launch_plan
from launch.run_config import REPO_ROOT, load_run
from launch.run_queue import number_of_slots, variables_of_slot
from model.config import ConfigError


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int = 8, devices: str | None = None) -> None:
    monkeypatch.setattr(launch.topology, "query_gpus", lambda: [80 * 2**30] * gpus)
    monkeypatch.setattr(launch.run_queue, "usable_cores", lambda: cores)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)


@pytest.mark.parametrize(
    ("gpus", "devices", "slots", "expected"),
    [
        (3, None, 3, [{"CUDA_VISIBLE_DEVICES": each} for each in ("0", "1", "2")]),
        (8, "2,5", 2, [{"CUDA_VISIBLE_DEVICES": each} for each in ("2", "5")]),
        (8, "", 8, [{"OMP_NUM_THREADS": "1"}] * 8),
        (0, None, 8, [{"OMP_NUM_THREADS": "1"}] * 8),
    ],
)
def test_every_slot_has_a_gpu_of_its_own_or_a_core(
    monkeypatch: pytest.MonkeyPatch, gpus: int, devices: str | None, slots: int, expected: list[dict[str, str]]
) -> None:
    machine(monkeypatch, gpus, devices=devices)
    assert number_of_slots("quality", "auto") == slots
    assert [variables_of_slot(slot, slots) for slot in range(slots)] == expected


def test_fewer_slots_share_all_cores_and_throughput_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0)
    assert variables_of_slot(0, number_of_slots("quality", 2)) == {"OMP_NUM_THREADS": "4"}
    assert number_of_slots("throughput", "auto") == 1


@pytest.mark.parametrize(("gpus", "what"), [(2, "2 GPUs"), (0, "8 cores")])
def test_more_slots_than_the_machine_has_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, what: str
) -> None:
    machine(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=f"slots=9, but this machine has {what}. Use at most {what[0]}, or 'auto'."):
        number_of_slots("quality", 9)


def test_gpus_listed_by_uuid_are_refused_before_any_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, devices="GPU-1fa3,GPU-2b4c")
    plan = launch_plan(load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json"))
    with pytest.raises(ConfigError, match="deepspeed's launcher takes numbers only"):
        hosts_of(plan)
