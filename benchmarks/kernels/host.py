"""`python -m benchmarks.kernels.host`: the host's time for an operator's forward and backward pass, without a GPU.

Kernels are compiled for sm_90 as a GPU's would be, and handed to a driver that launches nothing; tensors are small and
on the CPU. So this is the time of Python, PyTorch and Triton alone: microseconds of CPU time. Each round is a process,
and of its graphs of CALLS calls the fastest counts: what else the machine does (it takes caches, units that cores
share, and frequency) and Python's garbage collector only add. Shown are the median of --rounds and their range.
With `--beside FOLDER`, another checkout's kernels are timed in turns with this one's, by the same rule.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton.backends.nvidia.driver as nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CALLS = 8  # of an operator in one graph, as a model has them: PyTorch's own time per backward pass is shared
GRAPHS = 200  # of a round
TRITON_3_6 = hasattr(nvidia, "_BASE_ARGS_FORMAT_LEN")


def launch_nothing(*_: Any) -> None:
    """Stands for the C function that launches."""


class Launcher:
    """Does what Triton's launcher does in Python, up to the call of its C function."""

    def __init__(self, src: Any, metadata: Any) -> None:
        signature = dict(enumerate(src.signature.values()))
        self.launch = nvidia.wrap_handle_tensordesc(launch_nothing, signature, metadata.tensordesc_meta)

    def __call__(self, gx: int, gy: int, gz: int, stream: int, function: int, *rest: Any) -> None:
        if TRITON_3_6:
            self.launch(gx, gy, gz, stream, function, False, False, None, None, *rest)
        else:
            self.launch(gx, gy, gz, stream, function, False, False, *rest[:4], None, None, (), b"", rest[4:])


def no_gpu() -> SimpleNamespace:
    """A driver of Triton's for an H200 that launches nothing."""
    properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0, launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024), get_device_properties=lambda _: properties,
            fill_tma_descriptor=lambda *fields: fields, fill_tma_descriptor_tiled=lambda *fields: fields,
        ),
    )  # fmt: skip


def operations() -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    """(name, function, the tensors that it is differentiated by), in bf16; by names that older checkouts have too."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()

    def of(module: str, *names: str) -> Callable[..., Any]:
        found = import_module(f"kernels.{module}")
        return next(getattr(found, name) for name in names if hasattr(found, name))

    x, weights = normal(2, 8, 768), [normal(768), normal(768)]
    positions = torch.arange(8)
    norm, rope = of("norm", "layer_norm"), of("rope", "rope_qkv")
    gelu, nothing = of("gelu", "gelu", "bias_gelu"), () if hasattr(import_module("kernels.gelu"), "gelu") else (None,)
    yield "layer_norm", lambda *t: norm(*t, impl="triton"), [x, *weights]
    add_norm = of("norm", "add_layer_norm")
    yield "add_layer_norm", lambda *t: add_norm(*t, impl="triton"), [x, normal(2, 8, 768), *weights]
    qkv = normal(2, 8, 2304)
    yield "rope_qkv", lambda t: rope(t, positions, n_kv_head=12, head_dim=64, impl="triton"), [qkv]
    yield "gelu", lambda t: gelu(t, *nothing, impl="triton"), [x]
    swiglu = of("swiglu", "swiglu")
    yield "swiglu", lambda t: swiglu(t, impl="triton"), [x]
    attention = of("attention", "attention")
    yield "attention", lambda *t: attention(*t, impl="triton"), [normal(2, 8, 12, 64) for _ in range(3)]
    yield "nothing (a view)", lambda x: x.view(-1), [x]


def measured() -> dict[str, float]:
    """Microseconds of a forward and backward pass, by operation."""
    found = {}
    engine: Any = torch.autograd.Variable._execution_engine
    with (
        patch.object(driver, "_active", no_gpu()),
        patch("kernels.dispatch.why_not_triton", lambda *_: None),
        patch("kernels.attention.tiles.capability", lambda _: 9),
    ):
        for name, function, leaves in operations():
            copies = [[t.detach().clone().requires_grad_() for t in leaves] for _ in range(CALLS)]
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            inputs = tuple(t for copy in copies for t in copy)
            gradients = tuple(torch.ones_like(y) for y in outputs) * CALLS
            least = math.inf
            for _ in range(GRAPHS):
                started = time.process_time_ns()
                results = [function(*copy) for copy in copies]
                flat = tuple(y for result in results for y in (result if isinstance(result, tuple) else (result,)))
                engine.run_backward(flat, gradients, False, False, inputs, True, accumulate_grad=False)
                least = min(least, time.process_time_ns() - started)
            found[name] = least / CALLS / 1000
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.host", description=__doc__)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="one round, in JSON")
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        print(json.dumps(measured()))
        return
    folders = [Path(__file__).parents[2], *([options.beside.resolve()] if options.beside else [])]
    rounds: list[list[dict[str, float]]] = [[] for _ in folders]
    for _ in range(options.rounds):
        for folder, results in zip(folders, rounds, strict=True):
            text = subprocess.run(
                [sys.executable, __file__, "--measure"], check=True, capture_output=True, text=True, cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder)},
            ).stdout  # fmt: skip
            results.append(json.loads(text))
    for name in rounds[0][0]:
        columns = [sorted(result[name] for result in results) for results in rounds]
        shown = [f"{median(us):6.0f} us ({us[0]:.0f} to {us[-1]:.0f})" for us in columns]
        ratio = f"  {median(columns[0]) / median(columns[1]):.2f} of it" if len(columns) > 1 else ""
        print(f"{name:20} {'  beside '.join(shown)}{ratio}")


if __name__ == "__main__":
    main()
