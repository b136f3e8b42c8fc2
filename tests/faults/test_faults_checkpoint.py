"""Real runs that resume from what is damaged, is seen by some ranks alone, or was saved by another layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runs import Workspace, succeeded
from test_faults_kill import kill_all_ranks
from test_faults_stop import command, goes_on

Row = Callable[..., None]


def copied(space: Workspace, whole: str, name: str) -> Path:
    """A finished run under another name: the folder of its newest checkpoint, of step 300."""
    shutil.copytree(space.path / "runs" / whole, space.path / "runs" / name)
    return space.path / "runs" / name / "checkpoints/step-00000300"


def refused(space: Workspace, start: list[str], launcher: str) -> tuple[str, float]:
    """What a start says that ends with the code of a bad input, which torchrun names; and its seconds."""
    begin = time.monotonic()
    done = space.run(start)
    seconds, text = time.monotonic() - begin, done.stdout + done.stderr
    assert done.returncode == 2 or (launcher == "torchrun" and "exitcode  : 2" in text), text[-3000:]
    assert seconds < 60
    return text, seconds


def newest_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def truncated(folder: Path) -> None:
    shard = newest_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])


def flipped(folder: Path) -> None:
    content = bytearray(newest_shard(folder).read_bytes())
    content[-7] ^= 4
    newest_shard(folder).write_bytes(content)


def missing(folder: Path) -> None:
    newest_shard(folder).unlink()


def mixed(folder: Path) -> None:
    shard = newest_shard(folder)
    shutil.copy(folder.parent / "step-00000200" / shard.name, shard)


NUMBERS = {truncated: 12, flipped: 13, missing: 14, mixed: 14}
DAMAGE = [*(("python", damage) for damage in NUMBERS), ("torchrun", truncated), ("deepspeed", flipped)]


@pytest.mark.slow
@pytest.mark.row(12, 13, 14)
@pytest.mark.parametrize(("launcher", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_gone_around(
    launcher: str, damage: Callable[[Path], None], whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    name = f"damaged-{launcher}-{damage.__name__}"
    folder = copied(workspace, whole[launcher], name)
    damage(folder)
    start = command(workspace, launcher, name=name)
    text, seconds = refused(workspace, [*start, "--checkpoint.resume_step=300"], launcher)
    assert "step-00000300" in text
    again = goes_on(workspace, name, whole[launcher], start)
    assert again.step == 200 and "warning: " in again.output and "step-00000300" in again.output
    row(NUMBERS[damage], launcher, detected=seconds, lost=300 - again.step, restart=again.seconds)


@pytest.mark.slow
@pytest.mark.row(15)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_does_not_see_the_checkpoint_stops_all(
    launcher: str, whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    name = f"stale-{launcher}"
    folder = copied(workspace, whole[launcher], name)
    before = sorted(folder.parent.rglob("*"))
    fault = "1 open step-00000300/manifest.json 1 ENOENT"
    begin = time.monotonic()
    done = workspace.run(workspace.faulty(launcher, "faulty_disk", fault, name=name))
    text = done.stdout + done.stderr
    assert done.returncode == (2 if launcher == "deepspeed" else 1) and "fault: open of" in text, text[-3000:]
    (message,) = {line for line in text.splitlines() if line.startswith("error: ")}
    assert message.startswith("error: rank 1: ") and "step-00000300" in message
    row(15, launcher, detected=time.monotonic() - begin)
    assert sorted(folder.parent.rglob("*")) == before
    healthy = workspace.run(command(workspace, launcher, name=name))
    succeeded(healthy)
    assert "is complete: 300 steps" in healthy.stdout


OTHERS = [
    ("python", dict(model__n_layer=3), "model.n_layer: the checkpoint has 2, the config has 3"),
    ("python", dict(model__vocab_size=301), "vocab_size"),
    ("python", dict(data__seq_len=16), "data.seq_len"),
    ("torchrun", dict(model__n_layer=3), "model.n_layer: the checkpoint has 2, the config has 3"),
    ("deepspeed", dict(data__seq_len=16), "data.seq_len"),
]


@pytest.mark.slow
@pytest.mark.row(24)
@pytest.mark.parametrize(("launcher", "changed", "words"), OTHERS)
def test_another_model_is_refused(
    launcher: str, changed: dict[str, Any], words: str, whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    name = f"other-{launcher}-{next(iter(changed))}"
    folder = copied(workspace, whole[launcher], name)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    text, seconds = refused(
        workspace, command(workspace, launcher, name=name, train__max_steps=400, **changed), launcher
    )
    assert words in text and text.count("error: ") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    row(24, launcher, detected=seconds)


# Launcher, and what the next start asks for; in turn, from the checkpoint that the one before has left in its middle.
TURNS = {
    "torchrun": [
        dict(train__engine="fsdp", parallel__zero_stage=3, parallel__tensor_parallel=2),
        dict(train__engine="fsdp", parallel__zero_stage=2),
    ],
    "deepspeed": [
        dict(train__engine="deepspeed", parallel__tensor_parallel=2),
        dict(train__engine="deepspeed", parallel__zero_stage=1),
    ],
}


@pytest.mark.slow
@pytest.mark.row(25)
@pytest.mark.parametrize("launcher", TURNS)
def test_other_degrees_of_parallelism_go_on(
    launcher: str, whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    """Of tensor parallelism 1, 2 and 1, and then on one rank."""
    space, before, step = workspace, whole[launcher], 200
    often = dict(checkpoint__interval=20, checkpoint__keep_last=9)
    turns = [*((launcher, changes) for changes in TURNS[launcher]), ("python", {})]
    for turn, (by, changes) in enumerate(turns):
        name = f"turned-{launcher}-{turn}"
        checkpoint = f"checkpoints/step-{step:08}"
        shutil.copytree(space.path / "runs" / before / checkpoint, space.path / "runs" / name / checkpoint)
        again = space.resume(command(space, by, name=name, **often, **changes))
        assert again.step == step
        found = {record["step"]: record["loss"] for record in space.metrics(name) if "loss" in record}
        expected = {n: loss for n, loss in space.losses(whole[launcher]).items() if n > step}
        assert found == pytest.approx(expected, rel=1e-5)
        row(25, by, restart=again.seconds)
        before, step = name, step + 20


@pytest.mark.slow
@pytest.mark.row(30)
@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_dropout_goes_on(launcher: str, workspace: Workspace, row: Row) -> None:
    space, name = workspace, f"dropout-{launcher}"
    engine = {} if launcher != "deepspeed" else dict(train__engine="deepspeed", parallel__zero_stage=2)
    settings = dict(model__dropout=0.1, checkpoint__interval=40, **engine)
    succeeded(space.run(command(space, launcher, name=f"{name}-whole", **settings)))
    start = ["env", "MAX_RESTARTS=0", *command(space, launcher, name=name, **settings)]
    process = space.start(start)
    space.wait_for_step(name, 100)
    killed = time.monotonic()
    process.kill() if launcher == "python" else kill_all_ranks(psutil.Process(process.pid))
    assert process.wait(timeout=60) != 0
    detected, last = time.monotonic() - killed, len(space.losses(name))
    assert last < 300, "the run was over before the kill"
    again = goes_on(space, name, f"{name}-whole", start)
    assert last - again.step < 40
    row(30, launcher, detected=detected, lost=last - again.step, restart=again.seconds)
