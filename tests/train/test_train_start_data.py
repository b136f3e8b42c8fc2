"""What a start reads of the data."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.config import DataConfig, PhaseChange, RunConfig
from llm.data.prepare.register import register
from llm.data.tokenizer import Tokenizer
from llm.data.tokens import manifest as manifests
from llm.plan import budget
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from pool import RankPool
from tiny_run import case, plain

VOCABULARY = 257


def made_run(folder: Path) -> RunConfig:
    """The config of a run on a blend of `one`, which is data.path, and `two`, then of `two` and `three`."""
    Tokenizer.train(["a"], VOCABULARY).save(folder / "t.json")
    made = case(model=dict(vocab_size=VOCABULARY), train=dict(engine="plain"))
    for seed, name in enumerate(("one", "two", "three")):
        (folder / name).mkdir()
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 1000).astype("<u2")
        paths = {"train": f"{folder}/{name}/train.bin", "validation": f"{folder}/{name}/val.bin"}
        tokens[::50] = 0  # ends of documents
        tokens[:800].tofile(paths["train"])
        tokens[800:].tofile(paths["validation"])
        data = DataConfig(path=str(folder / name), tokenizer=str(folder / "t.json"), seq_len=16)
        register(replace(made, data=data), paths)
    one, two, three = (str(folder / name) for name in ("one", "two", "three"))
    phases = (PhaseChange(samples=16, blend={two: 1.0, three: 1.0}),)
    blend = {one: 1.0, two: 1.0}
    return plain(replace(made, data=DataConfig(path=one, seq_len=16, blend=blend, phases=phases, verify="background")))


def count_manifests(config: RunConfig, folder: Path) -> Counter[str]:
    """How often each folder's manifest is read while a run starts."""
    read, found = manifests.parse_manifest, Counter[str]()

    def counted(raw: bytes) -> manifests.Manifest:
        manifest = read(raw)
        found[manifest.source] += 1
        return manifest

    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "parse_manifest", counted)
        RunFolder(RUNS, config.name).claim()
        run = start(config, torch.device("cpu"), lambda line: None)
    assert run is not None and run.step == 0
    return found


def test_a_start_reads_each_manifest_of_a_blend_once(one_rank: RankPool, tmp_path: Path) -> None:
    config = made_run(tmp_path)
    (found,) = one_rank.run(count_manifests, config, tmp_path)
    assert len(found) == 3 and set(found.values()) == {1}, found


def said_at_start(config: RunConfig, folder: Path) -> list[str]:
    os.chdir(folder)
    RunFolder(RUNS, config.name).claim()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TRIAL", 0)
        start(config, torch.device("cpu"), said.append)
    return said


def test_a_run_of_few_tokens_is_warned_about(one_rank: RankPool, tmp_path: Path) -> None:
    (said,) = one_rank.run(said_at_start, made_run(tmp_path), tmp_path)
    assert any(line.startswith("warning: the run trains on 0.0") and "per parameter" in line for line in said), said
