"""Real runs on files and settings that are damaged or made to do harm: refused, and nothing is lost."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from runs import ROOT, Workspace, succeeded
from test_faults_checkpoint import copied, refused
from test_faults_stop import command, goes_on, validation

Row = Callable[..., None]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[int, tuple[Callable[[Path], None], str]] = {16: (flip, "have the xxh64"), 17: (Path.unlink, "train.bin")}


@pytest.mark.slow
@pytest.mark.row(16, 17)
@pytest.mark.parametrize("number", DAMAGE)
def test_a_damaged_token_file_is_named(number: int, whole: dict[str, str], workspace: Workspace, row: Row) -> None:
    space, name, (damage, words) = workspace, f"shard-{number}", DAMAGE[number]
    (found,) = (path for path in (space.path / "data").glob("corpus-*") if path.is_dir())
    folder = space.path / f"data/{name}"
    shutil.copytree(found, folder)
    damage(folder / "train.bin")
    start = command(space, "python", name=name, data__path=f"data/{name}")
    text, seconds = refused(space, start, "python")
    assert words in text and f"data/{name}/train.bin" in text and text.count("error: ") == 1
    shutil.copy(found / "train.bin", folder)
    succeeded(space.run(start))
    assert space.losses(name) == space.losses(whole["python"])
    assert validation(space, name) == validation(space, whole["python"])
    row(number, "python", detected=seconds)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.slow
@pytest.mark.row(34)
def test_a_pickle_in_a_checkpoint_is_not_read(whole: dict[str, str], workspace: Workspace, row: Row) -> None:
    space, mark = workspace, workspace.path / "unpickled"
    for number, path in enumerate(sorted((space.path / f"runs/{whole['python']}/checkpoints/step-00000300").iterdir())):
        name = f"bomb-{number}"
        folder = copied(space, whole["python"], name)
        (folder / path.name).write_bytes(pickle.dumps(Bomb(mark)))
        start = command(space, "python", name=name)
        begin = time.monotonic()
        again = goes_on(space, name, whole["python"], start)
        assert again.step == 200 and "warning: checkpoint step-00000300 cannot be used" in again.output
        assert not mark.exists()
        row(34, "python", detected=time.monotonic() - begin, lost=100, restart=again.seconds)
    assert number >= 2


LINES = [f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefgh")]
HOSTILE = {
    "hostfile": ("-oProxyCommand=mkdir${IFS}harm slots=1\n", "launch/check_hostfile.py"),
    "config.yaml": ("name: !!python/object/apply:os.mkdir [harm]\n", "launch/pretrain.py --config"),
    "path.yaml": ("name: ../harm\n", "launch/pretrain.py --config"),
    "bomb.yaml": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(LINES), "launch/pretrain.py --config"),
}


@pytest.mark.slow
@pytest.mark.row(35)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_refused(name: str, workspace: Workspace, row: Row) -> None:
    text, script = HOSTILE[name]
    (workspace.path / name).write_text(text)
    program, *options = script.split()
    begin = time.monotonic()
    done = workspace.run([sys.executable, str(ROOT / program), *options, name])
    row(35, "python", detected=time.monotonic() - begin)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not list(workspace.path.rglob("harm*")) and not (workspace.path.parent / "harm").exists()
