"""What NVML tells is recorded; what it cannot tell is said once and ends nothing."""

from __future__ import annotations

from typing import Any

import pytest

import llm.train.gpu_state as gpu_state
from llm.train.gpu_state import GpuState, reasons


class NVMLError(Exception):
    pass


class FakeNvml:
    """pynvml, as far as it is used, for one GPU."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, **broken: str) -> None:
        """broken: what these functions raise."""
        self.broken, self.calls = broken, list[str]()

    def _call(self, name: str, result: Any) -> Any:
        self.calls.append(name)
        if name in self.broken:
            raise NVMLError(self.broken[name])
        return result

    def nvmlInit(self) -> None:
        self._call("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._call("handle", f"handle of {uuid}")

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        assert gpu == "handle of GPU-1"
        return self._call("power", 345_600)

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        assert (gpu, kind) == ("handle of GPU-1", self.NVML_CLOCK_SM)
        return self._call("clock", 1410)

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        assert (gpu, sensor) == ("handle of GPU-1", self.NVML_TEMPERATURE_GPU)
        return self._call("temperature", 66)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: str) -> int:
        return self._call("reasons", 0x1 | 0x4 | 0x40)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "SECONDS_BETWEEN_READINGS", 0.0)


def test_a_reading() -> None:
    said: list[str] = []
    state = GpuState("GPU-1", said.append, FakeNvml())
    assert state.record() == {
        "gpu": {
            "power_watts": 345.6, "clock_mhz": 1410, "temperature_celsius": 66,
            "throttled_by": ["power cap", "hardware thermal"],
        }
    }  # fmt: skip
    assert state.read()["throttle_reasons"] == 0x45 and said == []


def test_readings_are_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "SECONDS_BETWEEN_READINGS", 1000.0)
    nvml = FakeNvml()
    state = GpuState("GPU-1", print, nvml)
    first = state.record()
    assert state.record() == first and nvml.calls.count("power") == 1


def test_a_quantity_that_fails_is_said_once_and_left_out() -> None:
    said: list[str] = []
    nvml = FakeNvml(power="Not Supported")
    state = GpuState("GPU-1", said.append, nvml)
    for _ in range(3):
        assert state.record()["gpu"].keys() == {"clock_mhz", "temperature_celsius", "throttled_by"}
    assert said == ["warning: power_watts of the GPU is left out from here on: NVMLError: Not Supported"]
    assert nvml.calls.count("power") == 1


@pytest.mark.parametrize("broken", ["init", "handle"])
def test_without_a_driver_nothing_is_read_and_it_is_said_once(broken: str) -> None:
    said: list[str] = []
    state = GpuState("GPU-1", said.append, FakeNvml(**{broken: "Driver Not Loaded"}))
    assert [state.record() for _ in range(3)] == [{}] * 3
    assert said == ["warning: the state of the GPU is left out from here on: NVMLError: Driver Not Loaded"]


def test_a_cpu_has_no_state_and_says_nothing() -> None:
    said, nvml = list[str](), FakeNvml()
    state = GpuState(None, said.append, nvml)
    assert state.record() == {} and said == [] and nvml.calls == []


def test_the_package_has_what_is_called() -> None:
    """And its constants are ours; on a machine without a driver it is refused by an error of its own."""
    pynvml = pytest.importorskip("pynvml")
    for name in vars(FakeNvml):
        assert name.startswith("_") or hasattr(pynvml, name), name
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_TEMPERATURE_GPU) == (1, 0)
    bits = {getattr(pynvml, name): name for name in dir(pynvml) if name.startswith("nvmlClocksEventReason")}
    assert bits.keys() >= gpu_state.REASONS.keys()
    assert "HwThermalSlowdown" in bits[0x40] and "SwPowerCap" in bits[0x4] and "GpuIdle" in bits[0x1]
    said: list[str] = []
    assert GpuState("GPU-none", said.append).record() == {} and len(said) == 1


def test_names_of_reasons() -> None:
    assert reasons(float("nan")) == reasons(0) == reasons(0x1) == []
    assert reasons(0x8 | 0x80) == ["hardware slowdown", "power brake"]
