"""Faults that DeepSpeed has had, each with a test that the pinned version passes and the fault would fail.

| upstream     | fault                                                                 | test                         |
|--------------|-----------------------------------------------------------------------|------------------------------|
| #7985        | ZeRO 1, bf16: the last micro-batch is left out of the reduction       | bf16_gradients_are_fp32_sums |
| #1800        | bf16 gradients accumulate in bf16: the error grows with micro-batches | bf16_gradients_are_fp32_sums |
| #7837, #7839 | ZeRO 0, bf16: gradients are divided by 65536 and never zeroed         | bf16_without_zero_is_refused |
|              |                                                                       | gradients_start_from_zero    |
| #8224        | ZeRO 2, bf16: wrong gradients of a module that a step uses twice      | a_block_that_is_used_twice   |
| #1488        | losses of ZeRO 0 to 3 differ under gradient accumulation              | losses_of_all_stages_agree   |
| #5411, #7220 | tensor parallel: the gradient norm counts replicated weights tp times | the_norm_under_tensor_...    |

test_the_fault_would_be_seen puts each into the ranks and shows that the comparison fails.

Gradients are those of a second step at the initial weights (the first has a learning rate of 0), so that what a first
step leaves behind is seen. In bf16 they are compared with the fp32 sum of the same micro-batches' gradients, which the
plain engine computes: dp / target_count is a power of two here, so that every summand is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from chosen import slow_but
from llm.config import RunConfig
from llm.errors import InputError
from llm.model.gpt import GPT
from llm.model.init import InitialWeights
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.train.engines.base import Engine
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from tiny_run import G, batches, case, plain, target_count

CPU = torch.device("cpu")


def model_of(config: RunConfig, mesh: Mesh | None, twice: bool, device: str) -> GPT:
    """The model without values; twice: its second block is the first again."""
    with torch.device(device):
        model = GPT(config.model, choose_layers(config, mesh))
    if twice:
        model.blocks["1"] = model.blocks["0"]
    return model


def two_steps(engine: Engine, config: RunConfig, dp_rank: int, dp_size: int, ragged: bool) -> dict[str, Any]:
    """Losses and norms of two steps that change no weight, and the gradients of the second."""
    engine.load_pieces(InitialWeights(config.model, config.seed), 0)
    engine.set_lr(0.0)
    losses, norms, gradients = [], [], {}
    for step in range(2):
        data = batches(config, step, dp_rank, dp_size, ragged)
        losses.append(float(engine.forward_backward(data, target_count(ragged))))
        gradients = {name: engine.gradient(name).clone().numpy() for name in engine.parameters}
        norms.append(float(engine.step().grad_norm))
    return {"losses": losses, "norms": norms, "gradients": gradients}


def on_ranks(config: RunConfig, twice: bool = False, ragged: bool = False, fault: str = "") -> dict[str, Any]:
    from llm.train.engines.deepspeed import DeepSpeedEngine

    mesh = Mesh.create(config.parallel, "cpu")
    with FAULTS[fault][0]() if fault else nullcontext():
        model = model_of(config, mesh, twice, "meta" if config.parallel.zero_stage == 3 else "cpu")
        if fault == "#8224":
            model.blocks["1"] = Unlearning(model.blocks["0"])
        if fault in MARKS:
            for parameter in model.parameters():
                parameter.tensor_model_parallel = MARKS[fault]  # pyright: ignore[reportAttributeAccessIssue]
        engine = DeepSpeedEngine(config, model, mesh, CPU)
        result = two_steps(engine, config, mesh.dp_rank, mesh.dp_size, ragged)
        engine.close()
    return result


def oracle(config: RunConfig, twice: bool = False, ragged: bool = False) -> dict[str, Any]:
    """The same by the plain engine on one process, with the same micro-batches."""
    config = plain(config)
    engine = PlainEngine(config, model_of(config, None, twice, "cpu"), None, CPU)
    return two_steps(engine, config, 0, 1, ragged)


def check(results: list[dict[str, Any]], expected: dict[str, Any], bound: float) -> None:
    """Losses, norms and gradients are the oracle's, to ‖Δ‖ <= bound ‖g‖ + 1e-7 ‖g_all‖."""
    got = results[0]
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], atol=1e-6, err_msg="losses")
        np.testing.assert_allclose(result["norms"], expected["norms"], rtol=bound, err_msg="norms")
    everything = np.sqrt(sum(float((g**2).sum()) for g in expected["gradients"].values()))
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, reference in expected["gradients"].items():
        error = np.linalg.norm(got["gradients"][name] - reference)
        limit = bound * np.linalg.norm(reference) + 1e-7 * everything
        assert error <= limit, f"gradient of {name}: error {error:.2e}, bound {limit:.2e}"


