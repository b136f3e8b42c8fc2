"""train.compile=blocks: the same training, one graph for all blocks of a kind, and never two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from chosen import slow_but
from llm.config import RunConfig
from llm.config.lora import LoRAConfig
from llm.config.reports import ProfileConfig
from llm.config.sections import PhaseChange
from llm.errors import InputError
from llm.model.forms import Forms
from llm.model.fp8 import Quantised
from llm.model.gpt import Block
from llm.parity.compare import GRADIENT
from llm.train import compiled
from llm.train.build import build_model
from llm.train.compiled import CompiledBlocks
from llm.train.contest import candidates
from llm.train.engines.plain import PlainEngine
from llm.train.replay import gradient_sums
from tiny_run import G, T, batches, case, target_count, trajectory

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """The operators of an eager run, as torch.compile has traced them."""
    with patch.object(compiled, "BACKEND", "aot_eager"):
        yield


def engine_of(config: RunConfig, *, compiles: bool = True, forms: Forms | None = None) -> PlainEngine:
    model = build_model(config, None, forms)
    engine = PlainEngine(config, model, None, CPU)
    engine.compiled = CompiledBlocks.of(config, model) if compiles else None
    return engine


def run(config: RunConfig, **options: Any) -> tuple[PlainEngine, dict[str, Any]]:
    engine = engine_of(config, **options)
    return engine, trajectory(engine, config, 0, 1, STEPS, True)


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, share: float = 0.0) -> None:
    """share: of a number, or of the norm of a gradient, by which it may be off."""
    for name in ("losses", "norms", "validation"):
        assert found[name] == pytest.approx(expected[name], rel=share, abs=0), name
    for name, gradient in expected["gradients"].items():
        error = np.linalg.norm(found["gradients"][name] - gradient)
        assert error <= share * np.linalg.norm(gradient), name


def plain(**sections: Any) -> RunConfig:
    sections["train"] = dict(engine="plain", **sections.get("train", {}))
    sections["model"] = dict(n_layer=3, **sections.get("model", {}))
    return case(**sections)


DROPOUT = dict(dropout=0.1)
CASES = {
    "dropout": plain(model=DROPOUT),
    "documents-bf16-selective": plain(
        model=DROPOUT,
        data=dict(document_masks=True),
        train=dict(precision="bf16", activation_checkpointing="selective"),
    ),
    "swiglu-full": plain(
        model=dict(position="learned", norm="rmsnorm", activation="swiglu", bias=False, dropout=0.1),
        train=dict(activation_checkpointing="full"),
    ),
    "packed": plain(model=dict(position="learned", n_kv_head=4)),
    "softcap-fp16": plain(model=dict(attention_softcap=2.0), train=dict(precision="fp16")),
    "reference": plain(model=DROPOUT, train=dict(impl="reference")),
}


# A graph has an RMS norm and SwiGLU as several operators, which eager code has as one each.
EXACT = [name for name in CASES if name != "swiglu-full"]


@pytest.mark.parametrize("name", slow_but(["dropout", "documents-bf16-selective", "swiglu-full"], CASES))
def test_the_same_bits_by_two_graphs(name: str) -> None:
    """Sample numbers, documents and weights differ from step to step, and places of dropout from block to block."""
    config = CASES[name]
    engine, found = run(config)
    assert_same(found, run(config, compiles=False)[1], share=0.0 if name in EXACT else 2e-6)
    blocks = engine.compiled
    assert blocks is not None
    assert [key.training for key in blocks.graphs] == [True, False]
    assert [graph.count for graph in blocks.graphs.values()] == [1, 1]
    other = build_model(config, None)
    assert [*engine.parameters] == [*dict(other.named_parameters())]
    assert [*engine.model.state_dict()] == [*other.state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "swiglu-full"])
def test_kernels_as_operators(name: str) -> None:
    config = replace(CASES[name], train=replace(CASES[name].train, impl="triton"))
    assert_same(run(config)[1], run(config, compiles=False)[1])


def test_kinds_of_blocks_have_graphs_of_their_own() -> None:
    config = plain(
        model=dict(attention_window=(5, None), **DROPOUT),
        train=dict(activation_checkpointing="selective", checkpoint_every=2),
    )
    engine, found = run(config)
    assert_same(found, run(config, compiles=False)[1])
    assert engine.compiled is not None
    kinds = [(key.window, key.recompute) for key in engine.compiled.graphs if key.training]
    assert kinds == [(5, "selective"), (None, "none")]


def phases(engine: PlainEngine, config: RunConfig) -> list[float]:
    """Losses of a step in each phase, in turns, and of the validations between."""
    losses = []
    for step, phase in enumerate(config.phases * 2):
        at = replace(config, data=replace(config.data, seq_len=phase.seq_len, phases=()))
        losses.append(float(engine.forward_backward(batches(at, step, 0, 1, False), G * phase.seq_len)))
        engine.step()
        losses.append(engine.evaluate(batches(config, 99, 0, 1, False))[0])
    return losses


PHASES = plain(model=DROPOUT, data=dict(phases=(PhaseChange(G, seq_len=T // 2),)))


def test_each_phase_has_one_graph_for_training() -> None:
    engine = engine_of(PHASES)
    assert phases(engine, PHASES) == phases(engine_of(PHASES, compiles=False), PHASES)
    assert engine.compiled is not None
    assert [(key.training, key.seq_len) for key in engine.compiled.graphs] == [(True, T), (False, T), (True, T // 2)]
    assert {graph.count for graph in engine.compiled.graphs.values()} == {1}


def test_every_block_runs_in_a_graph() -> None:
    config = plain(train=dict(micro_batch_size=G // 2))
    engine, calls = engine_of(config), 0
    engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))
    assert engine.compiled is not None
    (graph,) = engine.compiled.graphs.values()
    honest = graph.call

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(*inputs)

    graph.call = counted
    engine.forward_backward(batches(config, 1, 0, 1, False), target_count(False))
    assert calls == 2 * config.model.n_layer  # by two micro-batches


def losses(engine: PlainEngine, config: RunConfig) -> list[float]:
    found = []
    for step in range(STEPS):
        found.append(float(engine.forward_backward(batches(config, step, 0, 1, False), target_count(False))))
        engine.step()
    return found


def test_a_block_whose_input_has_no_gradient_has_its_own_graph() -> None:
    """With LoRA the embedding is frozen, so only the first block's input has none."""
    config = replace(plain(train=dict(init_from="any")), lora=LoRAConfig(rank=2))
    engine = engine_of(config)
    assert losses(engine, config) == losses(engine_of(config, compiles=False), config)
    assert engine.compiled is not None
    news = f"training with {T} positions, input without a gradient; training with {T} positions"
    assert (engine.compiled.news() or "").endswith(news)


