"""A trained classifier is used: probabilities by the definition, and as the command prints them."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from states import state_of
from thread_ranks import ranks_in_threads
from torch import Tensor

from llm.checkpoint.writer import write_checkpoint
from llm.cluster.ranks import discover_ranks
from llm.config import RunConfig
from llm.config.parse import to_dict
from llm.errors import InputError
from llm.finetune.classify import Classification
from llm.finetune.labels import ROWS, probabilities
from llm.train.engines.base import Engine
from llm.trained import Trained, load_trained
from pool import RankPool
from test_finetune_classify import HEAD, LAYOUTS, WORDS, T, alone, prepared, some_texts, spread
from tiny_run import case
from trained_run import write_run

SCRIPT = Path(__file__).resolve().parents[2] / "launch/classify.py"
LORA = dict(lora=dict(rank=4), train=dict(init_from="runs/base"))


def save(folder: Path, config: RunConfig, source: Classification, engine: Engine) -> None:
    """Make `folder` a run with the engine's checkpoint of step 30. Collective."""
    state = state_of(30, config=to_dict(config), data=source.identity(), engine=engine.scalar_state())
    write_checkpoint(folder / "checkpoints", 30, engine.state_pieces(), state, keep_last=1)
    shutil.copy(config.data.tokenizer, folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["whole", "lora"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Engine, Path]:
    """A classifier as it is read, the engine that trained it, and its run."""
    folder = tmp_path_factory.mktemp(request.param)
    config = prepared(folder, **LORA if request.param == "lora" else {})
    source, engine, _ = alone(config, 30)
    with ranks_in_threads(1):
        save(folder / "run", config, source, engine)
    return load_trained(folder / "run", classifier=True), engine, folder / "run"


def by_definition(engine: Engine, ids: list[int]) -> Tensor:
    """One text alone through the model that was trained: no padding, no documents."""
    model: Any = engine.model.eval()
    with torch.no_grad():
        states = model.states(torch.tensor([ids]), torch.arange(len(ids)), torch.arange(1), None, None)
        return F.linear(states[0, -1], model.get_parameter(HEAD)).softmax(-1)


def found_of(trained: Trained, texts: list[str]) -> list[Tensor]:
    return list(probabilities(trained, texts, lambda note: pytest.fail(note)))


def test_probabilities_are_those_of_each_text_alone(trained: tuple[Trained, Engine, Path]) -> None:
    """In batches of texts of other lengths, the last of which is not full."""
    model, engine, _ = trained
    lines = some_texts()
    texts = [line["text"] for line in lines][: 2 * ROWS + 3]
    found = found_of(model, texts)
    assert len({len(model.tokenizer.encode(text)) for text in texts}) > 3
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(row, by_definition(engine, model.tokenizer.encode(text)), atol=1e-5, rtol=1e-4)
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found_of(model, [text])[0], row, atol=1e-6, rtol=1e-5)
    assert model.labels == (*WORDS,) and model.config.lora.rank == 0
    right = [model.labels[int(row.argmax())] == line["label"] for row, line in zip(found, lines, strict=False)]
    assert sum(right) > 0.8 * len(right)


def test_a_text_that_is_too_long_loses_its_end_and_it_is_said(trained: tuple[Trained, Engine, Path]) -> None:
    model, engine, _ = trained
    long, said = "one two " * 20, list[str]()
    found = list(probabilities(model, ["red", long], said.append))
    ids = model.tokenizer.encode(long)
    torch.testing.assert_close(found[1], by_definition(engine, ids[:T]), atol=1e-5, rtol=1e-4)
    assert said == [f"text 2 has {len(ids)} tokens, more than the training's data.seq_len, {T}: its end is not read"]


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_text_is_refused_before_any_is_read(empty: str, trained: tuple[Trained, Engine, Path]) -> None:
    with pytest.raises(InputError, match="text 2: the text is empty"):
        next(probabilities(trained[0], ["red", empty], lambda note: None))


def test_each_kind_of_model_is_refused_where_the_other_is_expected(
    trained: tuple[Trained, Engine, Path], tmp_path: Path
) -> None:
    language = write_run(tmp_path / "language", case(model=dict(vocab_size=261)))
    with pytest.raises(InputError, match="step-00000005 is a language model; expected a classifier"):
        load_trained(language, classifier=True)
    with pytest.raises(InputError, match="step-00000030 is a classifier; expected a language model"):
        load_trained(trained[2])
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="is a language model; expected a classifier"):
        load_trained(tmp_path, classifier=True)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """What the command prints on its two streams, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])  # whose first entry the script replaces
        patch.setattr(sys, "argv", ["classify.py", *words])
        runpy.run_path(str(SCRIPT))["main"](discover_ranks({}))
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_the_command_prints_a_line_for_each_text(
    trained: tuple[Trained, Engine, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, run = trained
    texts = ["a red", "7 is dog", "one two " * 20]
    (tmp_path / "text").write_text(texts[2])
    words = [f"--checkpoint={run}", f"--file={tmp_path / 'text'}", *(f"--text={text}" for text in texts[:2])]
    lines, err = printed(capsys, *words)
    rows = list(probabilities(model, texts, lambda note: None))
    assert lines == [f"{model.labels[int(row.argmax())]}\t{float(row.max()):.3f}" for row in rows]
    assert [line.split("\t")[0] for line in lines] == ["colours", "animals", "numbers"]
    assert err.startswith("text 3 has ")
    lines, _ = printed(capsys, *words, "--json")
    for line, row in zip(lines, rows, strict=True):
        assert json.loads(line) == pytest.approx(dict(zip(WORDS, row.tolist(), strict=True)), abs=1e-6)
    for wrong, message in (([], "there is no text"), (["--file=none"], "none: expected a file that can be read")):
        with pytest.raises(InputError, match=message):
            printed(capsys, f"--checkpoint={run}", *wrong)


@pytest.mark.slow
def test_labels_for_a_full_disk_are_a_failure(trained: tuple[Trained, Engine, Path]) -> None:
    command = [sys.executable, SCRIPT, f"--checkpoint={trained[2]}", "--text=red"]
    for place, code in (("/dev/full", 1), (os.devnull, 0)):
        with open(place, "w") as stream:
            assert subprocess.run(command, stdout=stream, check=False).returncode == code


def saved_on_ranks(config: RunConfig, folder: Path) -> None:
    source, engine, _ = spread(config, 3)
    save(folder, config, source, engine)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_what_is_read(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Three labels over two tensor-parallel ranks: the head was padded."""
    config = prepared(tmp_path, **LAYOUTS[name])
    two_ranks.run(saved_on_ranks, config, tmp_path / "run")
    _, engine, _ = alone(config, 3)
    model = load_trained(tmp_path / "run", classifier=True)
    texts = [line["text"] for line in some_texts()][:9]
    for text, row in zip(texts, found_of(model, texts), strict=True):
        torch.testing.assert_close(row, by_definition(engine, model.tokenizer.encode(text)), atol=1e-3, rtol=1e-2)
    assert model.labels == (*WORDS,)
