"""Stage `machine`: versions and clocks, whether the prepared kernels fit, the machine's limits."""

import subprocess
from functools import partial

import torch

from benchmarks import report
from benchmarks.clock import clock_of
from benchmarks.gpu_proof import cache
from benchmarks.gpu_proof.stage import Items
from benchmarks.kernels import attention, norm
from benchmarks.kernels.runner import limits_of
from benchmarks.report import Record

PACKAGES = ("torch", "triton", "numpy", "nvidia-cudnn-cu13", "transformers", "deepspeed")
ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used"


def machine(device: torch.device) -> Items:
    found: Items = {"versions": partial(versions, device)}
    if device.type == "cuda":
        found["prepared kernels"] = cache.unpack
        found["first launches"] = partial(first_launches, device)
    return found | {"limits": lambda: dict(limits_of(device, clock_of(device)))}


def versions(device: torch.device) -> Record:
    head = report.header("benchmarks.gpu_proof", [], device, PACKAGES)
    if device.type == "cuda":
        asked = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        head["nvidia_smi"] = dict(zip(ASKED.split(","), answer.strip().split(", "), strict=False))
    return head | {"compiler": cache.compiler()}


def first_launches(device: torch.device) -> Record:
    """Launches kernels that were prepared: the record then says how many of them had to be compiled."""
    attention.case(device, torch.bfloat16, attention.Shape(4, 4096, 16, 128)).results("triton")
    norm.case(device, torch.bfloat16, "add_layer_norm", 16, 1024, 768).results("triton")
    return {}
