"""A start that is refused leaves the folder of all runs byte for byte as it was, whatever it is refused for."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.cluster.failure import BAD_INPUT, record_failure
from llm.config import RunConfig
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.data.corpora import Corpora
from llm.data.samples.schedule import Schedule
from llm.errors import InputError
from llm.train import start as starting
from llm.train.checks import repetitions
from llm.train.run_folder import RUNS, RunFolder
from pool import RankPool
from runs import contents
from test_train_start_data import made_run

CPU = torch.device("cpu")


def changed(config: RunConfig, section: str, **fields: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **fields)})


def damaged(path: str, content: bytes) -> Callable[[RunConfig], RunConfig]:
    def action(config: RunConfig) -> RunConfig:
        Path(path).write_bytes(content)
        return config

    return action


def failing(name: str, error: BaseException) -> Callable[[RunConfig], RunConfig]:
    """Let a function that llm/train/start.py calls raise, as it does for too little memory or an interrupt."""

    def action(config: RunConfig) -> RunConfig:
        def fail(*arguments: object, **options: object) -> None:
            raise error

        setattr(starting, name, fail)
        return config

    return action


REFUSED: dict[str, Callable[[RunConfig], RunConfig]] = {
    "no data": lambda config: changed(config, "data", path="nowhere"),
    "no corpus of the blend": lambda config: changed(config, "data", blend={"nowhere": 1.0}),
    "a blend of a later phase": lambda config: changed(
        config, "data", phases=(replace(config.data.phases[0], blend={"nowhere": 1.0}),)
    ),
    "too small a vocabulary": lambda config: changed(config, "model", vocab_size=99),
    "no such weights": lambda config: changed(config, "train", init_from="runs/none"),
    "weights in a file": lambda config: changed(config, "train", init_from="t.json"),
    "a step that was not saved": lambda config: changed(config, "checkpoint", resume_step=7),
    "too many validation samples": lambda config: changed(config, "data", validation_samples=10**6),
    "too long a prompt": lambda config: changed(config, "logging", sample_prompt="x" * 99, sample_tokens=5),
    "no packing plan": lambda config: changed(config, "data", packing="best_fit", document_masks=True),
    "an empty token file": damaged("one/train.bin", b""),
    "a damaged manifest": damaged("one/manifest.json", b"{"),
    "a damaged tokenizer": damaged("one/tokenizer.json", b"{}"),
    "damaged tokens": damaged("two/train.bin", b"\xff" * 1600),
    "too little memory": failing("build_engine", torch.OutOfMemoryError("CUDA out of memory")),
    "no memory at all": failing("build_engine", MemoryError()),
    "an interrupt": failing("build_engine", KeyboardInterrupt()),
    "a full disk": failing("to_yaml", OSError(28, "No space left on device")),
}


def start(config: RunConfig) -> None:
    """As launch/pretrain.py does."""
    folder = RunFolder(RUNS, config.name)
    lock = folder.claim()
    try:
        with folder.undone_on_failure(folder.nonce()):
            starting.start(config, CPU, lambda line: None)
    finally:
        lock.release()


def attempts(folder: Path) -> dict[str, Any]:
    """What was found after each refused start: with no folder of runs, with another run, with files of this run."""
    found: dict[str, Any] = {}
    for number, (name, refuse) in enumerate(REFUSED.items()):
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)
        made, functions = made_run(Path()), dict(vars(starting))
        made = replace(made, name="mine", logging=LoggingConfig(tensorboard=False, sample_tokens=0))
        config = refuse(replace(made, checkpoint=CheckpointConfig()))
        for case, files in CASES.items():
            for file in files:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).write_text(file)
            before = contents(Path("runs"))
            try:
                start(config)
                found[f"{name}, {case}"] = "was not refused"
            except BaseException:  # noqa: BLE001 - an interrupt too
                after = contents(Path("runs"))
                if "runs/mine/config.yaml" in files:  # the run was there: it has a lock from now on
                    after = {path: after[path] for path in after if path not in LOCKED}
                if after != before:
                    found[f"{name}, {case}"] = sorted(map(str, after.keys() ^ before.keys()))
        vars(starting).update(functions)
    return found


LOCKED = {Path("runs/mine/lock"), Path("runs/mine/nonce")}
CASES = {
    "no runs": [],
    "another run": ["runs/other/config.yaml", "runs/other/lock"],
    "this run": ["runs/mine/config.yaml", "runs/mine/tokenizer.json", "runs/mine/metrics.jsonl"],
}


def test_a_refused_start_leaves_everything_as_it_was(one_rank: RankPool, tmp_path: Path) -> None:
    (found,) = one_rank.run(attempts, tmp_path)
    assert found == {}


def test_what_another_start_has_claimed_stays(tmp_path: Path) -> None:
    """The first start fails after its folder has become another's."""
    folder = RunFolder(tmp_path / "runs", "mine")
    fail(folder, first_nonce(folder), lambda: folder.share_nonce(1))  # by the other start
    assert {path.name for path in folder.path.iterdir()} == {"lock", "nonce"}