def bf16(stage: int, offload: str = "none", micro_batch_size: int = 1) -> RunConfig:
    return case(
        parallel=dict(zero_stage=stage, offload=offload),
        train=dict(precision="bf16", micro_batch_size=micro_batch_size),
    )


def fp32(stage: int, tensor_parallel: int = 1) -> RunConfig:
    return case(
        parallel=dict(zero_stage=stage, tensor_parallel=tensor_parallel),
        train=dict(micro_batch_size=1),
        optim=dict(grad_clip=0.01),
    )


STAGES = [(1, "none"), (1, "optimizer"), (2, "none"), (3, "none"), (3, "all")]


@pytest.mark.parametrize("micro_batch_size", slow_but([1], [1, 4]))
@pytest.mark.parametrize(("stage", "offload"), slow_but([(1, "none"), (3, "all")], STAGES, several=True))
def test_bf16_gradients_are_fp32_sums(stage: int, offload: str, micro_batch_size: int, two_ranks: RankPool) -> None:
    """Of 2 micro-batches or of 8: each is rounded to bf16 once, and their sum not at all."""
    config = bf16(stage, offload, micro_batch_size)
    check(two_ranks.run(on_ranks, config), oracle(config), bound=1e-6)


@pytest.mark.parametrize("stage", slow_but([0, 2], range(4)))
def test_gradients_start_from_zero(stage: int, two_ranks: RankPool) -> None:
    check(two_ranks.run(on_ranks, fp32(stage)), oracle(fp32(stage)), bound=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_bf16_without_zero_is_refused(precision: str) -> None:
    with pytest.raises(InputError, match=f"{precision} with parallel.zero_stage 0: .*; use parallel.zero_stage=1"):
        case(parallel=dict(zero_stage=0), train=dict(precision=precision))


TWICE = [(1, "bf16"), (2, "bf16"), (3, "bf16"), (2, "fp32"), (3, "fp32")]


@pytest.mark.parametrize("tied", slow_but([True], [True, False]))
@pytest.mark.parametrize(("stage", "precision"), slow_but([(2, "bf16"), (3, "fp32")], TWICE, several=True))
def test_a_block_that_is_used_twice(stage: int, precision: str, tied: bool, two_ranks: RankPool) -> None:
    config = case(
        parallel=dict(zero_stage=stage),
        model=dict(tie_embeddings=tied),
        train=dict(precision=precision, micro_batch_size=1),
    )
    bound = 1e-6 if precision == "bf16" else 1e-5
    check(two_ranks.run(on_ranks, config, True), oracle(config, True), bound)


def test_losses_of_all_stages_agree(two_ranks: RankPool) -> None:
    """With accumulation and unequal counts of targets; the gradients too."""
    expected = oracle(fp32(0), ragged=True)
    results = [two_ranks.run(on_ranks, fp32(stage), False, True) for stage in range(4)]
    for result in results:
        check(result, expected, bound=1e-5)
        np.testing.assert_allclose(result[0]["losses"], results[0][0]["losses"], atol=2e-7)


@pytest.mark.parametrize("stage", slow_but([0, 3], range(4)))
def test_the_norm_under_tensor_parallel(stage: int, two_ranks: RankPool) -> None:
    config = fp32(stage, tensor_parallel=2)
    check(two_ranks.run(on_ranks, config), oracle(config), bound=1e-5)


@pytest.mark.parametrize(("stage", "offload"), slow_but([(1, "optimizer"), (3, "none")], STAGES, several=True))
def test_the_norm_under_tensor_parallel_in_bf16(stage: int, offload: str, two_ranks: RankPool) -> None:
    """The norm is that of the gradients that the engine reports, each element once."""
    config = case(
        parallel=dict(zero_stage=stage, tensor_parallel=2, offload=offload),
        train=dict(precision="bf16", micro_batch_size=2),
    )
    for result in two_ranks.run(on_ranks, config):
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in result["gradients"].values()))
        assert result["norms"][1] == pytest.approx(norm, rel=1e-6)


