"""What is shown of a sample is what the loader would give; statistics against NumPy's own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_files import write_file

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig, TrainConfig
from llm.data.corpora import Corpora
from llm.data.prepare.inspect import Lengths, document_numbers, show, statistics
from llm.data.prepare.plans import write_plans
from llm.data.prepare.register import register
from llm.data.samples.packing import NumpyPackPlan
from llm.data.samples.schedule import Schedule
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.shards import NumpyCorpus, document_lengths, inspect_files
from llm.errors import InputError

TEXTS = [f"text {i} " + "abcdefg"[: i % 7] * (i % 5) for i in range(40)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs beside the tokenizer t.json, of single bytes, and the corpora a (Megatron) and b (llm.c)."""
    monkeypatch.chdir(tmp_path)
    Tokenizer.train(["a"], 257).save(Path("t.json"))
    tokenizer = Tokenizer.load(Path("t.json"))
    for name, format in (("a", "megatron"), ("b", "llm.c")):
        Path(name).mkdir()
        ids = [tokenizer.encode(f"{name} {text}") for text in TEXTS]
        documents = [[0, *text] if format == "llm.c" else [*text, 0] for text in ids]
        write_file(Path(name), "one", format, "uint16", documents[:25])
        write_file(Path(name), "two", format, "uint16", documents[25:])
        write_file(Path(name), "val", format, "uint16", documents[:3])
        register(
            RunConfig(model=ModelConfig(vocab_size=257), data=DataConfig(path=name, tokenizer="t.json")),
            {"train": f"{name}/[ot]*.bin", "validation": f"{name}/val.bin"},
        )


def opened(max_steps: int = 50, **data) -> Corpora:
    config = RunConfig(
        model=ModelConfig(vocab_size=257),
        data=DataConfig(**{"path": "a", "seq_len": 32} | data),
        train=TrainConfig(global_batch_size=4, micro_batch_size=2, max_steps=max_steps),
    )
    write_plans(config)
    return Corpora.open(config)


def texts_of(shown: str) -> list[str]:
    """The documents' texts in what show() returned."""
    return re.split(r"\n\n--- document .* ---(?:\n|$)", re.sub(r"\n(\npadding: .*)?$", "", shown))[1:]


def documents_of(shown: str) -> list[tuple[int, ...]]:
    """(number, tokens in the sample, tokens in all, first token) of each document."""
    lines = re.findall(r"^--- document (\d+): (\d+) of its (\d+) tokens, from its token (\d+) on ---", shown, re.M)
    return [tuple(map(int, numbers)) for numbers in lines]


def read_shown_bytes(shown: str) -> list[int]:
    """The tokens in the bytes of the files that show() named."""
    ids = []
    for path, first, last in re.findall(r"^(.*): bytes (\d+) to (\d+), tokens", shown, re.MULTILINE):
        ids += np.frombuffer(Path(path).read_bytes()[int(first) : int(last) + 1], "<u2").tolist()
    return ids


def expected_tokens(corpora: Corpora, schedule: Schedule, sample: int, seq_len: int) -> list[int]:
    """What the loader reads for a sample."""
    corpus, position, _ = (int(part[0]) for part in schedule.locate(sample, 1))
    shards = list(corpora.training.values())[corpus].shards
    tokens = NumpyCorpus(shards)
    if corpora.config.data.packing == "chunk":
        return tokens.read(position * seq_len, seq_len + 1).tolist()
    plan = NumpyPackPlan(Path(shards.plans[seq_len]), seq_len, shards.n_tokens)
    return [i for start, count in plan.pieces(position) for i in tokens.read(int(start), int(count)).tolist()]


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_a_shown_sample_is_the_one_that_is_trained_on(packing: str):
    phases = (PhaseChange(samples=40, seq_len=20, blend={"b": 3.0, "a": 1.0}), PhaseChange(samples=80, seq_len=32))
    corpora = opened(phases=phases, packing=packing, document_masks=True)
    tokenizer = Tokenizer.load(Path("t.json"))
    schedule = Schedule(corpora.config.seed, corpora.curriculum().phases)
    seen = set()
    for sample in [0, 39, *range(40, 48), 79, 80, 119]:
        seq_len = 20 if 40 <= sample < 80 else 32
        shown = show(corpora, sample)
        ids = expected_tokens(corpora, schedule, sample, seq_len)
        assert read_shown_bytes(shown) == ids
        assert "".join(texts_of(shown)) == tokenizer.decode([i for i in ids if i != 0])
        name = shown.splitlines()[1].split(":")[0].removeprefix("corpus ")
        for (number, count, length, first), text in zip(documents_of(shown), texts_of(shown), strict=True):
            document = tokenizer.encode(f"{name} {TEXTS[number]}")
            document = [0, *document] if name == "b" else [*document, 0]
            assert first + count <= length == len(document)
            assert text == tokenizer.decode([i for i in document[first : first + count] if i != 0])
        assert (f"padding: {seq_len + 1 - len(ids)} tokens" in shown) == (len(ids) <= seq_len)
        seen.add(name)
    assert seen == {"a", "b"}


