"""Runs go on, to the last bit, when their corpora lie elsewhere or under other names, and not on other contents."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.config import DataConfig, PhaseChange, RunConfig
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.data.prepare.register import register
from llm.data.tokenizer import Tokenizer
from llm.errors import Agreed
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from pool import RankPool
from tiny_run import case, plain

VOCABULARY, STEPS, SAVED = 257, 6, 3
Names = dict[str, str]
OWN = {name: name for name in ("one", "two", "three", "bare.bin")}


def make_data(folder: Path) -> None:
    """The registered corpora `one`, `two` and `three`, of which `one` has a validation split, and bare.bin."""
    os.chdir(folder)
    Tokenizer.train(["a"], VOCABULARY).save(Path("t.json"))
    for seed, name in enumerate(OWN):
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 600).astype("<u2")
        if name == "bare.bin":
            tokens.tofile(name)
            continue
        Path(name).mkdir()
        shutil.copy("t.json", f"{name}/tokenizer.json")
        tokens[:500].tofile(f"{name}/train.bin")
        tokens[500:].tofile(f"{name}/val.bin")
        config = run_config(OWN)
        data = replace(config.data, path=name, tokenizer=f"{name}/tokenizer.json", blend=None, phases=())
        register(replace(config, data=data), {"train": f"{name}/train.bin", "validation": f"{name}/val.bin"})


def run_config(names: Names, **changes: Any) -> RunConfig:
    """A run on `one`, `two` and bare.bin, and from step 4 on `two` and `three`; names: what they are called now."""
    blend = {names["one"]: 1.0, names["two"]: 2.0, names["bare.bin"]: 1.0}
    phases = (PhaseChange(32, blend={names["three"]: 1.0, names["two"]: 1.0}),)
    data = DataConfig(**{"path": names["one"], "seq_len": 16, "blend": blend, "phases": phases} | changes)
    train = dict(max_steps=STEPS, eval_interval=3, guard_interval=0)
    made = plain(replace(case(model=dict(vocab_size=VOCABULARY), train=train), data=data))
    logging = LoggingConfig(interval=1, tensorboard=False, sample_tokens=0)
    return replace(made, checkpoint=CheckpointConfig(interval=SAVED, keep_last=9), logging=logging)


def trained(folder: Path, config: RunConfig) -> list[dict[str, float]] | str:
    """The losses of every step of the run in `folder`, after it has gone on; or why it does not."""
    os.chdir(folder)
    lock = RunFolder(RUNS, config.name).claim()
    try:
        run = start(config, torch.device("cpu"), lambda line: None)
        assert run is not None
        train(run)
    except Agreed as error:
        return str(error)
    finally:
        lock.release()
    lines = map(json.loads, Path(f"runs/{config.name}/metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "val_loss", "grad_norm")
    return [
        {key: line[key] for key in kept if key in line}
        for line in lines
        if (line["step"], "val_loss" in line) != (5, True)
    ]


def move(names: Names) -> None:
    for name, new in names.items():
        Path(name).rename(f"{new}.new")
    for new in names.values():
        Path(f"{new}.new").rename(new)


def link(names: Names) -> None:
    for name, new in names.items():
        Path(new).symlink_to(name)


def copy(names: Names) -> None:
    for name, new in names.items():
        (shutil.copy if Path(name).is_file() else shutil.copytree)(name, new)


def leave(names: Names) -> None:
    """Another spelling is enough."""


Place = tuple[Callable[[Names], None], Names]
PLACES: dict[str, Place] = {
    "moved, in another order": (move, {"one": "z", "two": "m", "three": "a", "bare.bin": "b.bin"}),
    "swapped crosswise": (move, {"one": "two", "two": "one", "three": "three", "bare.bin": "bare.bin"}),
    "linked": (link, {"one": "z", "two": "m", "three": "a", "bare.bin": "b.bin"}),
    "copied": (copy, {"one": "z", "two": "m", "three": "a", "bare.bin": "b.bin"}),
    "with a slash more": (leave, {"one": "one/", "two": "./two", "three": "three/", "bare.bin": "./bare.bin"}),
}


def everywhere(root: Path) -> dict[str, Any]:
    """What runs in copies of one folder come to, each from the checkpoint after step 3. On a rank of a pool."""
    base = root / "base"
    base.mkdir()
    make_data(base)
    found: dict[str, Any] = {"whole": trained(base, run_config(OWN))}
    shutil.rmtree(base / f"runs/run/checkpoints/step-{STEPS:08}")
    for i, (place, (change, names)) in enumerate(PLACES.items()):
        folder = root / str(i)
        shutil.copytree(base, folder)
        os.chdir(folder)
        change(names)
        if place.startswith("moved"):  # and again after it went on: the names that count are the first ones
            config = run_config(names)
            assert (
                len(trained(folder, replace(config, train=replace(config.train, max_steps=5)))) == 5 + 1
            )  # steps, and a validation
            again = {name: f"{i}-{name}" for i, name in enumerate(("bare.bin", "two", "one", "three"))}
            move({names[name]: again[name] for name in names})
            names = again
        found[place] = trained(folder, run_config(names))
    shutil.copytree(base, root / "changed")
    os.chdir(root / "changed")
    for name in ("bare.bin", "two/train.bin"):
        ids = np.fromfile(name, "<u2")
        ids[300] ^= 1
        ids.tofile(name)
    found["a bare byte"] = trained(root / "changed", run_config(OWN))
    changed = Path("bare.bin").read_bytes()
    shutil.copy(base / "bare.bin", "bare.bin")
    found["a byte under its manifest"] = trained(root / "changed", run_config(OWN))
    Path("bare.bin").write_bytes(changed)
    move({"bare.bin": "elsewhere.bin"})
    found["moved and changed"] = trained(root / "changed", run_config(OWN | {"bare.bin": "elsewhere.bin"}))
    shutil.copy(base / "bare.bin", "elsewhere.bin")
    Path("two/manifest.json").unlink()
    config = run_config(OWN)
    data = replace(config.data, path="two", tokenizer="t.json", blend=None, phases=())
    register(replace(config, data=data), {"train": "two/train.bin"})
    found["a registered byte"] = trained(root / "changed", run_config(OWN | {"bare.bin": "elsewhere.bin"}))
    return found


@pytest.fixture(scope="module")
def found(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return one_rank.run(everywhere, tmp_path_factory.mktemp("moved"))[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_wherever_its_corpora_lie(found: dict[str, Any], place: str) -> None:
    assert len(found["whole"]) == STEPS + 2  # two of them validations
    assert found[place] == found["whole"]


def test_a_corpus_that_changed_is_named_by_its_path_now(found: dict[str, Any]) -> None:
    remedy = "; restore the data, or choose another --name"
    assert found["a bare byte"] == "what bare.bin holds is not what runs/run was trained on" + remedy
    assert found["a byte under its manifest"].startswith("two/train.bin: the 1000 bytes from byte 0 on have the xxh64 ")
    assert found["a registered byte"] == "what two holds is not what runs/run was trained on" + remedy
    moved = found["moved and changed"]
    assert "'bare.bin (gone)': 1.0" in moved and "'elsewhere.bin': 1.0" in moved
    assert moved.endswith("; what elsewhere.bin holds is not what runs/run was trained on")