def fail(folder: RunFolder, nonce: str, action: Callable[[], object]) -> None:
    """A start that does `action` and then is refused."""
    with pytest.raises(InputError), folder.undone_on_failure(nonce):  # noqa: PT012 - both are the start
        action()
        raise InputError("refused")


def first_nonce(folder: RunFolder) -> str:
    folder.claim().release()
    return folder.nonce()


def test_a_start_that_waits_for_one_that_fails_gets_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs", "mine")
    held, claimed = folder.claim(), []
    waiting = threading.Thread(target=lambda: claimed.append(RunFolder(tmp_path / "runs", "mine").claim()))

    def begin() -> None:
        waiting.start()
        time.sleep(0.3)  # it opens the lock of the first

    fail(folder, folder.nonce(), begin)
    held.release()
    waiting.join()
    (second,) = claimed
    assert (folder.path / "lock").exists() and folder.nonce()
    second.release()


def test_a_run_that_is_complete_needs_no_data(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(completed, tmp_path) == [(True, None)]


def completed(folder: Path) -> tuple[bool, Any]:
    """Whether a run trained, and what a start finds once its data is gone."""
    from llm.train.loop import train

    os.chdir(folder)
    config = changed(changed(made_run(Path()), "train", max_steps=2), "logging", tensorboard=False, sample_tokens=0)
    lock = RunFolder(RUNS, config.name).claim()
    run = starting.start(config, CPU, lambda line: None)
    assert run is not None
    train(run)
    for name in ("one", "two", "three"):
        Path(name).rename(f"{name}.moved")
    again = starting.start(config, CPU, lambda line: None)
    lock.release()
    return RunFolder(RUNS, config.name).has(2), again


@pytest.mark.parametrize("steps", [1, 20, 200])
def test_a_corpus_that_is_read_often_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Beside a count of every sample that the run draws."""
    monkeypatch.chdir(tmp_path)
    config = changed(made_run(Path()), "train", max_steps=steps)
    corpora = Corpora.open(config)
    curriculum = corpora.curriculum()
    schedule, drawn = Schedule(config.seed, curriculum.phases), dict.fromkeys(curriculum.names, 0)
    for sample in range(steps * config.train.global_batch_size):
        (number,), _, _ = schedule.locate(sample, 1)
        drawn[curriculum.names[number]] += 1
    expected = {name: count / 49 for name, count in drawn.items() if count > 4 * 49}  # (800 - 1) // 16 samples each
    lines = repetitions(corpora)
    assert len(lines) == len(expected) == {1: 0, 20: 0, 200: 2}[steps]
    for line, (name, times) in zip(lines, expected.items(), strict=True):
        assert f"the run reads {name} {times:,.0f} times (800 tokens)" in line


def test_a_rank_that_fails_meanwhile_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes its record as another rank has begun to delete the folder."""
    folder = RunFolder(tmp_path / "runs", "refused")
    lock = folder.claim()

    def deleted(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        record_failure(folder.failed, BAD_INPUT, "found later", rank=1)
        path.rmdir()

    monkeypatch.setattr(shutil, "rmtree", deleted)
    with pytest.raises(InputError), folder.undone_on_failure(folder.nonce()):
        raise InputError("refused")
    lock.release()
    assert not (tmp_path / "runs").exists()