def test_the_words_of_a_sample():
    corpora = opened(phases=(PhaseChange(samples=40, seq_len=20, blend={"b": 3.0, "a": 1.0}),))
    lines = show(corpora, 41).splitlines()
    assert lines[0] == "sample 41: step 11, phase 2 of 2, 20 tokens"
    assert re.fullmatch(r"corpus [ab]: epoch \d+, place \d+ of \d+, weight [31] of 4", lines[1])
    assert re.fullmatch(r"[ab]/\w+\.bin: bytes \d+ to \d+, tokens \d+ to \d+ of the corpus", lines[2])
    assert re.fullmatch(r"--- document \d+: \d+ of its \d+ tokens, from its token \d+ on ---", lines[4])


def test_samples_that_are_not_of_the_run():
    corpora = opened()
    for sample in (-1, 200):
        with pytest.raises(InputError, match=f"sample {sample} is not of this run; expected 0 to 199"):
            show(corpora, sample)


@pytest.mark.parametrize("name", ["a", "b"])
def test_document_numbers(name: str):
    shards = inspect_files(name, f"{name}/[ot]*.bin", vocab_size=257, eod_id=0)
    lengths = [len(f"{name} {text}") + 1 for text in TEXTS]
    owner = np.repeat(np.arange(len(TEXTS)), lengths)
    begins = np.cumsum([0, *lengths[:-1]])
    tokens = np.random.default_rng(0).permutation(owner.size).tolist()
    expected = [(owner[token], begins[owner[token]], lengths[owner[token]]) for token in tokens]
    assert document_numbers(shards, tokens) == expected
    assert document_numbers(shards, [5, 5]) == [document_numbers(shards, [5])[0]] * 2


def test_documents_of_no_tokens_have_numbers_but_hold_no_token(tmp_path: Path):
    path = write_file(tmp_path, "a", "megatron", "uint16", [[], [1, 0], [], [], [2, 3, 0], []])
    shards = inspect_files("x", path, vocab_size=257, eod_id=0)
    assert document_numbers(shards, range(5)) == [(1, 0, 2)] * 2 + [(4, 2, 3)] * 3
    assert Lengths.of(document_lengths(shards)).histogram() == [(0, 0, 4), (1, 1, 0), (2, 3, 2)]


@given(parts=st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=30), min_size=1, max_size=5))
def test_lengths_equal_those_of_numpy(parts: list[list[int]]):
    found = Lengths.of(np.array(part, np.int64) for part in parts)
    flat = np.array([n for part in parts for n in part])
    assert found.documents == flat.size
    assert found.mean == pytest.approx(flat.mean())
    for share in (0, 0.5, 0.95, 1):
        assert found.quantile(share) == np.quantile(flat, share, method="inverted_cdf")
    rows = found.histogram()
    assert sum(count for _, _, count in rows) == flat.size
    assert all(count == ((flat >= low) & (flat <= high)).sum() for low, high, count in rows)
    assert rows[0][0] <= flat.min() <= rows[0][1]
    assert rows[-1][0] <= flat.max() <= rows[-1][1]


def test_statistics():
    phases = (PhaseChange(samples=100, blend={"b": 1.0}),)
    a, b = statistics(opened(phases=phases, packing="best_fit", document_masks=True))
    for found, name in ((a, "a"), (b, "b")):
        plan = NumpyPackPlan(Path(found.shards.plans[32]), 32, found.shards.n_tokens)
        assert found.epochs == 100 / len(plan)
        slots = len(plan) * 33
        used = sum(int(plan.pieces(row)[:, 1].sum()) for row in range(len(plan)))
        assert found.padding == {32: pytest.approx(1 - used / slots)}
        assert found.lengths.documents == len(TEXTS)
        assert found.lengths.mean * len(TEXTS) == found.shards.n_tokens
        assert found.lengths.quantile(1) == max(len(f"{name} {text}") + 1 for text in TEXTS)
