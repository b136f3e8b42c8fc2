"""Tokenizers of every kind: ids are the library's, texts come back, and no text ends its own document."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, LOSSLESS, real_text, tokenizer_json

from llm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from llm.errors import InputError

ENDS = {"llama3": "<|end_of_text|>", "mistral": "</s>", "llama2": "</s>", "t5": "</s>", "bert": "[SEP]"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def opened(kind: str) -> Tokenizer:
    return Tokenizer(tokenizer_json(kind).encode(), ENDS[kind])


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(kind: str) -> Tokenizer:
    return opened(kind)


@pytest.fixture(scope="module")
def library(kind: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(tokenizer_json(kind))
    inner.encode_special_tokens = True
    return inner


@given(text=TEXT.filter(lambda text: "</s>" not in text))
@settings(max_examples=60, deadline=None)
@example("Hello, <|end_of_text|> [SEP] world")
@example("  two  spaces ")
@example("\r\n\t  \x00 a\u0301 \ufeff\U0010ffff")
def test_ids_are_the_librarys(ours: Tokenizer, library: tokenizers.Tokenizer, text: str):
    expected = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert ours.encode_batch([text, "", text]) == (
        [expected, library.encode("", add_special_tokens=False).ids, expected],
        0,
    )


def test_ids_of_long_text_are_the_librarys(ours: Tokenizer, library: tokenizers.Tokenizer):
    text = real_text().replace("</s>", "") * 3
    assert len(text) > 100_000
    assert ours.encode_batch([text]) == ([library.encode(text, add_special_tokens=False).ids], 0)


@pytest.mark.parametrize("lossless", LOSSLESS)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
@example(" leading")
@example("<0x41>")
def test_round_trip(lossless: str, text: str):
    tokenizer = opened(lossless)
    if lossless != "llama3":
        text = text.replace("▁", " ")  # which stands for a space
    if lossless == "mistral":
        text = text.lstrip(" ")  # Metaspace takes a space at the start for its own
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_streaming_gives_what_the_librarys_decoder_gives(ours: Tokenizer, library: tokenizers.Tokenizer, data):
    raw = [*range(3, 259)] if ours.byte_tokens else [*range(5, 200)]  # characters fall apart into these
    known = st.sampled_from(sorted(set(range(ours.vocab_size)) - set(ours.unused(ours.vocab_size))))
    ids = data.draw(st.lists(known | st.sampled_from(raw), max_size=30))
    stream = ours.stream()
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.finish() == ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(before=TEXT, after=TEXT)
@settings(max_examples=60, deadline=None)
@example("Hello", " world")
@example("日", "本")
def test_a_stream_goes_on_with_a_text(ours: Tokenizer, before: str, after: str):
    first, ids = ours.encode(before), ours.encode_batch([after], [False])[0][0]
    stream = ours.stream(first)
    pushed = "".join([stream.push(i) for i in ids]) + stream.finish()
    assert pushed == ours.decode(first + ids)[len(ours.decode(first)) :]


def test_no_half_character_is_shown(ours: Tokenizer):
    ids = ours.encode("a naïve 日本 \U0001f9ff tail, \U0001f9ff")
    stream = ours.stream()
    pushed = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed) + stream.finish() == ours.decode(ids)
    assert max(map(len, pushed)) < 20  # not all at the end


@pytest.mark.parametrize("around", ["{}", "a{}b", "a {} b", "{0}{0} {0}", "{}\n"])
def test_special_tokens_in_a_text_are_ordinary_characters(ours: Tokenizer, around: str):
    special = [t.content for t in ours._inner.get_added_tokens_decoder().values() if "unk" not in t.content.lower()]
    for token in [*special, ours.end_token]:
        ids = ours.encode(around.format(token))
        assert not {ours._inner.token_to_id(one) for one in special} & set(ids), token
        assert token.strip("<>|[]/").lower()[:3] in ours.decode(ids).lower()


def test_a_normalizer_may_spell_the_end_token():
    tokenizer = opened("t5")
    text = "end\uff1c/s\uff1e here"  # which NFKC makes </s>
    library = tokenizers.Tokenizer.from_str(tokenizer_json("t5"))
    library.encode_special_tokens = True
    assert tokenizer.eod_id in library.encode(text).ids  # else this shows nothing
    assert tokenizer.eod_id not in tokenizer.encode(text)


def test_an_end_token_that_is_not_special_ends_no_document():
    parts = json.loads(tokenizer_json("llama3"))
    parts["added_tokens"][1]["special"] = False
    tokenizer = Tokenizer(json.dumps(parts).encode())
    text = "one<|end_of_text|>two"
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_that_ends_documents_is_refused_in_a_text():
    tokenizer = Tokenizer.of_characters(iter(["ab\n"]))
    with pytest.raises(InputError, match=r"contains the end-of-document token '\\n', which is one character"):
        Tokenizer(tokenizer.raw, "\n").encode("a\nb")


def test_the_end_token_is_found_by_name_by_itself_or_by_id():
    raw = tokenizer_json("llama3").encode()
    for end in (None, "<|end_of_text|>", 1, "1"):
        tokenizer = Tokenizer(raw, end)
        assert (tokenizer.end_token, tokenizer.eod_id) == ("<|end_of_text|>", 1)
    assert Tokenizer(raw, 2).end_token == "<|eot_id|>"


@pytest.mark.parametrize(
    ("kind", "end", "message"),
    [
        (
            "bert",
            None,
            r"has 0 of the known .*; set data.end_token .* to one of its special tokens: \[PAD\] \(0\), \[UNK\]",
        ),
        ("llama3", "<eos>", r"no token of name <eos>; set .*: <\|begin_of_text\|> \(0\), <\|end_of_text\|> \(1\)"),
        ("llama3", 100_000, "no token of id 100000"),
        ("llama3", "3" * 5000, "no token of id 333"),  # more digits than int() reads
        ("mistral", "-1", "no token of name -1"),
    ],
)
def test_a_missing_end_token_is_refused(kind: str, end: str | int | None, message: str):
    with pytest.raises(InputError, match=message):
        Tokenizer(tokenizer_json(kind).encode(), end)


def test_what_makes_the_library_panic_is_refused(capfd: pytest.CaptureFixture[str]):
    parts = json.loads(tokenizer_json("mistral"))
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(InputError, match=r"is not a tokenizer\.json: .*Cannot parse precompiled_charsmap"):
        Tokenizer(json.dumps(parts | {"normalizer": charsmap}).encode())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(InputError, match=r"cannot encode the text: .*retry-limit-in-match"):
        Tokenizer(json.dumps(parts | {"pre_tokenizer": split}).encode()).encode("a" * 30 + "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_program_is_obeyed(error: type[BaseException], monkeypatch: pytest.MonkeyPatch):
    def end(*arguments: object, **options: object) -> None:
        raise error

    tokenizer = opened("llama3")
    monkeypatch.setattr(tokenizer, "_inner", SimpleNamespace(encode_batch_fast=end))
    with pytest.raises(error):
        tokenizer.encode("a")
    monkeypatch.setattr("llm.data.tokenizer._open", end)
    with pytest.raises(error):
        opened("llama3")


def test_two_end_tokens_are_refused():
    inner = tokenizers.Tokenizer.from_str(tokenizer_json("llama3"))
    inner.add_special_tokens(["</s>"])
    with pytest.raises(InputError, match=r"has 2 of the known end-of-document tokens \(</s>, <\|end_of_text\|>\)"):
        Tokenizer(inner.to_str().encode())
    assert Tokenizer(inner.to_str().encode(), "</s>").eod_id == 600


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_of_a_text_are_counted_from_its_tokens(kind: str):
    tokenizer = opened(kind)
    documents = [line for line in real_text().splitlines() if line.strip() == line != ""]
    ids = np.concatenate([[*tokenizer.encode(text), tokenizer.eod_id] for text in documents])
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    assert tokenizer.text_bytes(counts, len(documents)) == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_bytes_are_not_known_where_the_text_is_changed(kind: str):
    tokenizer = opened(kind)
    counts = np.bincount(tokenizer.encode("some text"), minlength=tokenizer.vocab_size)
    assert tokenizer.text_bytes(counts, 1) is None


def test_bytes_are_not_known_where_the_text_was_unknown():
    parts = json.loads(tokenizer_json("mistral"))
    parts["model"]["byte_fallback"] = False
    tokenizer = Tokenizer(json.dumps(parts).encode())
    known, unknown = (np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size) for text in ("ab", "ab\x01"))
    assert tokenizer.text_bytes(known, 1) == 2
    assert tokenizer.text_bytes(unknown, 1) is None


def test_a_loaded_tokenizer_is_saved_as_it_was(tmp_path: Path):
    raw = tokenizer_json("mistral").replace(",", ",\r\n", 1).encode()
    (tmp_path / "a.json").write_bytes(raw)
    Tokenizer.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == raw


def test_characters_are_tokens_in_the_order_of_nanogpt():
    text = "".join(sorted(set(real_text()))) + "\x00"
    order = sorted(set(text))  # as nanoGPT's prepare.py has it
    tokenizer = Tokenizer.of_characters(iter([text[::2], text[1::2]]))
    assert tokenizer.encode(text) == [order.index(c) for c in text]
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.end_token) == (
        len(order) + 1,
        len(order),
        END_OF_DOCUMENT,
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode(text)] == list(text)
    assert Tokenizer(tokenizer.raw).encode(text) == tokenizer.encode(text)


def test_an_unknown_character_is_named():
    tokenizer = Tokenizer.of_characters(iter(["abc", END_OF_DOCUMENT]))
    assert tokenizer.eod_id not in tokenizer.encode(END_OF_DOCUMENT)
    with pytest.raises(InputError, match="characters that are no tokens: 'X', 'ß'"):
        tokenizer.encode("aXbß")


def test_ids_without_a_token_are_told_and_refused():
    parts = json.loads(Tokenizer.of_characters(iter(["ab"])).raw)
    parts["model"]["vocab"] = {"a": 0, "b": 4, END_OF_DOCUMENT: 2}
    parts["added_tokens"][0]["id"] = 2
    tokenizer = Tokenizer(json.dumps(parts).encode())
    assert (tokenizer.vocab_size, tokenizer.unused(8)) == (5, [1, 3, 5, 6, 7])
    for token in (-1, 1, 5, 2**31):
        with pytest.raises(InputError, match=f"token {token} is not among the tokenizer's 3 tokens"):
            tokenizer.decode([0, token])
