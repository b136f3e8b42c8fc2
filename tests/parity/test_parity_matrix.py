"""No layout changes the result: a pairwise sample of all layouts passes `verify` (`make test-all`: every triple)."""

from __future__ import annotations

from itertools import combinations

import pytest

from chosen import slow_but
from llm.config.sections import SparseAttention
from llm.errors import InputError
from matrix import (
    DEEPSPEED,
    FSDP,
    IMPOSSIBLE,
    Case,
    config_of,
    met,
    name_of,
    possible,
    sample,
    verified,
    world_size,
)
from pool import RankPool
from tiny_run import case

pytestmark = pytest.mark.ranks

POOLS = {1: "one_rank", 2: "two_ranks", 4: "four_ranks"}
ZERO_0_BF16 = frozenset({("zero", 0), ("precision", "bf16")})
ZERO_3_COMPILED = frozenset({("zero", 3), ("compile", "blocks")})
ROWWISE = [("fp8", "rowwise"), ("fp8", "rowwise-high")]  # in bf16 alone


def never(axes: dict) -> set[frozenset]:
    """The pairs of options that no case has."""
    rowwise_fp32 = {frozenset({fp8, ("precision", "fp32")}) for fp8 in ROWWISE}
    if axes is FSDP:
        return rowwise_fp32
    return rowwise_fp32 | {ZERO_0_BF16, ZERO_3_COMPILED, *(frozenset({fp8, ("zero", 0)}) for fp8 in ROWWISE)}


def by_world(cases: list[Case]) -> list[Case]:
    return sorted(cases, key=world_size)


def covering(cases: list[Case]) -> list[Case]:
    """A few of the cases, in which every option is met that any of them has."""
    kept: list[Case] = []
    missing = set().union(*(met(chosen, 1) for chosen in cases))
    while missing:
        kept.append(max(cases, key=lambda chosen: len(met(chosen, 1) & missing)))
        missing -= met(kept[-1], 1)
    return kept


PAIRS = by_world(sample(DEEPSPEED, 2) + sample(FSDP, 2))
FAST = covering(PAIRS)[::2]
TRIPLES = by_world([c for c in sample(DEEPSPEED, 3) + sample(FSDP, 3) if c not in PAIRS])


def check(chosen: Case, request: pytest.FixtureRequest) -> None:
    reports = request.getfixturevalue(POOLS[world_size(chosen)]).run(verified, config_of(chosen))
    assert reports[0].failures == []
    assert all(report.passed for report in reports)


@pytest.mark.parametrize("chosen", slow_but(FAST, PAIRS), ids=name_of)
def test_pairs(chosen: Case, request: pytest.FixtureRequest) -> None:
    check(chosen, request)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", TRIPLES, ids=name_of)
def test_triples(chosen: Case, request: pytest.FixtureRequest) -> None:
    check(chosen, request)


WINDOWS = dict(attention_window=(5, None), attention_softcap=2.0, dropout=0.1)
SPARSE = dict(attention_sparse=(None, SparseAttention(64, 1, 2)), max_seq_len=192, dropout=0.1)
# Layouts that cut heads or sequences, recompute attention, or gather its weights: not an axis, for the options pass
# through one call that every layout shares.
ATTENTION = {
    "windows-tp2-sp-selective": dict(
        model=WINDOWS,
        parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=1),
        train=dict(activation_checkpointing="selective"),
    ),
    "sparse-tp2-sp-full": dict(
        model=SPARSE,
        data=dict(seq_len=192),
        parallel=dict(tensor_parallel=2, sequence_parallel=True),
        train=dict(activation_checkpointing="full"),
    ),
    "windows-zero3": dict(model=WINDOWS, data=dict(document_masks=True), parallel=dict(zero_stage=3)),
    "sparse-zero2": dict(model=SPARSE, data=dict(seq_len=192), parallel=dict(zero_stage=2)),
    "windows-fsdp": dict(
        model=WINDOWS,
        parallel=dict(zero_stage=3),
        train=dict(engine="fsdp", activation_checkpointing="selective"),
    ),
}


@pytest.mark.parametrize("name", slow_but(["windows-tp2-sp-selective"], ATTENTION))
def test_attention_options(name: str, two_ranks: RankPool) -> None:
    reports = two_ranks.run(verified, case(**ATTENTION[name]))
    assert reports[0].failures == []
    assert all(report.passed for report in reports)


def every(axes: dict, strength: int) -> set[frozenset]:
    """All sets of `strength` options of different axes, possible or not, the slow way."""
    options = [(name, option) for name in axes for option in axes[name]]
    return {frozenset(some) for some in combinations(options, strength) if len({name for name, _ in some}) == strength}


@pytest.mark.parametrize("axes", [DEEPSPEED, FSDP], ids=["deepspeed", "fsdp"])
def test_every_pair_meets(axes: dict) -> None:
    seen = set().union(*(met(chosen, 2) for chosen in PAIRS if chosen["engine"] in axes["engine"]))
    assert every(axes, 2) - seen == never(axes)


@pytest.mark.parametrize("axes", [DEEPSPEED, FSDP], ids=["deepspeed", "fsdp"])
def test_every_triple_meets(axes: dict) -> None:
    seen = set().union(*(met(chosen, 3) for chosen in PAIRS + TRIPLES if chosen["engine"] in axes["engine"]))
    unmet = every(axes, 3) - seen
    assert {options for options in unmet if not any(options >= pair for pair in never(axes))} == set()


@pytest.mark.parametrize("impossible", IMPOSSIBLE.items(), ids=lambda item: item[1])
def test_what_cannot_be_is_refused(impossible: tuple[frozenset, str]) -> None:
    chosen = {name: options[0] for name, options in DEEPSPEED.items()} | dict(impossible[0])
    assert not possible(frozenset(chosen.items()))
    with pytest.raises(InputError, match=r"would accumulate gradients|gathers weights within a block|gives bf16"):
        config_of(chosen)
