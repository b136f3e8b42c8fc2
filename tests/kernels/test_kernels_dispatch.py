"""Which form runs, and what a refusal says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.attention import attention
from kernels.dispatch import KernelError, choose
from kernels.philox import DropoutKey

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "no_triton", "no_torch", "expected"),
    [
        (CPU, torch.float32, None, None, "torch"),
        (CPU, torch.float32, None, "no", "reference"),
        (GPU, torch.bfloat16, None, "no", "triton"),
        (GPU, torch.float64, None, None, "torch"),
        (GPU, torch.float64, None, "no", "reference"),
        (GPU, torch.bfloat16, "no", None, "torch"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
    no_triton: str | None,
    no_torch: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    form = choose("auto", "attention", device=device, dtype=dtype, no_triton=no_triton, no_torch=no_torch)
    assert form == expected


def test_an_old_gpu_takes_the_stock_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    what = {"device": GPU, "dtype": torch.float16}
    assert choose("auto", "attention", **what) == "torch"
    with pytest.raises(KernelError, match=r"found a GPU of compute capability 7\.5, expected at least 8\.0"):
        choose("triton", "attention", **what)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(KernelError, match="found 'cuda', expected one of auto, triton"):
        choose("cuda", "attention", device=CPU, dtype=torch.float32)


def test_stock_attention_refuses_dropout() -> None:
    key = DropoutKey(0.1, 0, 0)
    with pytest.raises(KernelError, match=r"found dropout 0\.1, expected 0.*use impl=auto"):
        attention(*[torch.zeros(1, 2, 1, 4)] * 3, dropout=key, samples=torch.zeros(1, dtype=torch.int64), impl="torch")


def test_triton_on_a_cpu_without_the_interpreter_is_refused() -> None:
    code = """
import torch
from kernels.norm import layer_norm
layer_norm(torch.zeros(2, 4), torch.ones(4), None, impl="triton")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "found tensors on 'cpu', expected 'cuda': use impl=auto" in done.stderr


def test_the_package_imports_neither_torch_nor_triton() -> None:
    code = "import sys, kernels; assert not {'torch', 'triton'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
