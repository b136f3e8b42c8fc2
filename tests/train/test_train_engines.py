"""What parity does not show: that ZeRO partitions, that fp16 skips and recovers, that groups decay as they should."""

from __future__ import annotations

import math

import pytest
import torch

from chosen import slow_but
from llm.config import RunConfig
from llm.config.sections import SparseAttention
from llm.errors import InputError
from llm.model.fp8 import E4M3, E5M2, Quantised, product
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, build_model
from llm.train.checks import check_kernels, try_fp8
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from tiny_run import BASE, batches, case, plain, target_count

CPU = torch.device("cpu")


def resident_elements(config: RunConfig) -> tuple[int, int]:
    """Elements of parameters and of optimizer state that this rank holds after a step."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    engine.forward_backward(batches(config, 0, mesh.dp_rank, mesh.dp_size, False), target_count(False))
    engine.step()
    parameters = sum(p.numel() for p in engine.parameters.values())  # pyright: ignore
    state = sum(piece.data.numel() for piece in engine.state_pieces() if piece.kind == "exp_avg")
    engine.close()
    return parameters, state


def test_zero_partitions(two_ranks: RankPool) -> None:
    total = sum(p.numel() for p in build_model(case(), None).parameters())
    for stage in (1, 2):
        found = two_ranks.run(resident_elements, case(parallel=dict(zero_stage=stage)))
        assert [parameters for parameters, _ in found] == [total, total]
        assert sum(state for _, state in found) == total
        assert abs(found[0][1] - total / 2) < 0.02 * total
    found = two_ranks.run(resident_elements, case(parallel=dict(zero_stage=3)))
    assert [parameters for parameters, _ in found] == [0, 0], "parameters are gathered when used alone"
    assert sum(state for _, state in found) == total


def fp16_engine(**optim) -> tuple[PlainEngine, RunConfig]:
    config = plain(case(train=dict(precision="fp16", engine="plain"), optim=optim), micro_batch_size=8)
    return PlainEngine(config, build_model(config, None), None, CPU), config


def test_fp16_skips_an_overflow_and_goes_on() -> None:
    engine, config = fp16_engine()
    assert engine.scale is not None
    before = {name: master.detach().clone() for name, master in engine.masters.items()}
    engine.scale = type(engine.scale)(scale=2.0**40)
    skipped = 0
    for step in range(60):
        engine.forward_backward(batches(config, step, 0, 1, False), target_count(False))
        if not engine.step().skipped:
            break
        skipped += 1
        assert all(torch.equal(before[name], master) for name, master in engine.masters.items())
    assert 1 < skipped < 59
    assert engine.updates == 1 and engine.scalar_state()["loss_scale"]["scale"] < 2.0**40
    assert not all(torch.equal(before[name], master) for name, master in engine.masters.items())


def test_fp16_follows_fp32() -> None:
    low, config = fp16_engine()
    exact = PlainEngine(plain(BASE, micro_batch_size=8), build_model(BASE, None), None, CPU)
    for step in range(4):
        data = batches(config, step, 0, 1, False)
        losses = [float(engine.forward_backward(data, target_count(False))) for engine in (low, exact)]
        assert abs(losses[0] - losses[1]) < 5e-3
        assert float(low.step().grad_norm) == pytest.approx(float(exact.step().grad_norm), rel=2e-2)


def test_kernels_are_named() -> None:
    llama = case(model=dict(norm="rmsnorm", activation="swiglu", position="rope"))
    assert check_kernels(llama, CPU) == "torch: attention, embedding, rope, rms_norm, swiglu, cross_entropy"
    gpt2 = case(model=dict(norm="layernorm", activation="gelu", position="learned", dropout=0.1))
    assert check_kernels(gpt2, CPU) == (
        "reference: attention; torch: embedding, layer_norm, dropout, gelu, cross_entropy"
    )


def test_a_kernel_that_lacks_an_option_of_attention_is_refused() -> None:
    windows, strided = dict(attention_window=(4, None)), SparseAttention(64, 1, 2)
    for impl in ("auto", "torch"):
        assert check_kernels(case(model=windows, train=dict(impl=impl)), CPU).startswith("torch: attention")
    for option, found in (
        (dict(attention_softcap=5.0), "softcap"),
        (dict(attention_sparse=(None, strided)), "a block-sparse pattern"),
    ):
        assert check_kernels(case(model=option), CPU).startswith("reference: attention;")
        with pytest.raises(InputError, match=f"train.impl: attention with impl=torch: found {found}"):
            check_kernels(case(model=option, train=dict(impl="torch")), CPU)
    with pytest.raises(InputError, match="attention with impl=gluon: found tensors on 'cpu', expected them on"):
        check_kernels(case(train=dict(impl="gluon")), CPU)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    gpu, config = torch.device("cuda"), case(train=dict(fp8="tensorwise"))
    capability = (8, 0)
    with pytest.raises(InputError, match=r"capability 8\.9 or more.*A100-SXM4-80GB has 8\.0: use train\.fp8=none"):
        check_kernels(config, gpu)
    tried: list[torch.device] = []
    monkeypatch.setattr("llm.train.checks.try_fp8", lambda config, device: tried.append(device))
    check_kernels(case(), gpu)
    capability = (8, 9)
    check_kernels(config, gpu)
    assert tried == [gpu]


@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_a_gpu_whose_libraries_lack_a_product_is_refused(
    fp8: str, form: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case(parallel=dict(zero_stage=1), train=dict(fp8=fp8, precision="bf16"))
    try_fp8(config, CPU)

    def lacking(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
        if a.values.dtype == form:
            assert a.scale.dim() == b.scale.dim() == (2 if fp8 == "rowwise" else 0)
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return product(a, b, dtype)

    monkeypatch.setattr("llm.train.checks.product", lacking)
    words = rf"train.fp8 {fp8}: PyTorch .* multiply {form} .*NOT_SUPPORTED; use another train.fp8, or none$"
    with pytest.raises(InputError, match=words):
        try_fp8(config, CPU)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise"])
def test_what_is_not_finite_passes_fp8_and_is_refused(fp8: str, bad: float) -> None:
    config = plain(case(parallel=dict(zero_stage=1), train=dict(fp8=fp8, precision="bf16")), micro_batch_size=8)
    engine = PlainEngine(config, build_model(config, None), None, CPU)

    def spoil(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(output.numel()).view(output.shape) == 5, bad, output)

    engine.model.blocks["0"].norm_1.register_forward_hook(spoil)
    loss = engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))
    assert not math.isfinite(loss) and engine.step().left_out and engine.updates == 0


def poison(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    output.register_hook(lambda grad: grad * float("nan"))


def poisoned_step(config: RunConfig) -> tuple[float, bool]:
    """A step whose loss is finite but one of whose gradients, on one rank, is not."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    if mesh.rank == 1:
        engine.model.norm.register_forward_hook(poison)
    loss = engine.forward_backward(batches(config, 0, mesh.dp_rank, mesh.dp_size, False), target_count(False))
    assert math.isfinite(loss)
    norm, skipped, left_out = engine.step()
    assert left_out and engine.updates == 0
    engine.close()
    return float(norm), bool(skipped)


@pytest.mark.parametrize("stage", slow_but([0, 2], range(4)))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lost_gradient_is_not_skipped_in_silence(stage: int, precision: str, two_ranks: RankPool) -> None:
    if (stage, precision) == (0, "bf16"):
        return  # refused by the config
    config = case(parallel=dict(zero_stage=stage), train=dict(precision=precision))
    for norm, skipped in two_ranks.run(poisoned_step, config):
        assert not math.isfinite(norm)
        assert not skipped
