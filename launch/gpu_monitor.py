"""What NVIDIA's management library (NVML) says about a run's GPUs: once for env.json, and sampled while the run trains.

A GPU is named by its UUID: NVML counts all GPUs of a machine, a process only those that CUDA_VISIBLE_DEVICES leaves it.
What NVML cannot say, on a machine without a driver nothing at all, is absent.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import pynvml

SAMPLE_SECONDS = 2.0
MIB = 2**20

# What env.json says of a GPU besides its name and UUID; clocks in MHz. Settings, and the clocks at the start.
FACTS: dict[str, Callable[[Any], Any]] = {
    "pci_bus_id": lambda gpu: pynvml.nvmlDeviceGetPciInfo(gpu).busId,
    "driver_version": lambda gpu: pynvml.nvmlSystemGetDriverVersion(),
    "memory_total_mib": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).total / MIB,
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "sm_clock_application_mhz": lambda gpu: pynvml.nvmlDeviceGetApplicationsClock(gpu, pynvml.NVML_CLOCK_SM),
    "sm_clock_max_mhz": lambda gpu: pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "memory_clock_application_mhz": lambda gpu: pynvml.nvmlDeviceGetApplicationsClock(gpu, pynvml.NVML_CLOCK_MEM),
    "memory_clock_max_mhz": lambda gpu: pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "power_limit_w": lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    "persistence_mode": lambda gpu: bool(pynvml.nvmlDeviceGetPersistenceMode(gpu)),
    "ecc_mode": lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]),  # the other one holds after a reboot
    "mig_mode": lambda gpu: bool(pynvml.nvmlDeviceGetMigMode(gpu)[0]),
}


@dataclass(frozen=True)
class Gauge:
    """A quantity that is sampled, and whether its mean or its maximum, over GPUs and samples, is what matters."""

    metric: str
    read: Callable[[Any], float]
    maximum: bool = False

    @property
    def figure(self) -> str:
        """Its name in summary.json: gpu_util_percent_mean."""
        return f"{self.metric.replace('/', '_')}_{'max' if self.maximum else 'mean'}"


GAUGES = (
    Gauge("gpu/util_percent", lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
    Gauge("gpu/power_w", lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    Gauge("gpu/sm_clock_mhz", lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
    # of the whole GPU, so other processes' memory is in it; train/peak_mem_mib is the run's own
    Gauge("gpu/memory_used_mib", lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / MIB, maximum=True),
    Gauge(
        "gpu/temperature_c",
        lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        maximum=True,
    ),
)


def describe_gpu(uuid: str) -> dict[str, Any]:
    """FACTS of one GPU of this machine, by the UUID that torch prints."""
    facts = {}
    try:
        pynvml.nvmlInit()
        gpu = handle_of(uuid)
    except pynvml.NVMLError:
        return {}
    for name, read in FACTS.items():
        try:
            facts[name] = read(gpu)
        except pynvml.NVMLError:  # not on this model, or not allowed in this container
            continue
    return facts


def handle_of(uuid: str) -> Any:
    """NVML's handle. Before the UUID that CUDA and torch have, NVML writes whether it is a whole GPU or a MIG slice."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def gpus_of_this_machine(ranks: list[dict[str, Any]]) -> list[str]:
    """UUIDs of a run's GPUs here, from the `ranks` of its env.json."""
    here = [rank["gpu"]["uuid"] for rank in ranks if "gpu" in rank and rank["hostname"] == socket.gethostname()]
    return sorted(set(here))


class Tally:
    """Count, sum and largest of the values of one gauge."""

    def __init__(self) -> None:
        self.count, self.sum, self.largest = 0, 0.0, float("-inf")

    def add(self, value: float) -> None:
        self.count, self.sum, self.largest = self.count + 1, self.sum + value, max(self.largest, value)

    def result(self, gauge: Gauge) -> float:
        return self.largest if gauge.maximum else self.sum / self.count


class GpuMonitor:
    """Reads the gauges of some GPUs of this machine every SAMPLE_SECONDS, in a thread beside the training loop.

    Training, validation and saving are sampled alike. It waits for nothing on the GPU, and nothing waits for it.
    Without NVML, or without a GPU, it stays silent. A gauge that a GPU lacks is absent; any other fault of NVML ends
    the sampling, and is said with the next metrics.
    """

    def __init__(self, uuids: list[str], say: Callable[[str], None]) -> None:
        self.uuids, self.say = uuids, say
        self.lock = threading.Lock()  # guards the tallies and the fault
        self.recent: dict[str, Tally] = {}  # by metric, since the last since_last_call()
        self.whole: dict[str, Tally] = {}  # since the start
        self.fault: str | None = None
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> Self:
        """Begin to sample, if there is anything to read."""
        if self.uuids:
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError:
                return self
            self.thread = threading.Thread(target=self._sample_until_ended, name="gpu_monitor", daemon=True)
            self.thread.start()
        return self

    def close(self) -> None:
        """End the sampling. May be called twice, and without start()."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=2 * SAMPLE_SECONDS)  # a driver that hangs must not hang the run's end

    def since_last_call(self) -> dict[str, float]:
        """Metrics over all samples since the last call; empty if there were none."""
        with self.lock:
            recent, self.recent = self.recent, {}
            fault, self.fault = self.fault, None
        if fault is not None:
            self.say(f"GPUs are not sampled from here: {fault}")
        return {gauge.metric: recent[gauge.metric].result(gauge) for gauge in GAUGES if gauge.metric in recent}

    def figures(self) -> dict[str, float]:
        """The same over all samples, under the names of summary.json."""
        with self.lock:
            return {
                gauge.figure: self.whole[gauge.metric].result(gauge) for gauge in GAUGES if gauge.metric in self.whole
            }

    def _sample_until_ended(self) -> None:
        try:
            gpus = [handle_of(uuid) for uuid in self.uuids]
            while not self.ended.wait(SAMPLE_SECONDS):
                self._sample(gpus)
        except pynvml.NVMLError as error:
            with self.lock:
                self.fault = f"{type(error).__name__}: {error}"

    def _sample(self, gpus: list[Any]) -> None:
        for gauge in GAUGES:
            for gpu in gpus:
                try:
                    value = float(gauge.read(gpu))
                except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
                    continue
                with self.lock:
                    for tallies in (self.recent, self.whole):
                        tallies.setdefault(gauge.metric, Tally()).add(value)
