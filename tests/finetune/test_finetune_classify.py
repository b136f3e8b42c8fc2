"""Classification: what is read and refused, that the last token decides, and that every layout learns the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm.config import DataConfig, RunConfig
from llm.config.sections import FinetuneConfig
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError
from llm.finetune.classify import HEAD, Classification, Rows, UnderNewHead, loss_count_and_right
from llm.finetune.labelled import read_labelled
from llm.model.init import InitialWeights
from llm.model.layers import IGNORED_TARGET
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.engines.base import Engine, micro_batch
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from tiny_run import case, plain

CPU = torch.device("cpu")
T = 16
WORDS = {"animals": ["cat", "dog", "cow"], "colours": ["red", "blue", "green"], "numbers": ["one", "two", "six"]}


def write_texts(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def some_texts(count: int = 60) -> list[dict[str, str]]:
    """A number, words that say nothing, and last one of the label's."""
    chosen = random.Random(0)
    lines = []
    for i in range(count):
        label = [*WORDS][i % 3]
        words = [str(i), *chosen.choices(["a", "is", "of"], k=chosen.randint(0, 3)), chosen.choice(WORDS[label])]
        lines.append({"text": " ".join(words), "label": label})
    return lines


def prepared(folder: Path, **sections: Any) -> RunConfig:
    """A config whose labelled texts and tokenizer lie in `folder`."""
    write_texts(folder / "texts.jsonl", some_texts())
    Tokenizer.train([text["text"] for text in some_texts()], 280).save(folder / "tokenizer.json")
    data = DataConfig(source=str(folder / "texts.jsonl"), seq_len=T, validation_fraction=0.3)
    config = case(**{"model": dict(vocab_size=280)} | sections)
    train = replace(config.train, init_from=str(folder))
    return replace(config, data=data, train=train, finetune=FinetuneConfig(task="classify"))


def opened(config: RunConfig) -> Classification:
    return Classification.open(config, lambda line: None)


def trained(source: Classification, engine: Engine, ranks: dict[str, int], steps: int) -> list[float]:
    """The losses of the steps, then what a validation measures."""
    engine.set_lr(0.01)
    loader, losses = source.loader(**ranks, consumed=0, widen=True), []
    for _ in range(steps):
        step = loader.next_step()
        losses.append(float(engine.forward_backward([micro_batch(b, CPU) for b in step.batches], step.target_count)))
        engine.step()
    found = (micro_batch(batch, CPU, rows) for batch, rows in source.validation_batches(**ranks))
    return [*losses, *source.evaluate(engine, found).values()]


def in_one_process(config: RunConfig, steps: int) -> list[float]:
    config = plain(config)
    source = opened(config)
    engine = PlainEngine(config, source.build_model(config, None, None), None, CPU)
    engine.load_pieces(UnderNewHead(InitialWeights(config.model, config.seed), config), 0)
    return trained(source, engine, {"dp_rank": 0, "dp_size": 1}, steps)


def on_ranks(config: RunConfig, steps: int) -> list[float]:
    source, mesh = opened(config), Mesh.create(config.parallel, "cpu")
    weights = UnderNewHead(InitialWeights(config.model, config.seed), config)
    engine = build_engine(config, mesh, CPU, weights, build=source.build_model)
    found = trained(source, engine, {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}, steps)
    engine.close()
    return found


def test_labels_are_numbered_and_texts_split_by_their_hash(tmp_path: Path) -> None:
    lines = some_texts()
    found = read_labelled(write_texts(tmp_path / "a", [*lines, *lines]), 0.3)
    assert found.labels == ("animals", "colours", "numbers")
    expected = sorted((line["text"], found.labels.index(line["label"])) for line in lines * 2)
    assert sorted(found.train + found.validation) == expected
    assert not {text for text, _ in found.train} & {text for text, _ in found.validation}
    assert 20 < len(found.validation) < 60


GOOD = {"text": "a", "label": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"text": "b"}], "line 2: found {'text': 'b'}; expected"),
        ([{"text": " ", "label": "x"}], "line 1: found"),
        ([{"text": "a", "label": 3}], "line 1: found"),
        ([{"text": "a", "label": ""}], "line 1: found"),
        (["text"], "line 1: found 'text'"),
        ([GOOD, {"text": "b", "label": "x"}], "has 2 texts of 1 labels .*; expected two labels or more"),
        ([], "has 0 texts of 0 labels"),
        ([GOOD, {"text": "a", "label": "y"}], "has 2 texts, none of them for (train|validation)"),
    ],
)
def test_what_is_no_labelled_text_is_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_labelled(write_texts(tmp_path / "a", lines), 0.5)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_labelled(tmp_path / "none", 0.5)
    for raw in (b'{"text": "a"', b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "a").write_bytes(raw)
        with pytest.raises(InputError, match="line 1: not JSON"):
            read_labelled(tmp_path / "a", 0.5)


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    for changed, message in (
        (replace(config, train=replace(config.train, init_from=None)), "train.init_from is null"),
        (replace(config, data=replace(config.data, document_masks=True)), "data.document_masks is True"),
        (replace(config, model=replace(config.model, vocab_size=2)), "has 3 labels; expected model.vocab_size, 2"),
        (replace(config, model=replace(config.model, vocab_size=270)), "has 280 tokens, model.vocab_size is 270"),
        (replace(config, train=replace(config.train, init_from=str(tmp_path / "a/b/c"))), "no tokenizer.json in"),
    ):
        with pytest.raises(InputError, match=message):
            opened(changed)
    source = opened(replace(config, data=replace(config.data, validation_samples=60)))
    with pytest.raises(InputError, match=r"data\.validation_samples is 60"):
        source.validation_batches(dp_rank=0, dp_size=1)


