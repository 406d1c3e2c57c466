"""What NVML says of a run's GPUs, with a stand-in for NVML: this must hold on machines without a GPU."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import pynvml
import pytest

from fake_nvml import FakeNvml
from launch import gpu_monitor
from launch.gpu_monitor import FACTS, GAUGES, GpuMonitor, describe_gpu, gpus_of_this_machine

SECONDS = 30  # against hanging only

METRICS = {
    "gpu/util_percent": 50.0,
    "gpu/power_w": 400.0,
    "gpu/sm_clock_mhz": 1500.0,
    "gpu/memory_used_mib": 3000.0,
    "gpu/temperature_c": 70.0,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "SAMPLE_SECONDS", 0.005)


def sampled_until(monitor: GpuMonitor, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, "nothing was sampled"
        time.sleep(0.005)


def test_metrics_are_means_over_gpus_and_samples_and_maxima_of_memory_and_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml())
    monitor = GpuMonitor(["a", "b"], pytest.fail).start()
    sampled_until(monitor, lambda: len(monitor.recent) == len(GAUGES))
    monitor.close()
    assert monitor.since_last_call() == METRICS
    assert monitor.since_last_call() == {}, "no sample since the last call: nothing, rather than 0"
    assert monitor.figures() == {
        "gpu_util_percent_mean": 50.0,
        "gpu_power_w_mean": 400.0,
        "gpu_sm_clock_mhz_mean": 1500.0,
        "gpu_memory_used_mib_max": 3000.0,
        "gpu_temperature_c_max": 70.0,
    }


def test_only_the_gpus_asked_for_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml())
    monitor = GpuMonitor(["b"], pytest.fail).start()
    sampled_until(monitor, lambda: "gpu/util_percent" in monitor.recent)
    monitor.close()
    assert monitor.since_last_call()["gpu/util_percent"] == 60.0


@pytest.mark.parametrize(("uuids", "driver"), [([], True), (["a"], False)])
def test_without_a_gpu_or_a_driver_nothing_is_recorded_or_said(
    uuids: list[str], driver: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml(driver=driver))
    monitor = GpuMonitor(uuids, pytest.fail).start()
    assert monitor.thread is None
    assert (monitor.since_last_call(), monitor.figures()) == ({}, {})
    monitor.close()
    assert capfd.readouterr() == ("", "")


def test_a_gauge_that_the_gpu_lacks_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml(unsupported=("nvmlDeviceGetPowerUsage",)))
    monitor = GpuMonitor(["a", "b"], pytest.fail).start()
    sampled_until(monitor, lambda: "gpu/temperature_c" in monitor.recent)
    monitor.close()
    assert monitor.since_last_call().keys() == METRICS.keys() - {"gpu/power_w"}
    assert "gpu_power_w_mean" not in monitor.figures()


@pytest.mark.parametrize(("uuids", "fault"), [(["a"], "NVMLError: GPU is lost"), (["c"], "NVMLError: Not Found")])
def test_a_fault_of_nvml_is_said_once_and_ends_the_sampling(
    uuids: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml(fails_after=2 * len(GAUGES)))
    said: list[str] = []
    monitor = GpuMonitor(uuids, said.append).start()
    assert monitor.thread is not None
    monitor.thread.join(SECONDS)
    assert not monitor.thread.is_alive()
    before = monitor.since_last_call()
    assert before.keys() == (METRICS.keys() if uuids == ["a"] else set()), "what was sampled before counts"
    monitor.since_last_call()
    assert said == [f"GPUs are not sampled from here: {fault}"]


def test_sampling_ends_with_close_however_long_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml())
    monkeypatch.setattr(gpu_monitor, "SAMPLE_SECONDS", float(SECONDS))
    monitor = GpuMonitor(["a"], pytest.fail).start()
    assert monitor.thread is not None
    assert monitor.thread.daemon, "a process that ends without close() is not kept alive"
    monitor.close()
    monitor.close()
    assert not monitor.thread.is_alive()
    assert "gpu_monitor" not in {thread.name for thread in threading.enumerate()}


def test_env_json_says_clocks_limits_and_modes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml())
    facts = describe_gpu("b")
    assert json.loads(json.dumps(facts)) == {
        "pci_bus_id": "0000:02",
        "driver_version": "580.1",
        "memory_total_mib": 4000.0,
        "sm_clock_mhz": 2000,
        "sm_clock_application_mhz": 1500,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 2000,
        "memory_clock_application_mhz": 1500,
        "memory_clock_max_mhz": 1980,
        "power_limit_w": 700.0,
        "persistence_mode": True,
        "ecc_mode": True,
        "mig_mode": False,
    }


def test_a_fact_that_the_gpu_lacks_is_absent_and_without_a_driver_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml(unsupported=("nvmlDeviceGetMigMode",)))
    assert describe_gpu("a").keys() == FACTS.keys() - {"mig_mode"}
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml(driver=False))
    assert describe_gpu("a") == {}


def test_only_gpus_of_this_machine_are_sampled_and_each_once() -> None:
    here, there = {"hostname": socket.gethostname()}, {"hostname": "elsewhere"}
    ranks = [
        here | {"gpu": {"uuid": "b"}},
        here | {"gpu": {"uuid": "a"}},
        here | {"gpu": {"uuid": "a"}},
        there | {"gpu": {"uuid": "c"}},
        here,
    ]
    assert gpus_of_this_machine(ranks) == ["a", "b"]


def test_every_function_and_name_used_exists_in_the_real_module() -> None:
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    from fake_nvml import READINGS

    assert [name for name in (*names, *READINGS) if not hasattr(pynvml, name)] == []
