"""Reads power, clock and temperature of an NVIDIA GPU, and what holds its clock down, by NVML: no stream waits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llm.sinks import Say, Sink

SECONDS_BETWEEN_READINGS = 1.0  # one takes up to some milliseconds
QUANTITIES: dict[str, Callable[[Any, Any], float]] = {
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "throttle_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
}
# NVML's bits, but for that of an idle GPU.
REASONS = {
    0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal",
    0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def gpu_uuid(device: torch.device) -> str | None:
    """As NVML has it, which does not know CUDA_VISIBLE_DEVICES; None for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def reasons(bits: float) -> list[str]:
    """The names of the throttle reasons in NVML's bits; none where they are not known (nan)."""
    return [] if math.isnan(bits) else [name for bit, name in REASONS.items() if int(bits) & bit]


class GpuState:
    """The state of one GPU; what NVML cannot tell is left out, which `say` gets once for each quantity.

    uuid: None for no GPU, of which nothing is read. nvml: the module pynvml; None: imported.
    """

    def __init__(self, uuid: str | None, say: Say, nvml: Any = None) -> None:
        self.nvml, self.gpu, self.last, self.time = nvml, None, dict[str, float](), -math.inf
        self.sinks = {name: Sink(f"{name} of the GPU", say) for name in QUANTITIES}
        if uuid is not None:
            self.gpu = Sink("the state of the GPU", say)(lambda: self._open(uuid))

    def _open(self, uuid: str) -> Any:
        if self.nvml is None:
            import pynvml

            self.nvml = pynvml
        self.nvml.nvmlInit()
        return self.nvml.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> Mapping[str, float]:
        """What is known, by the names of QUANTITIES, not older than SECONDS_BETWEEN_READINGS."""
        now = time.monotonic()
        if self.gpu is not None and now - self.time >= SECONDS_BETWEEN_READINGS:
            found = {name: sink(lambda name=name: self._read(name)) for name, sink in self.sinks.items()}
            self.last, self.time = {name: x for name, x in found.items() if x is not None}, now
        return self.last

    def _read(self, name: str) -> float:
        return QUANTITIES[name](self.nvml, self.gpu)

    def record(self) -> dict[str, Any]:
        """What a metrics line says of it."""
        state = dict(self.read())
        bits = state.pop("throttle_reasons", math.nan)
        return {"gpu": state | {"throttled_by": reasons(bits)}} if state else {}
