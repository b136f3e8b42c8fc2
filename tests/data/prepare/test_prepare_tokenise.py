"""Raw text to token shards: whole or not at all, never over something else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from llm.data.corpora import Corpora, unprepared
from llm.data.loader import open_loader, validation_batches
from llm.data.prepare import tokenise as preparing
from llm.data.prepare.bigram import bigram_loss
from llm.data.prepare.console import prepare_all
from llm.data.prepare.tokenise import prepare, split_of
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.folder import data_folder, load_manifest
from llm.data.tokens.hashes import sampled_hash
from llm.data.tokens.megatron import read_index
from llm.errors import InputError, Stopped

ROOT = Path(__file__).resolve().parents[3]


def document(i: int) -> str:
    words = ["alpha", "beta", "gamma", "delta", "naïve", "日本", "<|endoftext|>"]
    return f"document {i}: " + " ".join(words[(i * k) % 7] for k in range(1, 30))


DOCUMENTS = [document(i) for i in range(60)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder with the corpus text.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("text.jsonl"), DOCUMENTS)
    return tmp_path


def write_corpus(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def make_config(vocab_size: int = 280, **data) -> RunConfig:
    fields = {"source": "text.jsonl", "seq_len": 16, "validation_fraction": 0.2} | data
    return RunConfig(
        model=ModelConfig(vocab_size=vocab_size),
        data=DataConfig(**fields),
        train=TrainConfig(global_batch_size=4, micro_batch_size=2),
    )


def chosen(text: str, fraction: float = 0.2) -> str:
    return split_of(hashlib.sha256(text.encode()).digest(), fraction)


def split_text(split: str, fraction: float = 0.2) -> list[str]:
    return [text for text in DOCUMENTS if chosen(text, fraction) == split]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_shards_hold_the_documents():
    config, stages = make_config(), []
    manifest = prepare(config, lambda stage, done, total: stages.append((stage, done, total)))
    folder = data_folder(config)
    assert folder == Path("data/text-280")
    assert sorted(os.listdir("data")) == ["text-280"]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert sorted(os.listdir(folder)) == sorted([*manifest.all_files(), "manifest.json"])
    for split in ("train", "validation"):
        texts, counts, index = split_text(split), manifest.splits[split], read_index(folder / split)
        assert counts.documents == index.bounds.size - 1 == len(texts) > 0
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        tokens = np.fromfile(folder / f"{split}.bin", "<u2")
        assert counts.tokens == tokens.size
        found = np.split(tokens, np.cumsum(index.lengths)[:-1])
        for text, ids in zip(texts, found, strict=True):
            assert ids[-1] == manifest.eod_id
            assert manifest.eod_id not in ids[:-1]
            assert tokenizer.decode(ids[:-1].tolist()) == text
    assert manifest == load_manifest(config)
    train, validation = (np.fromfile(folder / f"{s}.bin", "<u2") for s in ("train", "validation"))
    assert manifest.bigram_nats_per_token == bigram_loss(train, validation, 280, 16)
    assert manifest.bigram_seq_len == 16
    total = sum(len(text.encode()) for text in DOCUMENTS)
    assert [s for s in stages if s[1] == total and s[0] == "tokenising"] == [("tokenising", total, total)]


def test_the_manifest_has_a_sample_of_the_tokens():
    for name, split in prepare(make_config()).splits.items():
        assert split.shards.sampled == sampled_hash([f"data/text-280/{name}.bin"])


def test_the_split_goes_by_hash_alone():
    texts = [f"text {i}" for i in range(4000)]
    share = sum(chosen(text, 0.1) == "validation" for text in texts) / len(texts)
    assert share == pytest.approx(0.1, abs=0.02)
    larger = [chosen(text, 0.2) == "validation" for text in texts]
    assert all(big for text, big in zip(texts, larger, strict=True) if chosen(text, 0.1) == "validation")
    write_corpus(Path("text.jsonl"), DOCUMENTS[::-1])
    manifest = prepare(make_config())
    assert manifest.splits["validation"].documents == len(split_text("validation"))


def test_the_tokenizer_learns_from_the_training_split_alone():
    unseen = next(text for i in range(99) if chosen(text := f"{i}" + "zq" * 99) != "train")
    write_corpus(Path("text.jsonl"), [*DOCUMENTS, unseen])
    prepare(make_config())
    Tokenizer.train(iter(split_text("train")), 280).save(Path("expected.json"))
    Tokenizer.train(iter([*DOCUMENTS, unseen]), 280).save(Path("of_all.json"))
    found = Path("data/text-280/tokenizer.json").read_bytes()
    assert found == Path("expected.json").read_bytes() != Path("of_all.json").read_bytes()


def test_preparing_again_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    config = make_config()
    first = prepare(config)
    before = hashes(data_folder(config))
    Path("text.jsonl").rename("copy.jsonl")  # the documents count, not the file's name
    monkeypatch.setattr(preparing, "_write", None)
    again = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="copy.jsonl", path="data/text-280")
    )
    assert prepare(again) == first
    assert hashes(data_folder(config)) == before


def test_preparing_is_repeatable():
    prepare(make_config(path="a"))
    prepare(make_config(path="b"))
    assert hashes(Path("a")) == hashes(Path("b"))


def refused(config: RunConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(config)


def test_another_folder_is_never_overwritten():
    config = make_config(path="shards")
    prepare(config)
    before = hashes(Path("shards"))
    refused(make_config(path="shards", validation_fraction=0.3), "data.validation_fraction: found 0.2")
    refused(make_config(270, path="shards"), "model.vocab_size: found 280, expected 270")
    given = make_config(path="shards", tokenizer="shards/tokenizer.json")
    refused(given, "another data.tokenizer: found train")
    write_corpus(Path("text.jsonl"), [*DOCUMENTS, "one more"])
    refused(config, "from text.jsonl with another text of text.jsonl")
    assert hashes(Path("shards")) == before

    Path("mine").mkdir()
    Path("mine/notes").write_text("keep")
    refused(make_config(path="mine"), "no folder of prepared data; remove the folder")
    Path("file").write_text("keep")
    refused(make_config(path="file"), "no folder of prepared data")
    assert Path("file").read_text() == Path("mine/notes").read_text() == "keep"
    Path("empty").mkdir()
    prepare(make_config(path="empty"))


def test_damage_is_found():
    config = make_config()
    prepare(config)
    path = data_folder(config) / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    refused(config, r"train\.bin: sha256")
    path.write_bytes(raw[:-2])
    refused(config, r"train\.bin has .* the manifest says .*prepare the data again")


def test_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_tokenise", full)
        refused(make_config(), "data/text-280 cannot be written: .*No space left")
    assert os.listdir("data") == []
    refused(make_config(2000), "corpus is too small")
    assert os.listdir("data") == []


def test_links_are_followed_and_what_cannot_be_made_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    for folder in ("elsewhere", "elsewhere/empty"):
        Path(folder).mkdir()
    for link, target in {"link": "elsewhere/empty", "dangling": "elsewhere/new"}.items():
        Path(link).symlink_to(target)
        manifest = prepare(make_config(path=link))
        assert Path(link).is_symlink() and load_manifest(make_config(path=target)) == manifest
    assert sorted(os.listdir("elsewhere")) == ["empty", "new"]
    assert Path("link").stat().st_mode == Path("elsewhere").stat().st_mode  # whoever may read its neighbours reads it
    monkeypatch.setattr(preparing, "_write", None)
    refused(make_config(path="text.jsonl/below"), "text.jsonl/below cannot be made: Not a directory")


def test_a_faster_process_wins(monkeypatch: pytest.MonkeyPatch):
    config, write = make_config(), preparing._write

    def slow(*args):
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "_write", write)
            prepare(config)  # another process, in the meantime
        return write(*args)

    monkeypatch.setattr(preparing, "_write", slow)
    assert prepare(config) == load_manifest(config)
    assert os.listdir("data") == ["text-280"]


def test_a_corpus_that_changes_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch):
    train = Tokenizer.train

    def meanwhile(documents, vocab_size):
        tokenizer = train(documents, vocab_size)
        write_corpus(Path("text.jsonl"), DOCUMENTS[:-10])
        return tokenizer

    monkeypatch.setattr(preparing.Tokenizer, "train", meanwhile)
    refused(make_config(), "changed while it was read")


def test_empty_splits_are_refused():
    write_corpus(Path("text.jsonl"), split_text("train"))
    refused(make_config(), "the validation split is empty")
    write_corpus(Path("text.jsonl"), split_text("validation"))
    refused(make_config(), "the train split is empty")
    write_corpus(Path("text.jsonl"), ["x"])  # which cannot be divided
    refused(make_config(257), "the validation split is empty: the corpus has 1 documents")
    Path("text.jsonl").write_text("")
    refused(make_config(), r"text\.jsonl holds no text")


def test_a_given_tokenizer_is_copied():
    prepare(make_config(path="trained"))
    given = make_config(path="given", tokenizer="trained/tokenizer.json")
    manifest = prepare(given)
    assert manifest.tokenizer == manifest.tokenizer_sha256
    assert Path("given/train.bin").read_bytes() == Path("trained/train.bin").read_bytes()
    assert prepare(given) == manifest
    other = make_config(279, path="other", tokenizer="trained/tokenizer.json")
    refused(other, "has 280 tokens, model.vocab_size is 279; set --model.vocab_size=280")
    padded = make_config(281, path="given", tokenizer="trained/tokenizer.json")
    assert prepare(padded) == manifest == load_manifest(padded)
    refused(make_config(tokenizer="none.json"), "none.json cannot be read")


def test_training_needs_prepared_data():
    config = make_config()
    with pytest.raises(InputError, match=r"run python launch/prepare_data\.py --config"):
        load_manifest(config)
    prepare(config)
    other = make_config(279, path="data/text-280")
    with pytest.raises(InputError, match=r"vocabulary of 280, model.vocab_size is 279"):
        load_manifest(other)


def test_a_validation_split_shorter_than_a_sample():
    write_corpus(Path("text.jsonl"), [*split_text("train"), split_text("validation")[0]])
    config = make_config(path="long", seq_len=128)
    manifest = prepare(config)
    assert manifest.splits["validation"].tokens <= 128
    assert manifest.bigram_nats_per_token is None
    with pytest.raises(InputError, match=r"the validation split has .* needs 129"):
        validation_batches(Corpora.open(config), dp_rank=0, dp_size=1)


def test_prepared_data_loads():
    config = make_config()
    prepare(config)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    batches = loader.next_step().batches
    loader.close()
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 17)] * 2


@pytest.mark.parametrize("polls", [0, 1, 2])
def test_a_preparation_that_is_left_begins_anew(polls: int):
    config, left = make_config(), iter(range(polls))

    def poll():
        if next(left, None) is None:
            raise Stopped

    prepare_all(config)
    whole = hashes(data_folder(config))
    shutil.rmtree("data")
    with pytest.raises(Stopped):
        prepare_all(config, poll)
    assert unprepared(config)
    prepare_all(config)
    assert hashes(data_folder(config)) == whole


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "launch/prepare_data.py"
    command = [sys.executable, str(script), "--data.source=text.jsonl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_script():
    arguments = ["--model.vocab_size=280", "--data.seq_len=16", "--data.validation_fraction=0.2"]
    for _ in range(2):
        result = run_script(*arguments)
        assert result.returncode == 0, result.stderr
        assert "nats per token" in result.stdout
        assert "bits per byte" in result.stdout
        assert "bytes per token" in result.stdout
    result = run_script("--model.vocab_size=280")
    assert result.returncode == 2
    assert "error: data/text-280 was prepared from text.jsonl with another" in result.stderr
    assert "Traceback" not in result.stderr