def test_news_are_told_once() -> None:
    engine = engine_of(plain(model=dict(attention_window=5)))
    assert engine.compiled is not None and engine.compiled.news() is None
    engine.forward_backward(batches(plain(), 0, 0, 1, False), target_count(False))
    news = engine.compiled.news()
    assert news is not None and news.startswith("blocks compiled in ")
    assert news.endswith(f" s: training with {T} positions, window 5")
    assert engine.compiled.news() is None


def test_a_second_graph_is_an_error_that_says_what_changed() -> None:
    config = plain()
    engine = engine_of(config)
    engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))
    engine.evaluate(batches(config, 0, 0, 1, False))  # what has changed since its graph is no news
    wider = replace(config, train=replace(config.train, micro_batch_size=4))
    with pytest.raises(InputError, match=r"found 2 graphs, expected 1; what has changed: .* expected 2, actual 4"):
        engine.forward_backward(batches(wider, 1, 0, 1, False), target_count(False))


def test_a_number_that_changes_is_found() -> None:
    """Without DynamicInt the place of a dropout is a constant of the graph, and the next block has another one."""
    config = plain(model=DROPOUT)
    with patch.object(compiled, "DynamicInt", int):
        engine = engine_of(config)
    with pytest.raises(InputError, match=r"training with 16 positions: found 2 graphs.*what has changed: .*site"):
        engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))


def without_guards() -> Any:
    """torch.compile that never looks whether its constants still hold: stale graphs run."""
    honest = torch.compile
    return patch.object(
        torch, "compile", partial(honest, options={"guard_filter_fn": lambda guards: [False for _ in guards]})
    )


def test_a_stale_graph_gives_other_numbers() -> None:
    """The comparisons above see a place of dropout that was baked into the graph of all blocks."""
    config = plain(model=DROPOUT)
    with patch.object(compiled, "DynamicInt", int), without_guards():
        stale = run(config)[1]
    with pytest.raises(AssertionError):
        assert_same(stale, run(config, compiles=False)[1])


