"""gigatoken gives the ids of Hugging Face's tokenizers, document by document, or the job stops."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Reference
from tokenizers import models, pre_tokenizers
from tokens_corpus import texts

from chosen import slow_but
from llm.crawl.tokens import encode
from llm.crawl.tokens.encode import UNUSUAL, Encoder
from llm.crawl.tokens.settings import TokenizerConfig
from llm.crawl.tokens.train import train
from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.cuts import pieces
from llm.errors import InputError

POOL = (
    "  \n\r\t'sStTdDmMrReEvVlLaA12\u0663\u00bd\u017fK\u0301\u200d\u00a0\u3000\u2028éßǅʰ中がक्🎉_-/.!\x85\x1c\ufeff\ufffd"
)


@pytest.fixture(scope="module", params=["gpt2", "o200k"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = TokenizerConfig(vocab_size=512, pattern=request.param)
    return train(config, texts(), "gigatoken", tmp_path_factory.mktemp("train"))


def reference(tokenizer: Tokenizer) -> Reference:
    """The library itself, without what Ingot puts around it: no text here is long."""
    inner = Reference.from_str(tokenizer.raw.decode())
    inner.encode_special_tokens = True
    return inner


def encoded(encoder: Encoder, some: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(pa.array(some, pa.large_string()))]


def test_ids_are_those_of_the_tokenizer(tokenizer: Tokenizer):
    some = [*texts()[:20], *UNUSUAL]
    assert encoded(Encoder(tokenizer, "gigatoken"), some) == tokenizer.encode_batch(some)[0]
    assert encoded(Encoder(tokenizer, "tokenizers"), some) == tokenizer.encode_batch(some)[0]


def test_ids_are_those_of_the_library_for_random_text(tokenizer: Tokenizer):
    rng = random.Random(1)
    some = ["".join(rng.choices(POOL, k=rng.randint(1, 40))) for _ in range(1_000)]
    expected = [encoding.ids for encoding in reference(tokenizer).encode_batch(some)]
    assert encoded(Encoder(tokenizer, "gigatoken"), some) == expected


@pytest.mark.parametrize("plane", slow_but([], range(17)))
def test_ids_are_those_of_the_library_for_every_character(tokenizer: Tokenizer, plane: int):
    characters = map(chr, range(plane << 16, plane + 1 << 16))
    some = [f"a{c}b {c}1 {c}{c}A{c}\n{c}" for c in characters if not 0xD800 <= ord(c) < 0xE000]
    expected = [encoding.ids for encoding in reference(tokenizer).encode_batch_fast(some)]
    assert encoded(Encoder(tokenizer, "gigatoken"), some) == expected


def test_a_part_of_an_array_is_encoded(tokenizer: Tokenizer):
    some = texts()[5:9]
    found = Encoder(tokenizer, "gigatoken").encode(pa.array(some, pa.large_string()).slice(1, 2))
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in some[1:3]]


def test_the_cache_begins_anew(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(tokenizer, "gigatoken")
    monkeypatch.setattr(encode, "RENEWED", 1_500)
    seen = []
    for text in texts()[5:9]:
        assert encoded(encoder, [text]) == [tokenizer.encode(text)]
        seen.append(encoder._fast)
    assert [seen.index(fast) for fast in seen] == [0, 0, 2, 2]


def test_the_place_of_a_difference_is_named(tokenizer: Tokenizer):
    text = "A café, and 🎉 then some more"
    ids = np.array(tokenizer.encode(text), np.uint32)
    at = next(i for i in range(len(ids)) if "🎉" in tokenizer.decode(ids[:i].tolist()))
    ids[at] += 1
    place = len(tokenizer.decode(ids[:at].tolist()))
    with pytest.raises(InputError, match=rf"document 7: from character {place} on .*tokenize.library=tokenizers"):
        Encoder(tokenizer, "tokenizers").check(text, ids, "document 7")
    with pytest.raises(InputError, match=rf"from character {len(text)} on"):
        Encoder(tokenizer, "tokenizers").check(text, np.append(tokenizer.encode(text), 5).astype(np.uint32), "it")


def test_a_tokenizer_that_gigatoken_takes_otherwise_is_refused(tokenizer: Tokenizer):
    parts = json.loads(tokenizer.raw)
    parts["model"] |= {"ignore_merges": True, "vocab": parts["model"]["vocab"] | {"PAD": 512}}
    parts["added_tokens"].append(dict(parts["added_tokens"][0], id=512, content="PAD"))
    special = Tokenizer(json.dumps(parts).encode())
    assert 512 not in special.encode("PAD")  # but gigatoken finds the word
    with pytest.raises(InputError, match=r"every tokenizer is tried with: from character 0 on \('PAD'\).*\[512\]"):
        Encoder(special, "gigatoken")
    assert encoded(Encoder(special, "tokenizers"), ["PAD"]) == [special.encode("PAD")]


def test_what_gigatoken_cannot_read_is_refused():
    words = Reference(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<|endoftext|>"])
    tokenizer = Tokenizer(words.to_str().encode())
    with pytest.raises(InputError, match=r"gigatoken cannot read the tokenizer: .*; set tokenize.library=tokenizers"):
        Encoder(tokenizer, "gigatoken")
    assert encoded(Encoder(tokenizer, "tokenizers"), ["a b a"]) == [[1, 2, 1]]


def test_without_gigatoken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(InputError, match=r"pip install 'ingot\[crawl\]', or set tokenize.library=tokenizers"):
        Encoder(tokenizer, "gigatoken")
    assert encoded(Encoder(tokenizer, "tokenizers"), ["a text"]) == [tokenizer.encode("a text")]


def test_texts_that_are_encoded_whole_need_no_forced_cut(monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(1)
    monkeypatch.setattr(encode, "LONGEST_PIECE", 12)
    often = ["ab ", "c ", "word ", "я ", "слово "]
    rare = ["中 ", "x" * 9, "y" * 11, "\u00a0 ", "\u3000", "\u2009 ", "\n", "\x1f ", " "]
    some = ["".join(rng.choices(often * 4 + rare, k=rng.randint(1, 30))) for _ in range(20_000)]
    whole = [text for text in some if encode._has_cuts(text.encode())]
    assert sum(len(text) > 24 for text in whole) > 500
    assert not [text for text in whole if pieces(text, 12)[1]]


def test_only_texts_without_spaces_are_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    encoder, seen = Encoder(tokenizer, "gigatoken"), list[str]()
    monkeypatch.setattr(encode, "pieces", lambda text, limit: seen.append(text) or pieces(text, limit))
    some = ["a line of words " * 5_000, "x" * 20_000, "слова и слова " * 3_000]
    assert encoded(encoder, some) == tokenizer.encode_batch(some)[0]
    assert seen == some[1:2]
