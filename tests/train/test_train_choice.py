"""What was measured is found again, told to every rank, and measured anew where it is not of this machine and run."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config import RunConfig
from llm.errors import Agreed, CheckpointError, InputError
from llm.files import write_json
from llm.model.forms import Forms
from llm.parallel.mesh import Mesh
from llm.train import choice
from llm.train import start as starting
from llm.train.choice import Record, find, forms_of, load
from llm.train.run_folder import RUNS, RunFolder
from pool import RankPool
from test_train_start_data import made_run
from tiny_run import case

GPU = torch.device("cuda")  # named, never used: what would ask it is replaced
MS = {"attention": {"triton": 2.0, "flash": 1.0}, "norm": {"triton": 1.0, "torch": 3.0}}
CONFIG = case(train=dict(precision="bf16", engine="plain"))
CHOSEN = Forms(attention="flash", norm="triton")


class Machine:
    """A GPU that is not there: its name, what it measures, how often it did, and what was said."""

    def __init__(self, patch: pytest.MonkeyPatch, home: Path, ms: Any = MS) -> None:
        self.name, self.ms, self.measured, self.said, self.kept = "one", ms, 0, list[str](), home / "kernels.json"
        patch.setenv("HOME", str(home))
        patch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(choice, "measure", self.measure)

    def measure(self, *_: Any) -> tuple[Any, list[str]]:
        self.measured += 1
        return self.ms, ["attention by cudnn failed: RuntimeError"]

    def find(self, config: RunConfig = CONFIG, tp: int = 1, dp: int = 1) -> Record:
        self.said.clear()
        return find(config, tp, dp, GPU, self.kept, self.said.append)

    @property
    def cached(self) -> list[Path]:
        return sorted((self.kept.parent / ".cache/ingot/forms").iterdir())


def keep(machine: Machine, record: Record) -> None:
    """As a run does that has started."""
    write_json(machine.kept, record._asdict())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_measurement_serves_the_next_run_too(machine: Machine) -> None:
    first = machine.find()
    assert first.ms == MS and machine.measured == 1
    assert machine.said == [
        "warning: attention by cudnn failed: RuntimeError",
        "kernels as measured: attention triton 2.000 ms, flash 1.000 ms; norm triton 1.000 ms, torch 3.000 ms",
    ]
    (cached,) = machine.cached
    assert machine.find() == first and machine.measured == 1
    assert machine.said[0].startswith(f"kernels as {cached} says: attention triton 2.000 ms, flash")


def test_a_run_that_goes_on_takes_its_own_record_before_the_cache(machine: Machine) -> None:
    keep(machine, machine.find()._replace(ms={"norm": {"torch": 1.0}}))
    assert machine.find().ms == {"norm": {"torch": 1.0}} and machine.measured == 1
    assert machine.said == [f"kernels as {machine.kept} says: norm torch 1.000 ms"]


def test_another_layout_machine_or_shape_is_measured_anew_and_said(machine: Machine) -> None:
    keep(machine, machine.find())
    machine.find(tp=2, dp=3)
    assert machine.measured == 2
    assert machine.said[0] == (
        f"kernels are chosen anew: {machine.kept} was measured for another machine or shape: ranks 1 tensor-parallel, "
        "1 data-parallel, ZeRO 0 -> 2 tensor-parallel, 3 data-parallel, ZeRO 0"
    )
    machine.name = "two"
    machine.find()
    assert machine.measured == 3 and machine.said[0].endswith("shape: GPU one -> two")
    machine.name = "one"
    for count, changed in enumerate((dict(micro_batch_size=4), dict(deterministic=False), dict(precision="fp16")), 4):
        machine.find(replace(CONFIG, train=replace(CONFIG.train, **changed)))
        assert machine.measured == count
    machine.find()  # what was measured before is still there
    assert machine.measured == count and len(machine.cached) == 6


def test_other_versions_are_measured_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.find()
    monkeypatch.setattr(torch, "__version__", "9.9")
    machine.find()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/changed.py").write_text("x = 1")
    monkeypatch.setattr(choice.kernels, "__path__", [str(tmp_path / "kernels")])
    machine.find()
    assert machine.measured == 3 and len(machine.cached) == 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is not JSON"),
        (b'{"key": {}', "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"key": {}}', "found no "),
        (b'{"key": {}, "ms": {"norm": {"torch": "1"}}}', "ms.norm.torch: found '1'"),
        (b'{"key": {}, "ms": {"norm": {"flash": 1.0}}}', "has times of norm by ['flash']; damaged"),
        (b'{"key": {}, "ms": {"matrix": {"torch": 1.0}}}', "has times of matrix by ['torch']"),
        (b'{"key": {}, "ms": {"norm": {}}}', "has times of norm by []"),
        (b'{"key": {}, "ms": {"norm": {"torch": NaN}}}', "NaN is no number of JSON"),
    ],
)
def test_a_damaged_file_is_said_and_written_anew(machine: Machine, content: bytes, found: str) -> None:
    record = machine.find()
    (cached,) = machine.cached
    for path in (cached, machine.kept):
        path.write_bytes(content)
        with pytest.raises((CheckpointError, InputError)) as caught:
            load(path, record.key)
        assert found in str(caught.value)
    assert machine.find() == record and machine.measured == 2
    assert machine.said[0] == f"kernels are chosen anew: {load_error(machine.kept, record)}"
    assert load(cached, record.key) == record


def load_error(path: Path, record: Record) -> str:
    with pytest.raises((CheckpointError, InputError)) as caught:
        load(path, record.key)
    return str(caught.value)


def test_a_link_is_not_followed(machine: Machine, tmp_path: Path) -> None:
    record = machine.find()
    (cached,) = machine.cached
    cached.rename(tmp_path / "elsewhere")
    cached.symlink_to(tmp_path / "elsewhere")
    machine.find()
    assert machine.measured == 2 and not cached.is_symlink() and load(cached, record.key) == record


def test_a_cache_that_cannot_be_written_is_said(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("a file")
    assert machine.find().ms == MS
    assert machine.said[1].startswith("warning: what was measured is not kept for other runs: ")


def test_runs_that_start_at_once_leave_a_whole_file(machine: Machine) -> None:
    """Each finds no file, or a whole one."""
    record, said, found = machine.find(), list[str](), list[Record]()
    (cached,) = machine.cached
    for _ in range(20):
        cached.unlink()
        threads = [
            threading.Thread(target=lambda: found.append(find(CONFIG, 1, 1, GPU, machine.kept, said.append)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert machine.cached == [cached] and load(cached, record.key) == record
    assert found == [record] * 80
    assert not [
        line
        for line in said
        if not line.startswith(("warning: attention by", "kernels as measured", f"kernels as {cached} says"))
    ]


@pytest.mark.parametrize("impl", ["triton", "gluon", "torch", "reference"])
def test_a_form_that_is_asked_for_is_taken_unmeasured(machine: Machine, impl: str) -> None:
    pinned, mesh = replace(CONFIG, train=replace(CONFIG.train, impl=impl)), Any
    assert forms_of(pinned, mesh, GPU, machine.kept, machine.said.append) == (Forms.of(impl), None)
    assert machine.measured == 0 and machine.said == []


def test_gluon_is_attentions_form_and_triton_that_of_the_rest() -> None:
    forms = Forms.of("gluon")
    assert forms.attention == forms.attention_impl == "gluon" and {*forms[1:-1]} == {"triton"}


def test_a_cpu_measures_nothing(machine: Machine) -> None:
    mesh: Any = None
    assert forms_of(CONFIG, mesh, torch.device("cpu"), machine.kept, print) == (Forms(), None)
    assert machine.measured == 0


def chosen_here(folder: Path, fails: bool) -> tuple[Forms, bool, int]:
    """The forms of this rank, whether it has the record, and how often it measured."""
    mesh = Mesh.create(CONFIG.parallel, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, folder / str(mesh.rank))
        if fails:
            patch.setattr(choice, "measure", lambda *_: refuse())
            with pytest.raises(Agreed, match="no measure"):
                forms_of(CONFIG, mesh, GPU, machine.kept, machine.said.append)
            return Forms(), False, 0
        forms, record = forms_of(CONFIG, mesh, GPU, machine.kept, machine.said.append)
    return forms, record is not None, machine.measured


def refuse() -> None:
    raise InputError("no measure")


def test_rank_0_measures_and_every_rank_takes_its_choice(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(chosen_here, tmp_path, False) == [(CHOSEN, True, 1), (CHOSEN, False, 0)]


def test_what_rank_0_cannot_do_ends_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(chosen_here, tmp_path, True) == [(Forms(), False, 0)] * 2


def started(config: RunConfig, folder: Path) -> tuple[list[str], Forms]:
    """A run's start, as if rank 0 had measured: what it says, and the forms of its model."""
    os.chdir(folder)
    said, forms = list[str](), Forms(norm="reference", loss="reference")
    with pytest.MonkeyPatch.context() as patch:
        record = Record({"GPU": "one"}, {"norm": {"torch": 1.0}})
        patch.setattr(starting, "forms_of", lambda *_: (forms, record))
        RunFolder(RUNS, config.name).claim()
        run = starting.start(config, torch.device("cpu"), said.append)
    assert run is not None
    model: Any = run.engine.model
    return said, model.forms


def test_a_run_keeps_the_record_and_builds_its_model_of_the_forms(one_rank: RankPool, tmp_path: Path) -> None:
    config = made_run(tmp_path)
    ((said, forms),) = one_rank.run(started, config, tmp_path)
    assert "kernels on cpu (train.impl=auto): torch: attention, embedding, rope, gelu; reference: layer_norm, " in (
        "\n".join(said)
    )
    assert forms == Forms(norm="reference", loss="reference")
    kept = RunFolder(tmp_path / RUNS, config.name).kernels
    assert load(kept, {"GPU": "one"}).ms == {"norm": {"torch": 1.0}}
