"""The packing plans that a config asks for are written once and listed in the manifests."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig
from llm.data.corpora import packing_plan, training_corpora
from llm.data.prepare import plans
from llm.data.prepare.plans import write_plans
from llm.data.samples.packing import NumpyPackPlan
from llm.data.tokens.folder import load_manifest
from llm.data.tokens.manifest import read_manifest, verify_files
from llm.errors import InputError

pytestmark = pytest.mark.usefixtures("two_folders")


def make_config(**data) -> RunConfig:
    fields = {"path": "one", "seq_len": 16, "packing": "best_fit", "document_masks": True} | data
    return RunConfig(model=ModelConfig(vocab_size=50), data=DataConfig(**fields))


def test_none_are_needed_for_chunks():
    config = make_config(packing="chunk")
    assert write_plans(config, load_manifest(config)) == []
    assert not list(Path("one").glob("*.plan"))


def test_each_corpus_gets_those_of_the_lengths_it_is_drawn_in():
    phases = (
        PhaseChange(samples=32, seq_len=24),
        PhaseChange(samples=64, seq_len=32, blend={"two": 1.0, "one": 1.0}),
    )
    config = make_config(phases=phases)
    written = write_plans(config, load_manifest(config))
    names = ["one/train.16.plan", "one/train.24.plan", "one/train.32.plan", "two/train.32.plan"]
    assert sorted(map(str, written)) == sorted(names)
    assert sorted(map(str, Path().glob("*/*.plan"))) == sorted(names)
    manifest = load_manifest(config)
    for folder in ("one", "two"):
        verify_files(Path(folder), read_manifest(Path(folder)))
    shards = training_corpora(config, manifest)["two"]
    plan = NumpyPackPlan(Path(packing_plan(shards, 32)), 32, shards.n_tokens)
    assert sum(plan.targets(row) for row in range(len(plan))) > 2900
    assert write_plans(config, manifest) == []


def test_files_without_a_manifest_are_refused():
    np.arange(50, dtype="<u2").tofile("a.bin")
    config = make_config(blend={"a.bin": 1.0})
    with pytest.raises(InputError, match=r"a\.bin has no manifest that could list its packing plans; register"):
        write_plans(config, load_manifest(config))


def test_processes_that_write_plans_at_once_lose_none(monkeypatch: pytest.MonkeyPatch):
    """Both read the manifest before either has written."""
    configs = [make_config(), make_config(seq_len=24)]
    manifests = [load_manifest(config) for config in configs]
    written, write = [], plans.write_plan
    monkeypatch.setattr(plans, "write_plan", lambda *args: (written.append(args[1]), write(*args)))
    threads = [
        threading.Thread(target=write_plans, args=arguments)
        for arguments in [*zip(configs, manifests, strict=True), (configs[0], manifests[0])]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = read_manifest(Path("one")).files
    assert {name for name in listed if name.endswith(".plan")} == {"train.16.plan", "train.24.plan"}
    assert sorted(written) == [16, 24]
    verify_files(Path("one"), read_manifest(Path("one")))
