"""The kernels compile for GPUs that this machine does not have, and fit their registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def without_interpreter(*command: str, **environment: str) -> str:
    """What a Python command prints: the mode is fixed on import, so compiling takes a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_for(arch: int, only: str, cache: Path) -> list[str]:
    """The report's lines."""
    command = ["-m", "benchmarks.kernels.aot", "--arch", str(arch), "--only", only]
    lines = without_interpreter(*command, TRITON_CACHE_DIR=str(cache)).splitlines()
    return [line for line in lines if not line.startswith("        loop: ")]


def matrix_kernels(lines: list[str]) -> list[str]:
    return [line for line in lines if re.search(r"attention_(forward|dkdv|dq)", line)]


# At the commonest head width: plain, in both ways to load; and everything at once, in the smallest tiles.
COMMON = (
    r"attention_\w+ bf16 .* of B=2 T=528 H=6 D=64 K=2( atomics)?( expanded)?$"
    r"|attention_forward bf16 .* D=64 K=2 documents=3 sparse softcap dropout( expanded)?$"
)


@pytest.mark.parametrize(
    ("arch", "names", "count", "instruction"),
    [
        pytest.param(80, COMMON, 5, "mma.sync", marks=pytest.mark.slow),
        pytest.param(90, COMMON, 10, "wgmma", marks=pytest.mark.slow),
        pytest.param(
            100,
            r"attention_forward bf16 .* of B=2 T=528 H=6 D=64 K=2( expanded)?$",
            2,
            "tcgen05",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_common_kernels_fit(arch: int, names: str, count: int, instruction: str, tmp_path: Path) -> None:
    """No spills, the matrix instructions of the architecture, and bulk copies where the tiles ask for them."""
    lines = compile_for(arch, f"{names}|document_bounds|norm_\\w+ bf16 .* layer_norm .* C=768 bias$", tmp_path)
    attention = matrix_kernels(lines)
    assert len(attention) == count
    assert len(lines) > count + 1
    for line in attention:
        assert instruction in line
        assert (" TMA " in line) == ("cp.async.bulk" in line)
    assert any(" TMA " in line for line in attention) == (arch >= 90)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(lines)


OTHERS = (
    r"^norm_\w+ bf16 .* C=768( bias)?( dropout)?$|^dropout bf16 C=768|^embedding\w+ bf16 C=768"
    r"|^(gelu|swiglu)_\w+ bf16 COLS|^adamw fp32 .*gradient=bfloat16$|^rope bf16 D=64"
    r"|^cross_entropy bf16 .*FORWARD LOSS GRADIENT .* V=2048"
)


@pytest.mark.slow
def test_the_common_others_fit(tmp_path: Path) -> None:
    kernels = {re.split(r"  +", line)[-1].split()[0] for line in compile_for(90, OTHERS, tmp_path)}
    both = {f"{name}_{part}" for name in ("norm", "gelu", "swiglu") for part in ("forward", "backward")}
    assert kernels == both | {
        "dropout", "embedding_pieces", "embedding_joined", "adamw", "rope", "cross_entropy",
    }  # fmt: skip


MATRIX_KERNELS = [f"attention_{name}" for name in ("forward", "dkdv", "dq")]
# Every kernel is in one part, of minutes.
PARTS = [f"^{kernel} {dtype} " for kernel in MATRIX_KERNELS for dtype in ("bf16", "fp16", "fp32")]
PARTS.append(f"^(?!{'|'.join(MATRIX_KERNELS)})")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_fits(arch: int, part: str, tmp_path: Path) -> None:
    lines = compile_for(arch, part, tmp_path)
    assert all("mma" in line for line in matrix_kernels(lines) if " fp32 " not in line)


RECORDED = """
import json, torch
from benchmarks.kernels import activations, attention
from benchmarks.kernels.launches import launches_of
cpu, bf16 = torch.device("cpu"), torch.bfloat16
for arch, case in (
    (90, attention.case(cpu, bf16, attention.Shape(2, 528, 4, 64))),
    (80, attention.case(cpu, bf16, attention.Shape(2, 528, 6, 64, K=2))),
    (90, activations.case(cpu, bf16, activations.gelu, 48, 40, strided=True)),
):
    print(json.dumps([[x.kernel, x.arch, json.loads(x.specialization)] for x in launches_of(case, arch)]))
"""


def test_launches_are_specialised_as_on_a_gpu() -> None:
    """Pointers that are aligned, numbers that 16 divides, numbers that are 1, and descriptors on Hopper alone."""
    hopper, ampere, gelu = map(json.loads, without_interpreter("-c", RECORDED).splitlines())
    for launches, arch in ((hopper, 90), (ampere, 80), (gelu, 90)):
        assert all(target["target"]["arch"] == found == arch for _, found, target in launches)
    assert [kernel for kernel, _, _ in hopper] == [
        "attention_forward_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel",
    ]  # fmt: skip
    signature, constants, aligned = specialised(hopper[0][2])
    assert signature["q_ptr"] == "tensordesc<bf16[1, 1, 128, 64]>" and signature["o_ptr"] == "*bf16"
    assert constants["R"] == 1 and constants["samples_ptr"] is None and "H" not in constants
    assert {"o_ptr", "lse_ptr", "stride_qb", "stride_qt", "stride_qh"} <= aligned and "H" not in aligned
    signature, constants, aligned = specialised(ampere[0][2])
    assert signature["q_ptr"] == "*bf16" and "q_ptr" in aligned
    assert signature["R"] == "i32" and "R" not in constants and constants["TMA"] is False
    signature, _, aligned = specialised(gelu[0][2])
    assert signature["stride_x"] == "i32" and "stride_x" in aligned and "stride_y" not in aligned  # 80 and 40


def specialised(found: dict) -> tuple[dict[str, str], dict[str, object], set[str]]:
    """Types, constants, and the arguments that 16 divides, by name."""
    names = list(found["signature"])
    constants = dict(zip((names[key[0]] for key in found["constant_keys"]), found["constant_vals"], strict=True))
    attributes = zip(found["attrs_keys"], found["attrs_vals"], strict=True)
    return found["signature"], constants, {names[key[0]] for key, value in attributes if value}


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "expected compiled kernels: unset it" in done.stderr