# The faults, emulated. The ranks of a pool live on: whatever is replaced is put back.


class Unlearning(nn.Module):
    """A block whose use does not reach its weights' gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # not a child, whose parameters would count twice
        self.recompute = "none"

    def forward(self, *inputs: Any) -> Any:
        weights = {name: p.detach() for name, p in self.block[0].named_parameters()}
        return torch.func.functional_call(self.block[0], weights, inputs)


MARKS = {"#5411": True, "no marks": False}
"""What every parameter's tensor_model_parallel is set to."""


@contextmanager
def reduced_before_the_last_micro_batch() -> Iterator[None]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    def epilogue(self: Any) -> None:
        self._stop_timers(self.engine_timers.backward_inner_timers)
        self._start_timers(self.engine_timers.backward_reduce_timers)
        self.allreduce_gradients()
        self.optimizer.backward_epilogue()
        self.optimizer.exit_backward()
        self._stop_timers(self.engine_timers.backward_reduce_timers)
        self._stop_timers(self.engine_timers.backward_timers)

    with patch.object(DeepSpeedEngine, "_backward_epilogue", epilogue):
        yield


@contextmanager
def accumulated_in_bf16() -> Iterator[None]:
    import llm.train.engines.deepspeed as engine

    generate = engine.deepspeed_config

    def without_fp32(*args: Any, **kwargs: Any) -> dict[str, Any]:
        removed = ("data_types", "communication_data_type")
        return {key: value for key, value in generate(*args, **kwargs).items() if key not in removed}

    with patch.object(engine, "deepspeed_config", without_fp32):
        yield


@contextmanager
def gradients_kept() -> Iterator[None]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    with patch.object(DeepSpeedEngine, "zero_grad", lambda self: None):
        yield


@contextmanager
def divided_by_the_accumulation() -> Iterator[None]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward

    def scaled(self: Any, loss: Any, scale_wrt_gas: bool) -> Any:
        return backward(self, loss, scale_wrt_gas=True)

    with patch.object(DeepSpeedEngine, "backward", scaled):
        yield


Fault = tuple[Callable[[], Any], RunConfig, float, str]

FAULTS: dict[str, Fault] = {
    "#7985": (reduced_before_the_last_micro_batch, bf16(1), 1e-6, "norms|gradient of"),
    "#1800 ZeRO 1": (accumulated_in_bf16, bf16(1), 1e-6, "norms|gradient of"),
    "#1800 ZeRO 2": (accumulated_in_bf16, bf16(2), 1e-6, "norms|gradient of"),
    "#1800 ZeRO 3": (accumulated_in_bf16, bf16(3), 1e-6, "norms|gradient of"),
    "#7839": (gradients_kept, fp32(0), 1e-5, "norms|gradient of"),
    "#8224": (nullcontext, bf16(2), 1e-6, "norms|gradient of"),
    "#1488": (divided_by_the_accumulation, fp32(2), 1e-5, "norms"),
    "#5411": (nullcontext, fp32(1, tensor_parallel=2), 1e-5, "norms"),
    "no marks": (nullcontext, fp32(1, tensor_parallel=2), 1e-5, "norms"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_would_be_seen(fault: str, two_ranks: RankPool) -> None:
    _, config, bound, seen = FAULTS[fault]
    twice = fault == "#8224"
    results = two_ranks.run(on_ranks, config, twice, False, fault)
    with pytest.raises(AssertionError, match=seen):
        check(results, oracle(config, twice), bound)


def test_no_fault_is_left_in_the_ranks(two_ranks: RankPool) -> None:
    assert G == 8
    check(two_ranks.run(on_ranks, bf16(1)), oracle(bf16(1)), bound=1e-6)
