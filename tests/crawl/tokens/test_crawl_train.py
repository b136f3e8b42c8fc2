"""The tokenizer is the one that Hugging Face's trainer learns from the same text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokens_corpus import Corpus, texts

from llm.crawl.counts import Counts
from llm.crawl.dedup.clusters import split_of_cluster
from llm.crawl.documents import write_documents
from llm.crawl.tokens.settings import TokenizerConfig
from llm.crawl.tokens.train import sample, train
from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.ranks import ENCODINGS
from llm.data.tokenizer.spelling import BYTES
from llm.errors import InputError


def test_the_tokenizer_of_gigatoken_is_that_of_the_library(tmp_path: Path, capfd: pytest.CaptureFixture):
    found = train(TokenizerConfig(vocab_size=900), texts(), "gigatoken", tmp_path)
    assert found.raw == Tokenizer.train(texts(), 900).raw
    assert found.raw == train(TokenizerConfig(vocab_size=900), texts(), "tokenizers", tmp_path).raw
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_pattern_of_o200k(tmp_path: Path):
    config = TokenizerConfig(vocab_size=600, pattern="o200k")
    some = [*texts(), "31415926 " * 500, "don't " * 500]
    found = train(config, some, "gigatoken", tmp_path)
    parts = json.loads(found.raw)
    assert parts["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": ENCODINGS["o200k_base"][0]}
    spelled = [bytes(BYTES[c] for c in token) for token in parts["model"]["vocab"] if set(token) <= BYTES.keys()]
    assert b"314" in spelled
    assert b"don't" in spelled or b" don't" in spelled
    assert not [token for token in spelled if re.search(rb"[0-9]{4}", token)]
    split = tokenizers.Tokenizer.from_str(found.raw.decode()).pre_tokenizer
    words = [word for word, _ in split.pre_tokenize_str("DON'T do 12345")]  # pyright: ignore[reportOptionalMemberAccess]
    assert words == ["DON'T", "Ġdo", "Ġ", "123", "45"]


def test_it_learns_from_the_training_split_alone(corpus: Corpus):
    counts = Counts()
    found = list(sample(corpus.parts, 1 << 30, 0.3, counts))
    expected = [d.text for d in corpus.documents if split_of_cluster(d.id, 0.3) == "train"]
    assert 0 < len(expected) < len(corpus.documents)
    assert found == expected
    assert (counts.documents_in, counts.bytes_in) == (len(expected), sum(len(text.encode()) for text in expected))


def test_a_sample_is_from_everywhere_and_within_the_limit(corpus: Corpus):
    documents = [replace(corpus.documents[60], id=i, text=f"{i:03} {'é' * 500}") for i in range(300)]
    parts = [corpus.out / "first.parquet", corpus.out / "second.parquet"]
    for number, part in enumerate(parts):
        write_documents(part, documents[150 * number : 150 * (number + 1)])
    found = [int(text[:3]) for text in sample(parts, 100_000, 0.3, Counts())]
    assert found == [int(text[:3]) for text in sample(parts, 100_000, 0.3, Counts())]
    assert len(found) > 30  # a third of 210
    assert len([i for i in found if i < 150]) > 10 < len([i for i in found if i >= 150])
    assert all(split_of_cluster(i, 0.3) == "train" for i in found)


def test_a_document_longer_than_the_limit_is_left_out(corpus: Corpus):
    part = corpus.out / "one.parquet"
    for i in range(8):  # the hash chooses most of them
        write_documents(part, [replace(corpus.documents[60], id=i, text="é" * 500)])
        assert list(sample([part], 999, 0.01, Counts())) == []
    assert list(sample([part], 10_000, 0.01, Counts())) == ["é" * 500]


def test_too_little_text(tmp_path: Path):
    with pytest.raises(InputError, match=r"gives \d+ tokens.*--tokenizer.vocab_size=\d+"):
        train(TokenizerConfig(vocab_size=5_000), ["a few words"], "gigatoken", tmp_path)
    with pytest.raises(InputError, match="gives 257 tokens"):
        train(TokenizerConfig(), [], "gigatoken", tmp_path)
