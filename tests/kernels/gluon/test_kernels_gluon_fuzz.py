"""Random shapes, masks and schedules: the Gluon kernels' numbers are right and the emulator finds nothing."""

from __future__ import annotations

import time

import pytest

from trials import Trial, drawn, prepared

KERNELS = ("forward", "dkdv", "dq")
SECONDS = 4


def test_random_calls_under_random_schedules(request: pytest.FixtureRequest) -> None:
    """Case after case, as many as the time allows. The seed of one that fails makes it the first case again."""
    wanted, first = (request.config.getoption(name, default=None) for name in ("--fuzz-seconds", "--fuzz-seed"))
    if first is None:
        first = int(time.time()) if wanted else 0  # the same ones in each quick run
    print(f"first seed {first}")
    seed, end = first, time.monotonic() + float(wanted or SECONDS)
    while seed == first or time.monotonic() < end:
        trial = drawn(seed, KERNELS)
        fault = prepared(trial).fault(seed)
        assert not fault, f"{trial}: {fault}\nagain: --fuzz-seed {seed}"
        seed += 1
    print(f"{seed - first} calls in {float(wanted or SECONDS):.0f} s")


def test_a_seed_makes_the_same_trial_again() -> None:
    assert drawn(7, KERNELS) == drawn(7, KERNELS) != drawn(8, KERNELS)
    trials = [drawn(seed, KERNELS) for seed in range(200)]
    assert {trial.kernel for trial in trials} == set(KERNELS) and {trial.D for trial in trials} == {64, 128}
    assert any(trial.packed for trial in trials) and any(trial.cuts and trial.window for trial in trials)


def test_an_error_in_a_kernel_is_seen() -> None:
    trial = prepared(Trial("forward", 300))
    arguments = trial.launch.arguments
    trial.launch = trial.launch._replace(arguments=arguments | {"scale": arguments["scale"] * 1.05})
    assert trial.fault(0).startswith("wrong: the error of o")
