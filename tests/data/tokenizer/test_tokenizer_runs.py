"""From text to generated text with each kind of tokenizer: the end token and the padding are the same all the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_kinds import lines, ranks, real_text, tokenizer_json

from llm.config import DataConfig, RunConfig
from llm.config.reports import LoggingConfig
from llm.data.prepare.inspect import show
from llm.data.prepare.register import register
from llm.data.prepare.tokenise import prepare
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.folder import load_manifest
from llm.errors import Agreed, InputError
from llm.generate import stream
from llm.report import report
from llm.sampling import SamplingConfig
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from llm.trained import load_trained
from pool import RankPool
from tiny_run import case, plain

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
GIVEN = {
    # name: (data.tokenizer, data.end_token, model.vocab_size, id of the end token)
    "llama3": ("llama3.json", 2, 600, 2),
    "mistral": ("mistral.json", None, 704, 2),
    "bert": ("bert.json", "[SEP]", 700, 3),
    "tiktoken": ("r50k_base.tiktoken", None, 50304, 50256),
    "char": ("char", None, 200, None),
}


def written(folder: Path) -> Path:
    for kind in ("llama3", "mistral", "bert"):
        (folder / f"{kind}.json").write_text(tokenizer_json(kind))
    (folder / "r50k_base.tiktoken").write_bytes(lines(ranks()))
    texts = [*real_text().split("\n\n"), "of </s>, [SEP] and <|eot_id|> and <|end_of_text|>"]
    records = [json.dumps({"text": text}) for text in texts if text.strip()]
    (folder / "text.jsonl").write_text("\n".join(records))
    return folder


def config_of(name: str, **data) -> RunConfig:
    tokenizer, end_token, vocab_size, _ = GIVEN[name]
    fields = {"tokenizer": tokenizer, "end_token": end_token, "validation_fraction": 0.2, **data}
    made = case(model=dict(vocab_size=vocab_size), train=dict(engine="plain", max_steps=2))
    data_config = DataConfig(source="text.jsonl", path=f"data-{name}", seq_len=16, validation_samples=8, **fields)
    logging = LoggingConfig(sample_prompt="The d", sample_tokens=5, tensorboard=False)
    return plain(replace(made, name=name, data=data_config, logging=logging))


def trained(folder: Path) -> dict[str, dict]:
    """Prepare, train two steps, generate and report with each kind."""
    os.chdir(written(folder))
    found = {}
    for name in GIVEN:
        config, said, reported = config_of(name), list[str](), list[str]()
        manifest = prepare(config)
        assert prepare(config) == manifest
        RunFolder(RUNS, config.name).claim()
        run = start(config, CPU, said.append)
        assert run is not None
        train(run)
        run.engine.close()
        one = load_trained(Path("runs") / name, CPU)
        with torch.no_grad():  # were ids without a token drawn, these would be
            one.model.embedding.weight[one.tokenizer.vocab_size :] += 100 * one.model.norm.weight.sign()
        report(Path("runs") / name, reported.append)
        text = "".join(stream(one, ["The d"], 20, SamplingConfig(seed=2, temperature=2)))
        found[name] = {
            "eod": (manifest.eod_id, one.tokenizer.eod_id),
            "sizes": (manifest.vocab_size, config.model.vocab_size),
            "documents": ends(Path(f"data-{name}"), manifest.eod_id) == manifest.splits["train"].documents,
            "text": text,
            "report": "\n".join(reported),
            "show": show(run.source.corpora, 0),
            "said": "\n".join(said),
        }
    return found


def ends(folder: Path, eod_id: int) -> int:
    return int((np.fromfile(folder / "train.bin", "<u2") == eod_id).sum())


@pytest.mark.slow
def test_from_text_to_text(one_rank: RankPool, tmp_path: Path) -> None:
    (found,) = one_rank.run(trained, tmp_path)
    for name, (_, _, vocab_size, eod) in GIVEN.items():
        one = found[name]
        assert one["eod"][0] == one["eod"][1] == (eod if eod is not None else one["sizes"][0] - 1), name
        assert one["sizes"][0] <= vocab_size == one["sizes"][1]
        assert one["documents"], f"{name}: a text ends a document"
        assert one["text"].startswith("The d") and len(one["text"]) > 6
        assert "bits per byte" in one["report"] and "The d" in one["report"]
        assert f"padded to {vocab_size} (model.vocab_size)" in one["said"] or one["sizes"][0] == vocab_size
    assert found["llama3"]["sizes"] == (600, 600)
    assert found["mistral"]["sizes"][0] < 704
    assert "<|eot_id|> ends a document" in found["llama3"]["said"]


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written(tmp_path))


@pytest.mark.usefixtures("in_a_folder")
def test_another_end_token_is_another_preparation():
    manifest = prepare(config_of("llama3"))
    with pytest.raises(InputError, match=r"another data.end_token: found 2, expected 1; remove"):
        prepare(config_of("llama3", end_token=None))
    assert prepare(config_of("llama3", end_token="<|eot_id|>")) == manifest


def started(folder: Path) -> list[str]:
    os.chdir(written(folder))
    prepare(config_of("llama3"))
    messages = []
    for config in (config_of("llama3", end_token=None), config_of("llama3", end_token="<|eot|>")):
        RunFolder(RUNS, config.name).claim()
        try:
            start(config, CPU, lambda line: None)
        except Agreed as error:
            messages.append(str(error))
    return messages


def test_training_with_another_end_token_is_refused(one_rank: RankPool, tmp_path: Path) -> None:
    ((first, second),) = one_rank.run(started, tmp_path)
    assert "data-llama3 end with token 2, data.end_token is None: <|end_of_text|> (1); set --data.end_token=2" in first
    assert "has no token of name <|eot|>" in second


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("name", ["llama3", "mistral", "bert"])
def test_registered_files_know_their_end_token_and_bytes(name: str):
    config = config_of(name, validation_fraction=0.5)
    made = prepare(config)
    registered = replace(config, data=replace(config.data, path="registered"))
    found = register(registered, {split: f"data-{name}/{split}.bin" for split in ("train", "validation")})
    assert (found.eod_id, found.vocab_size) == (made.eod_id, made.vocab_size)
    assert load_manifest(registered) == found
    expected, counted = made.splits["validation"].bytes, found.splits["validation"].bytes
    if name == "bert":
        assert counted is None and found.bits_per_byte(1.0) is None
    else:  # Metaspace hides whether a document began with a space
        assert expected is not None and counted is not None and 0 <= expected - counted < 20


@pytest.mark.usefixtures("in_a_folder")
def test_registering_writes_the_tokenizer_of_a_rank_file():
    prepare(config_of("tiktoken"))
    config = config_of("tiktoken")
    config = replace(config, data=replace(config.data, path="registered"))
    register(config, {split: f"data-tiktoken/{split}.bin" for split in ("train", "validation")})
    assert Path("registered/tokenizer.json").read_bytes() == Path("data-tiktoken/tokenizer.json").read_bytes()
    assert Tokenizer.load(Path("registered/tokenizer.json")).eod_id == 50256


@pytest.mark.usefixtures("in_a_folder")
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    for name, size in (("llama3", 599), ("char", 40)):
        config = config_of(name)
        config = replace(config, model=replace(config.model, vocab_size=size))
        with pytest.raises(
            InputError, match=rf"tokens, model.vocab_size is {size}; set --model.vocab_size=\d+, or more"
        ):
            prepare(config)
    with pytest.raises(InputError, match=r"data.end_token is 1; expected null, as data.tokenizer char makes its own"):
        config_of("char", end_token=1)


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.slow
def test_the_script_says_that_the_vocabulary_is_padded():
    command = [sys.executable, str(ROOT / "launch/prepare_data.py"), "--data.source=text.jsonl", "--data.end_token=2"]
    command += ["--data.tokenizer=llama3.json", "--model.vocab_size=640", "--data.validation_fraction=0.2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "vocabulary 600, padded to 640 (model.vocab_size)" in result.stdout
