"""Models that one process cannot hold: `verify` takes a smaller one of the same family."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llm.config import ModelConfig, RunConfig
from llm.config.checks import fp8_sides
from llm.config.sections import SparseAttention
from llm.errors import InputError
from llm.parity.shrink import _host_bytes, needed_bytes, shrink, smaller
from tiny_run import BASE, case

LARGE = ModelConfig(
    n_layer=48, n_head=48, n_kv_head=8, d_model=48 * 128, d_ff=16512, vocab_size=128_001, max_seq_len=1024,
    norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, dropout=0.1,
)  # fmt: skip


def large(tp: int, **model: Any) -> RunConfig:
    return case(
        model={**vars(LARGE), **model},
        data=dict(seq_len=1024),
        parallel=dict(tensor_parallel=tp, zero_stage=1),
        train=dict(global_batch_size=16, micro_batch_size=1),
    )


def test_what_fits_stays() -> None:
    assert shrink(BASE, 1 << 30, 1) is BASE


@pytest.mark.parametrize("gigabytes", [4, 16, 200])
@pytest.mark.parametrize(
    ("tp", "model"),
    [
        (1, {}),
        (2, {}),
        (8, {}),
        (4, dict(d_ff=None, n_kv_head=None, tie_embeddings=True, bias=True, position="learned", norm="layernorm")),
        (3, dict(n_head=36, n_kv_head=9, d_model=36 * 80, d_ff=10_008)),
    ],
)
def test_a_shrunk_model_is_of_the_same_family(tp: int, model: dict, gigabytes: int) -> None:
    config = large(tp, **model)
    small = shrink(config, gigabytes << 30, 8 * tp)
    before, after = config.model, small.model
    assert needed_bytes(small, 8 * tp) <= gigabytes << 30 < needed_bytes(config, 8 * tp)
    small.check_world(8 * tp)
    for same in ("norm", "activation", "position", "tie_embeddings", "bias", "dropout", "max_seq_len", "rope_theta"):
        assert getattr(after, same) == getattr(before, same)
    assert before.n_head * after.kv_heads == after.n_head * before.kv_heads
    assert after.vocab_size % tp == before.vocab_size % tp
    assert after.ff_dim / after.d_model == pytest.approx(before.ff_dim / before.d_model, rel=0.05)
    assert replace(small, model=before) == config
    sizes = [(m.n_layer, m.vocab_size, m.d_model) for m in (after, before)]
    assert all(a <= b for a, b in zip(*sizes, strict=True)) and sizes[0] != sizes[1]


def test_the_largest_that_fits_is_taken() -> None:
    config = large(2)
    models = list(smaller(config.model, 2))
    needs = [needed_bytes(replace(config, model=model), 4) for model in models]
    assert needs == sorted(needs, reverse=True)
    for i in (0, len(needs) // 2, len(needs) - 1):
        assert shrink(config, math.ceil(needs[i] / 0.8) + 1, 4).model == models[i]


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_shrunk_model_is_one_that_fp8_multiplies(tp: int) -> None:
    config = large(tp)
    config = replace(config, train=replace(config.train, fp8="tensorwise"))
    assert needed_bytes(config, 8 * tp) > needed_bytes(large(tp), 8 * tp), "the oracle without FP8"
    models = list(smaller(config.model, tp))
    refused = {m for m in models if any(side % 16 for side in fp8_sides(m, tp).values())}
    assert len(refused) <= 1, "heads of 8 alone: d_ff is chosen for FP8"
    found = [shrink(config, gigabytes << 30, 8 * tp).model for gigabytes in (16, 64, 200)]
    assert len({*found} - refused) == 3
    with pytest.raises(InputError, match="even for a model of"):
        shrink(config, 1 << 20, 8 * tp)


def test_options_of_attention_survive_and_all_that_alternate() -> None:
    pattern = SparseAttention(64, 1, 2)
    options = dict(attention_window=(100, None, 7), attention_softcap=20.0, attention_sparse=(None, pattern, None))
    models = list(smaller(large(2, **options).model, 2))
    assert [model.n_layer for model in models[:6]] == [24, 12, 6, 3, 3, 3]
    for model in models:
        assert {name: getattr(model, name) for name in options} == options
    two = list(smaller(large(2, attention_window=100).model, 2))[-1]
    assert (two.n_layer, two.attention_window) == (2, 100)


@pytest.mark.parametrize("option", [dict(attention_softcap=9.0), dict(attention_sparse=SparseAttention(64, 1, 2))])
def test_memory_counts_the_scores_that_the_reference_keeps(option: dict[str, Any]) -> None:
    plain, dropout = (needed_bytes(large(1, dropout=p), 4) for p in (0.0, 0.1))
    assert plain == needed_bytes(large(1, dropout=0.0, attention_window=9), 4)
    assert plain < needed_bytes(large(1, dropout=0.0, **option), 4) == dropout


def test_no_room_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="even for a model of"):
        shrink(large(1), 1 << 20, 1)


def test_memory_of_the_host_and_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000 * 1024))
    assert _host_bytes(tmp_path) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, expected in (("max\n", 4000 * 1024), ("50000\n", 49000), ("10\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert _host_bytes(tmp_path) == expected
