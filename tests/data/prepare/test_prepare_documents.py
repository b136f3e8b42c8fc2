"""What becomes of documents: few of them, long ones, empty ones, and how often they are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizer_kinds import tokenizer_json

from llm.data.corpus import TextCorpus
from llm.data.corpus import pieces as cutting
from llm.data.corpus import texts as reading
from llm.data.prepare import tokenise as preparing
from llm.data.prepare.console import summary
from llm.data.prepare.tokenise import prepare
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.folder import load_manifest
from llm.data.tokens.manifest import TextCounts
from llm.data.tokens.megatron import read_index
from test_prepare_tokenise import (
    DOCUMENTS,
    chosen,
    document,
    hashes,
    in_a_folder,  # noqa: F401 - a fixture
    make_config,
    refused,
    split_text,
    write_corpus,
)  # fmt: skip


def text_of(folder: str, split: str) -> list[str]:
    tokens, index = np.fromfile(f"{folder}/{split}.bin", "<u2"), read_index(Path(folder) / split)
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json")
    documents = np.split(tokens, np.cumsum(index.lengths)[:-1])
    assert all(ids[-1] == tokenizer.eod_id for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in documents]


@pytest.mark.parametrize("given", [False, True])
def test_one_text_is_split_inside(given: bool):
    """nanoGPT's input.txt: one file, whose end is for validation."""
    text = "\n".join(document(i) for i in range(200)) + "\n"
    Path("input.txt").write_text(text)
    prepare(make_config(path="first"))
    name = "first/tokenizer.json" if given else "train"
    config = make_config(path="folder", source="input.txt", tokenizer=name, validation_fraction=0.1)
    manifest = prepare(config)
    (train,), (validation,) = text_of("folder", "train"), text_of("folder", "validation")
    assert train + validation == text and train[-1] == "\n"
    assert len(validation.encode()) == pytest.approx(0.1 * len(text.encode()), abs=300)
    assert manifest.text == TextCounts(inside=True)
    assert [split.documents for split in manifest.splits.values()] == [1, 1]
    assert manifest.splits["validation"].bytes == len(validation.encode())
    assert "the last 10.000% of each are for validation" in summary(Path("folder"), manifest, 300)
    assert prepare(config) == manifest == load_manifest(config)


@pytest.mark.parametrize(("count", "inside"), [(1, True), (19, True), (20, False)])
def test_few_documents_are_each_split_inside(count: int, inside: bool):
    texts = [text for text in DOCUMENTS if chosen(text) == "train"][: count - 1] + split_text("validation")[:1]
    write_corpus(Path("text.jsonl"), [*texts, ""])
    manifest = prepare(make_config(260, path="few"))
    assert manifest.text == TextCounts(inside=inside, empty=1)
    train, validation = text_of("few", "train"), text_of("few", "validation")
    if inside:
        assert [a + b for a, b in zip(train, validation, strict=True)] == texts
    else:
        assert train + validation == texts


def test_what_is_passed_over_is_counted_and_said():
    Path("texts").mkdir()
    write_corpus(Path("texts/a.jsonl"), [*DOCUMENTS, "", ""])
    Path("texts/README.md").write_text("about")
    Path("texts/empty.txt").touch()
    manifest = prepare(make_config(source="texts"))
    assert manifest.text == TextCounts(empty=3, others={".md": 1})
    said = "  3 documents without text, passed over\n  1 other files, passed over: 1 .md\n"
    assert said in summary(Path("x"), manifest, 300)
    path = Path("data/texts-280/manifest.json")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "text"}))
    assert prepare(make_config(source="texts")) == dataclasses.replace(manifest, text=None)  # as before the counts
    refused(make_config(source="texts", path="strict", empty="error"), r"a\.jsonl, line 61: found no text")
    assert not Path("strict").exists()


def test_cut_words_are_counted(monkeypatch: pytest.MonkeyPatch):
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts, begins: (encode(self, texts, begins)[0], len(texts))
    )
    manifest = prepare(make_config())
    assert manifest.text == TextCounts(cut_words=len(DOCUMENTS))
    assert "60 words too long for the tokenizer, cut" in summary(Path("x"), manifest, 300)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_documents_are_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch, kind: str):
    """The shards are those of whole documents, and no call of the tokenizer gets more than a little text."""
    texts = [" ".join(document(i) + "\n" * (i % 3) for i in range(k, k + 70)) for k in range(24)]
    Path("texts").mkdir()
    if kind == "jsonl":
        write_corpus(Path("texts/a.jsonl"), texts)
    else:
        for i, text in enumerate(texts):
            Path(f"texts/{i:02}.txt").write_text(text)
    whole = prepare(make_config(path="whole", source="texts"))
    encode, sizes = Tokenizer.encode_batch, []
    monkeypatch.setattr(cutting, "PIECE", 1000)
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(cutting, "WINDOW", 300)
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(
        Tokenizer,
        "encode_batch",
        lambda self, texts, begins: (sizes.append(sum(map(len, texts))), encode(self, texts, begins))[1],
    )
    assert prepare(make_config(path="parts", source="texts")) == whole
    assert hashes(Path("parts")) == hashes(Path("whole"))
    assert max(sizes) <= 6000 < min(map(len, texts))


@pytest.mark.parametrize("kind", ["llama2", "mistral"])
def test_no_space_is_put_between_the_pieces_of_a_document(monkeypatch: pytest.MonkeyPatch, kind: str):
    """Tokenizers that put a space before a text put one before a document, not before each piece of it."""
    Path("given.json").write_text(tokenizer_json(kind))
    text = "\n".join(f"line {i} of one text" for i in range(400))
    write_corpus(Path("text.jsonl"), [*(text for text in DOCUMENTS if chosen(text) == "validation"), text])
    monkeypatch.setattr(cutting, "PIECE", 1000)
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 2000)
    prepare(make_config(2000, path="out", tokenizer="given.json", validation_fraction=0.2))
    tokenizer = Tokenizer.load(Path("given.json"))
    ids = np.fromfile("out/train.bin", "<u2")
    assert tokenizer.decode(ids[:-1].tolist()) == text


@pytest.mark.parametrize(("tokenizer", "passes"), [("trained/tokenizer.json", 1), ("train", 2)])
def test_the_text_is_read_once_or_twice(monkeypatch: pytest.MonkeyPatch, tokenizer: str, passes: int):
    prepare(make_config(path="trained"))
    read = []

    def documents(self):
        for found in TextCorpus.documents(self):
            read.append(list(found))
            yield read[-1]

    counting = type("Counting", (TextCorpus,), {"documents": documents})
    monkeypatch.setattr(preparing, "TextCorpus", lambda *args: counting(*args))
    prepare(make_config(path="again", tokenizer=tokenizer))
    assert len(read) == preparing.FEW + passes * len(DOCUMENTS)  # the first tell whether there are few
    read.clear()
    prepare(make_config(path="again", tokenizer=tokenizer))
    assert len(read) == len(DOCUMENTS)
