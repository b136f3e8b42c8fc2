"""Real runs in which losses, gradients, weights or moments of one rank are wrong: found, and mended as is promised."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from runs import Workspace, succeeded
from test_faults_stop import SETTINGS, command, goes_on, validation

Row = Callable[..., None]
# So many deviations that gradient norms, which spike by themselves in a short window, do not reach them.
WATCH = dict(train__spike_window=16, train__spike_sigmas=1000, train__spike_patience=3, checkpoint__interval=50)


def skipped_steps(space: Workspace, name: str) -> int:
    """As the last logged step has it."""
    return [record["skipped_steps"] for record in space.metrics(name) if "loss" in record][-1]


@pytest.mark.slow
@pytest.mark.row(18, 19)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("kind", ["nan", "loud"])
def test_a_bad_step_is_left_out_by_all_ranks(kind: str, launcher: str, workspace: Workspace, row: Row) -> None:
    name = f"bad-{kind}-{launcher}"
    engine = {} if launcher == "torchrun" else dict(train__engine="deepspeed", parallel__zero_stage=2)
    settings = SETTINGS | WATCH | engine
    done = workspace.run(workspace.faulty(launcher, "faulty_numbers", f"1 {kind} 60 60", name=name, **settings))
    succeeded(done)
    (warning,) = (line for line in done.stdout.splitlines() if " is left out: loss " in line)
    assert warning.startswith("warning: step 60 ")
    assert skipped_steps(workspace, name) == 1
    row({"nan": 18, "loud": 19}[kind], launcher, lost=1)


@pytest.mark.slow
@pytest.mark.row(18, 19)
@pytest.mark.parametrize("kind", ["nan", "loud"])
def test_a_bad_stretch_is_passed_over_the_same_after_a_kill(kind: str, workspace: Workspace, row: Row) -> None:
    space, names = workspace, [f"stretch-{kind}-{i}" for i in range(2)]
    start = space.faulty("torchrun", "faulty_numbers", f"1 {kind} 60 70", name=names[0], **SETTINGS | WATCH)
    begin = time.monotonic()
    done = space.run(start)
    succeeded(done)
    seconds = time.monotonic() - begin
    assert "warning: step 62 is bad, as were those before" in done.stdout
    assert "back to the weights of step 50, and on behind samples 400 to 495" in done.stdout
    assert done.stdout.count("back to the weights") == 1
    state = json.loads((space.path / f"runs/{names[0]}/checkpoints/step-00000300/state.json").read_text())
    assert state["setbacks"]["passed_samples"] == [[400, 496]]
    assert skipped_steps(space, names[0]) == 70 - 50
    process = space.start([word.replace(names[0], names[1]) for word in start])
    space.wait_for_step(names[1], 62)
    process.kill()
    process.wait(60)
    row({"nan": 18, "loud": 19}[kind], "torchrun", detected=seconds, lost=62 - 50)
    again = space.resume([word.replace(names[0], names[1]) for word in start])
    assert space.losses(names[0]) == space.losses(names[1])
    assert validation(space, names[0]) == validation(space, names[1])
    row({"nan": 18, "loud": 19}[kind], "torchrun", restart=again.seconds)


FLIPS = {
    "exp_avg": ("torchrun", dict(train__engine="fsdp", parallel__zero_stage=3), "exp_avg of", 69),
    "weights": ("deepspeed", dict(train__engine="deepspeed", parallel__zero_stage=3), "weights of", 69),
    "clip": ("torchrun", dict(train__engine="plain", train__guard_interval=10), "no longer equal", 1),
}


@pytest.mark.slow
@pytest.mark.row(26, 28)
@pytest.mark.parametrize("kind", FLIPS)
def test_wrong_bits_are_found_and_the_next_start_is_right(kind: str, workspace: Workspace, row: Row) -> None:
    launcher, changes, words, code = FLIPS[kind]
    name, space = f"bits-{kind}", workspace
    settings = SETTINGS | dict(checkpoint__interval=50) | changes
    succeeded(space.run(command(space, launcher, name=f"{name}-whole", **settings)))
    begin = time.monotonic()
    done = space.run(space.faulty(launcher, "faulty_numbers", f"1 {kind} 60", name=name, **settings))
    seconds, text = time.monotonic() - begin, done.stdout + done.stderr
    assert done.returncode != 0 and words in text, text[-3000:]
    failed = json.loads((space.path / f"runs/{name}/failed.json").read_text())
    assert failed["code"] == code and (code == 1 or failed["rank"] == 1)
    last = max(record["step"] for record in space.metrics(name))
    again = goes_on(space, name, f"{name}-whole", command(space, launcher, name=name, **settings))
    assert again.step == 50 and last <= 100  # a norm that is clipped comes when it comes
    row(28 if kind == "clip" else 26, launcher, detected=seconds, lost=last - 50, restart=again.seconds)


@pytest.mark.slow
@pytest.mark.row(27)
def test_a_gradient_that_is_wrong_once_changes_nothing(whole: dict[str, str], workspace: Workspace, row: Row) -> None:
    name, space = "once", workspace
    settings = SETTINGS | dict(train__replay_interval=20)
    done = space.run(space.faulty("torchrun", "faulty_numbers", "1 gradient 60", name=name, **settings))
    succeeded(done)
    assert "warning: step 60: rank 1 gave other gradients the second time, and the third and fourth" in done.stdout
    assert space.losses(name) == space.losses(whole["torchrun"])
    row(27, "torchrun", lost=0)
