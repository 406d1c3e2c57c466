"""A stand-in for the module pynvml with two GPUs, whose readings a test chooses and which it can break."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class FakeNvml:
    """Two GPUs, "GPU-a" and "MIG-b"; utilisation 40 and 60 percent, memory 1000 and 3000 MiB, 50 and 70 degrees."""

    NVMLError, NVMLError_NotSupported = NVMLError, NVMLError_NotSupported
    NVMLError_NoPermission = NVMLError_NoPermission
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(
        self, *, driver: bool = True, unsupported: tuple[str, ...] = (), fails_after: int | None = None
    ) -> None:
        """`unsupported`: functions that this GPU lacks. `fails_after`: readings until the driver is gone."""
        self.driver, self.unsupported, self.readings_left = driver, unsupported, fails_after

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-a", "MIG-b"):
            raise NVMLError("Not Found")
        return ("GPU-a", "MIG-b").index(uuid)

    def __getattr__(self, name: str) -> Any:
        if name not in READINGS:
            raise AttributeError(name)

        def read(*arguments: int) -> Any:
            if name in self.unsupported:
                raise NVMLError_NotSupported("Not Supported")
            if self.readings_left is not None:
                self.readings_left -= 1
                if self.readings_left < 0:
                    raise NVMLError("GPU is lost")
            reading = READINGS[name]
            return reading[arguments[0]] if isinstance(reading, tuple) else reading

        return read


READINGS: dict[str, Any] = {  # of each GPU, or of both alike
    "nvmlSystemGetDriverVersion": "580.1",
    "nvmlDeviceGetPciInfo": (SimpleNamespace(busId="0000:01"), SimpleNamespace(busId="0000:02")),
    "nvmlDeviceGetMemoryInfo": tuple(SimpleNamespace(total=4000 * 2**20, used=used * 2**20) for used in (1000, 3000)),
    "nvmlDeviceGetUtilizationRates": (SimpleNamespace(gpu=40), SimpleNamespace(gpu=60)),
    "nvmlDeviceGetClockInfo": (1000, 2000),
    "nvmlDeviceGetApplicationsClock": 1500,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetPowerUsage": (300_000, 500_000),
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTemperature": (50, 70),
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetEccMode": [1, 0],
    "nvmlDeviceGetMigMode": [0, 1],
}
