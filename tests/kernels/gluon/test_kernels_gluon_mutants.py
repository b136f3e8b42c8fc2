"""Every fault that a rule can put into the Gluon kernels is found, or is none."""

from __future__ import annotations

from functools import cache

from mutants import helpers, mutants
from trials import Prepared, Trial, mutants_of, prepared, sources

CUTS = (100, 101, 450, 700)
# More tiles than two rounds through the ring, and bounds that fall inside of tiles; the cheap ones first.
TRIALS = {
    kernel: (
        Trial(kernel, 37),
        Trial(kernel, 256, window=1),
        Trial(kernel, 450, H=2, stages=stages),
        Trial(kernel, 400, B=2, H=2, cuts=CUTS, stages=stages),
        Trial(kernel, 900, window=300, stages=stages),
        Trial(kernel, 1500),
    )
    for kernel, stages in (("forward", 2), ("dkdv", 2), ("dq", 3))
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