def test_a_length_of_no_phase_is_refused() -> None:
    engine, shorter = engine_of(plain()), plain(data=dict(seq_len=8))
    with pytest.raises(InputError, match=r"found 8 positions, expected those of the run's phases \(16\)"):
        engine.forward_backward(batches(shorter, 0, 0, 1, False), target_count(False))


def test_a_block_that_is_not_compiled_is_found() -> None:
    config = plain()
    engine = engine_of(config)
    with torch.compiler.set_stance("force_eager"), pytest.raises(InputError, match="found 0 graphs, expected 1"):
        engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))


def test_torch_compile_turned_off_is_found() -> None:
    with patch.object(torch._dynamo.config, "disable", True), pytest.raises(InputError, match="TORCH_COMPILE_DISABLE"):
        engine_of(plain())


def test_what_cannot_be_traced_is_told() -> None:
    config = plain()
    engine = engine_of(config)
    with patch.object(Block, "core_attention", lambda self, qkv, *_: qkv.tolist()):
        engine.compiled = CompiledBlocks.of(config, engine.model)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match=r"train\.compile blocks, training with 16 positions: "):
            engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))


def test_a_step_can_be_computed_again() -> None:
    """train.replay_interval puts hooks on the weights."""
    config = plain(model=DROPOUT)
    sums = {}
    for compiles in (True, False):
        engine, data = engine_of(config, compiles=compiles), batches(config, 0, 0, 1, False)
        sums[compiles] = [gradient_sums(engine, data, target_count(False)).tolist() for _ in range(2)]
    assert sums[True] == sums[False] and sums[True][0] == sums[True][1]


def test_attention_by_a_backend_of_pytorch() -> None:
    config = plain(model=dict(n_head=4, n_kv_head=4))
    forms = Forms(attention="flash", deterministic=False)
    assert_same(run(config, forms=forms)[1], run(config, forms=forms, compiles=False)[1])


def test_flash_is_no_candidate_where_it_must_be_deterministic() -> None:
    config = plain(train=dict(precision="bf16"))
    blocks, free = (
        replace(config, train=replace(config.train, compile="blocks", deterministic=x)) for x in (True, False)
    )
    cpu = torch.device("cpu")
    assert "flash" in candidates(config, cpu)["attention"]
    assert "attention" not in candidates(blocks, cpu) and "flash" in candidates(free, cpu)["attention"]


REFUSED = {
    "deepspeed's": (dict(parallel=dict(zero_stage=3)), "use train.engine=fsdp"),
    "lstm": (dict(model=dict(family="lstm", n_head=4, n_kv_head=None, position="learned")), "train.compile=none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    sections, advice = REFUSED[name]
    config = case(**sections)
    with pytest.raises(InputError, match=f"train.compile blocks does not go with .*{advice}"):
        replace(config, train=replace(config.train, compile="blocks"))


def test_a_graph_keeps_activations_in_fp8_and_no_copy_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of weights would outlive a block's forward pass, after which FSDP holds a part of each weight alone."""

    def scaled_mm(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
        return torch._scaled_mm(a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype)

    monkeypatch.setattr("llm.parallel.fp8.product", scaled_mm)  # as on a GPU, where no product takes wider operands
    config = plain(train=dict(fp8="tensorwise", precision="bf16"))
    engine, kept = engine_of(config), list[torch.Tensor]()
    micro_batch = batches(config, 0, 0, 1, True)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        engine.forward_backward([micro_batch], target_count(True))
    model = config.model
    in_fp8 = [tensor.numel() for tensor in kept if tensor.itemsize == 1 and tensor.is_floating_point()]
    widths = sorted(3 * [model.d_model] + [model.ff_dim]) * model.n_layer
    assert sorted(in_fp8) == sorted(micro_batch.tokens.numel() * width for width in widths)


def test_no_profile_of_what_is_inside_of_a_graph() -> None:
    with pytest.raises(InputError, match=r"train\.compile blocks does not go with profile\.steps"):
        replace(case(train=dict(compile="blocks")), profile=ProfileConfig(steps=(2, 3)))


# -- By Inductor, which rounds less often than eager code, and adds in another order --

LOW = 2e-2  # of a gradient in 16 bits; tests/parity has bounds that follow from the precision


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor_trains_the_same(name: str) -> None:
    config = CASES[name]
    with patch.object(compiled, "BACKEND", "inductor"):
        engine, found = run(config)
    assert engine.compiled is not None and len(engine.compiled.graphs) == 2
    low = config.train.precision != "fp32"
    assert_same(found, run(config, compiles=False)[1], share=LOW if low else GRADIENT)
