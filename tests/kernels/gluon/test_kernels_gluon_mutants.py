"""Every fault that a rule can put into the Gluon kernels is found, or is none."""

from __future__ import annotations

import re
from functools import cache, partial

import pytest

from mutants import Mutant, helpers, mutants
from trials import MODULES, Prepared, Trial, mutants_of, prepared, sources, survivors

CUTS = (100, 101, 450, 700)
# More tiles than two rounds through the ring, bounds inside of tiles and at their ends, and the least ring.
TRIALS = {
    kernel: (
        Trial(kernel, 37),
        Trial(kernel, 65),
        Trial(kernel, 256, window=1),
        Trial(kernel, 448, H=2, stages=least),
        Trial(kernel, 400, B=2, H=2, cuts=CUTS, stages=least + 1),
        Trial(kernel, 900, window=300, stages=least + 1),
        Trial(kernel, 1500),
    )
    for kernel, least in (("forward", 1), ("dkdv", 1), ("dq", 3))
}
SEEDS = 3
TOY = """
@gluon.jit
def kernel(x_s, full, n):
    for i in range(n):
        mbarrier.wait(full.index(i % 2), i // 2 & 1, pred=i < n - 1)
        acc, p = warpgroup_mma_wait(1, deps=(acc, p))
        fence_async_shared()
"""
MADE = [
    ("no wait", "pass"),
    ("phase flipped", "mbarrier.wait(full.index(i % 2), i // 2 & 1 ^ 1, pred=i < n - 1)"),
    ("stage shifted", "mbarrier.wait(full.index((i % 2 + 1) % full.shape[0]), i // 2 & 1, pred=i < n - 1)"),
    ("no pred", "mbarrier.wait(full.index(i % 2), i // 2 & 1)"),
    ("comparison changed", "mbarrier.wait(full.index(i % 2), i // 2 & 1, pred=i <= n - 1)"),
    ("one dropped", "mbarrier.wait(full.index(i % 2), i // 2 & 1, pred=i < n)"),
    ("weaker wait for products", "acc, p = warpgroup_mma_wait(1 + 1, deps=(acc, p))"),
    ("no wait for products", "acc, p = (acc, p)"),
    ("dependency dropped", "acc = warpgroup_mma_wait(1, deps=(acc,))"),
    ("dependency dropped", "p = warpgroup_mma_wait(1, deps=(p,))"),
    ("no fence_async_shared", "pass"),
    ("bound moved", "range(n + 1)"),
    ("bound moved", "range(n - 1)"),
]


def test_each_rule_makes_its_mutants() -> None:
    made = list(mutants(TOY, {}))
    assert {(mutant.kind, mutant.after) for mutant in made} >= set(MADE)
    assert sum(mutant.kind == "neighbours swapped" for mutant in made) == 2
    assert len({mutant.source for mutant in made}) == len(made)


def test_calls_of_functions_that_synchronise_are_changed_as_well() -> None:
    assert set(helpers(*sources().values())) >= {"await_tile", "release"}
    kinds = {mutant.kind for mutant in mutants_of("forward")}
    assert {"no await_tile", "no release", "argument moved", "no pred"} <= kinds


@cache
def kept(trial: Trial) -> Prepared:
    return prepared(trial)


# Mutants that are right programs: (rule, what the mutant is like, why). Only these may go unfound.
A_WAIT = r"([\w, ]+ = )?(mbarrier\.wait|await_tile|warpgroup_mma_wait)\(.*\)"
RIGHT = (
    ("neighbours swapped", r"expect\(.*copy_global", "the phase cannot end before the bytes are expected"),
    ("stage shifted", r"produce: mbarrier.expect\(k?[qv]_full.index\(c\)", "a loop expects both barriers' equal bytes"),
    ("neighbours swapped", f": {A_WAIT}; {A_WAIT} -> ", "two waits"),
    ("neighbours swapped", r"warpgroup_mma_wait\(\d, .*turn", "turns order the consumers' products, not memory"),
    ("dependency dropped", r"deps=\(acc, p, weights\)\) -> acc, p =", "`weights` only keep the compiler's order"),
    ("dependency dropped", r"deps=\(dq, ds, ds16\)\) -> ds, ds16 =", "the sums are waited for after the loop"),
    ("dependency dropped", r"deps=\(dq, ds, ds16\)\) -> dq, ds16 =", "`ds` only keeps the compiler's order"),
    ("one dropped", r"(partial|full) = |seen_by: far -= ", "a tile is masked that need not be"),
    ("bound moved", r"seen_by: far -= .*\+ 1$", "a tile is masked that need not be"),
    ("comparison (changed|dropped)", r"partial (\|)?= ", "a tile is masked that need not be"),
    ("comparison (changed|dropped)", r"consume: row > -M ", "a tile is computed of which no query sees a key"),
    ("bound moved", r"gluon_forward_kernel: last = .*\+ 1$", "one more tile, of which no query sees a key"),
    ("bound moved", r"gluon_forward_kernel: n -= .* - 1$", "one more tile, of which no query sees a key"),
    ("one dropped", r"gluon_forward_kernel: last = ", "one more tile, of which no query sees a key"),
)


def why_right(mutant: Mutant) -> str:
    found = (why for kind, like, why in RIGHT if re.fullmatch(kind, mutant.kind) and re.search(like, str(mutant)))
    return next(found, "")


def check(name: str, chosen: list[Mutant]) -> None:
    """Every chosen mutant of a module is found, unless it is a right program."""
    trials = [partial(kept, trial) for kernel in TRIALS for trial in TRIALS[kernel] if name in (kernel, "parts")]
    wrong = [mutant for mutant in chosen if not why_right(mutant)]
    missed = [str(mutant) for mutant, found in survivors(name, wrong, trials, SEEDS) if not found]
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("name", MODULES)
def test_some_mutants_are_found(name: str) -> None:
    check(name, mutants_of(name)[5::50])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", MODULES)
def test_all_mutants_are_found(name: str, part: int) -> None:
    check(name, mutants_of(name)[part::4])


def test_the_kernels_are_right_where_their_mutants_are_tried() -> None:
    for kernel in TRIALS:
        assert not [fault for trial in TRIALS[kernel][:4] if (fault := kept(trial).fault(0))]
    for name in MODULES:
        right = [mutant for mutant in mutants_of(name) if why_right(mutant)]
        assert len(right) < 0.15 * len(mutants_of(name)), right