def test_a_row_ends_its_text_with_the_label_which_alone_is_a_target(tmp_path: Path) -> None:
    prepared(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    texts = [("red a", 1), ("one " * 40, 2)]
    rows = Rows(texts, tokenizer, T)
    assert rows.cut == 1
    batch = micro_batch(rows.batch(torch.arange(2).numpy(), torch.arange(2).numpy()), CPU)
    for row, (text, label) in enumerate(texts):
        ids = tokenizer.encode(text)[:T]
        assert batch.tokens[row, : len(ids)].tolist() == ids
        assert batch.targets[row, len(ids) - 1] == label
        assert int((batch.targets[row] != IGNORED_TARGET).sum()) == 1


def test_the_state_of_the_last_token_decides_and_what_follows_changes_nothing(tmp_path: Path) -> None:
    config = plain(prepared(tmp_path))
    source = opened(config)
    model = source.build_model(config, None, None)
    assert model.get_parameter(HEAD).shape == (3, 32)
    (batch, _), *_ = source.validation_batches(dp_rank=0, dp_size=1)
    found = micro_batch(batch, CPU)
    last = (found.targets != IGNORED_TARGET).nonzero()[:, 1]
    expected = []
    for row, end in enumerate(last):
        text = found.tokens[row : row + 1, : end + 1]
        states = model.states(text, torch.arange(len(text[0])), torch.arange(1), None, None)
        expected.append(F.linear(states[0, -1], model.get_parameter(HEAD)))
    logits, labels = torch.stack(expected), found.targets[found.targets != IGNORED_TARGET]
    loss, count, right = loss_count_and_right(model, found).tolist()
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum").detach()), abs=1e-5)
    assert loss == pytest.approx(float(model(*found).detach()), abs=1e-5)
    assert (count, right) == (len(labels), int((logits.argmax(-1) == labels).sum()))


def test_each_epoch_has_every_text_once_and_ranks_share_a_step(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    config = replace(config, train=replace(config.train, global_batch_size=4))
    source = opened(config)
    n = len(source.train.labels)
    loaders = [source.loader(dp_rank=rank, dp_size=2, consumed=0, widen=True) for rank in (0, 1)]
    steps = [[loader.next_step() for loader in loaders] for _ in range(n)]  # four epochs
    ids = [int(x) for step in steps for part in step for batch in part.batches for x in batch.sample_ids]
    assert ids == list(range(4 * n))
    rows = [tuple(row.tolist()) for step in steps for part in step for batch in part.batches for row in batch.tokens]
    expected = sorted(tuple(row.tolist()) for row in source.train.tokens)
    assert sorted(rows[:n]) == sorted(rows[n : 2 * n]) == expected and rows[:n] != rows[n : 2 * n]
    later = source.loader(dp_rank=1, dp_size=2, consumed=8, widen=True).next_step()
    assert torch.equal(later.batches[0].tokens, steps[2][1].batches[0].tokens)
    assert all(part.target_count == 4 for step in steps for part in step)


def test_words_that_tell_the_label_are_learnt(tmp_path: Path) -> None:
    *losses, loss, accuracy = in_one_process(prepared(tmp_path), 30)
    assert losses[0] == pytest.approx(1.0986, abs=0.1)
    assert losses[-1] < 0.1 and loss < 0.5 and accuracy > 0.9


def test_a_run_goes_on_with_the_same_texts_alone(tmp_path: Path) -> None:
    source = opened(prepared(tmp_path))
    state = {"data": source.identity(), "step": 2, "consumed_samples": 16}
    assert source.resumed(state) is source
    for key, value in (("labels", ["a"]), ("source", "0"), ("tokenizer", "0")):
        with pytest.raises(InputError, match=f"was trained on other {key}; choose another --name"):
            source.resumed(state | {"data": source.identity() | {key: value}})


LAYOUTS = {
    "tp2-sp-zero1": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=1)),
    "zero3-lora": dict(parallel=dict(zero_stage=3), lora=dict(rank=4), train=dict(init_from="runs/base")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_the_same(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Three labels over two tensor-parallel ranks: the head is padded."""
    config = prepared(tmp_path, **LAYOUTS[name])
    expected = in_one_process(config, 3)
    for found in two_ranks.run(on_ranks, config, 3):
        assert found == pytest.approx(expected, abs=1e-4)
