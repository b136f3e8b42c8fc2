"""Classification: what is read and refused, that the last token decides, and that every layout learns the same."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm.config import RunConfig
from llm.config.finetune import FinetuneConfig
from llm.config.reports import LoggingConfig
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError
from llm.finetune.classify import HEAD, Classification, UnderNewHead, loss_count_and_right
from llm.model.init import InitialWeights
from llm.model.layers import IGNORED_TARGET
from llm.parallel.collectives import UNTIMED
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.engines.base import Engine, micro_batch
from llm.train.engines.plain import PlainEngine
from llm.trained import load_trained
from pool import RankPool
from test_finetune_run import tuned
from tiny_run import case, plain
from trained_run import write_run

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
    data = dict(source=str(folder / "texts.jsonl"), tokenizer=str(folder / "tokenizer.json"), validation_fraction=0.3)
    data |= dict(seq_len=T, packing="best_fit", document_masks=True)
    config = case(**{"model": dict(vocab_size=280), "data": data} | sections)
    return replace(config, finetune=FinetuneConfig(task="classify"))


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


def alone(config: RunConfig, steps: int) -> tuple[Classification, Engine, list[float]]:
    """The source, the engine of this process, and what `trained` gives of it on initial weights."""
    config = plain(config)
    source = opened(config)
    engine = PlainEngine(config, source.build_model(config, None, None, UNTIMED), None, CPU)
    engine.load_pieces(UnderNewHead(InitialWeights(config.model, config.seed), config), 0)
    return source, engine, trained(source, engine, {"dp_rank": 0, "dp_size": 1}, steps)


def spread(config: RunConfig, steps: int) -> tuple[Classification, Engine, list[float]]:
    """As `alone`, over the ranks of a pool."""
    source, mesh = opened(config), Mesh.create(config.parallel, "cpu")
    weights = UnderNewHead(InitialWeights(config.model, config.seed), config)
    engine = build_engine(config, mesh, CPU, weights, build=source.build_model)
    return source, engine, trained(source, engine, {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}, steps)


def on_ranks(config: RunConfig, steps: int) -> list[float]:
    _, engine, found = spread(config, steps)
    engine.close()
    return found


def test_labels_are_numbered_and_texts_split(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    source, tokenizer = opened(config), Tokenizer.load(tmp_path / "tokenizer.json")
    assert source.labels == ["animals", "colours", "numbers"]
    found = []
    for samples in source.samples.values():
        ends = (samples.learnt == 1).nonzero()[0].tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        pairs = zip(starts, ends, strict=True)
        found += [(samples.tokens[a:b].tolist(), source.labels[samples.tokens[b]]) for a, b in pairs]
    expected = [(tokenizer.encode(line["text"]), line["label"]) for line in some_texts()]
    assert sorted(found) == sorted(expected)
    train, validation = source.counts("train"), source.counts("validation")
    assert sum((train + validation).values()) == 60 and validation.total() >= 10
    most = train.most_common(1)[0][0]
    share = validation[most] / validation.total()
    assert source.describe().endswith(f"3 labels, the most frequent, {most}, is that of {share:.1%} of these")


GOOD = {"text": "a", "label": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"text": "b"}], "line 2: expected an object with `text` and `label`.* found {'text': 'b'}"),
        ([{"text": " ", "label": "x"}], "line 1: expected"),
        ([{"text": "a", "label": 3}], "line 1: expected"),
        ([{"text": "a", "label": ""}], "line 1: expected"),
        (["text"], "line 1: expected .* found 'text'"),
        ([GOOD, {"text": "b", "label": "x"}], r"has 2 texts of 1 labels \(x\); expected two or more"),
        ([GOOD, {"text": "a", "label": "y"}] * 30, "has texts in "),
    ],
)
def test_what_is_no_labelled_text_is_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    config = prepared(tmp_path)
    write_texts(tmp_path / "texts.jsonl", lines)
    with pytest.raises(InputError, match=message):
        opened(replace(config, data=replace(config.data, validation_fraction=0.001)))


def test_a_vocabulary_that_is_too_small_for_the_labels_is_refused(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    write_texts(tmp_path / "texts.jsonl", [{"text": "a", "label": str(i)} for i in range(300)])
    with pytest.raises(InputError, match=r"300 texts of 300 labels; expected at most model\.vocab_size, 280"):
        opened(config)


def test_a_long_text_loses_its_end_but_not_its_label_and_it_is_said(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    assert "lose their ends" not in opened(config).describe()
    write_texts(tmp_path / "texts.jsonl", [*some_texts(), {"text": "one " * 40, "label": "numbers"}])
    source = opened(config)
    assert "; 1 are longer than data.seq_len and lose their ends; 3 labels" in source.describe()
    assert sum(source.counts(split).total() for split in source.samples) == 61


def test_the_state_of_the_last_token_decides_and_nothing_after_it(tmp_path: Path) -> None:
    """Each text alone, with no label behind it and no other text beside it, gives what its sample gives."""
    config = plain(prepared(tmp_path))
    source = opened(config)
    model = source.build_model(config, None, None, UNTIMED)
    assert model.get_parameter(HEAD).shape == (3, 32)
    (batch, _), *_ = source.validation_batches(dp_rank=0, dp_size=1)
    found = micro_batch(batch, CPU)
    assert found.documents is not None
    logits, labels = [], found.targets[found.targets != IGNORED_TARGET]
    for row, end in (found.targets != IGNORED_TARGET).nonzero().tolist():
        start = end - int(found.documents.position_ids[row, end])
        text = found.tokens[row : row + 1, start : end + 1]
        states = model.states(text, torch.arange(len(text[0])), torch.arange(1), None, None)
        logits.append(F.linear(states[0, -1], model.get_parameter(HEAD)))
    expected = torch.stack(logits)
    loss, count, right = loss_count_and_right(model, found).tolist()
    assert loss == pytest.approx(float(F.cross_entropy(expected, labels, reduction="sum").detach()), abs=1e-5)
    assert loss == pytest.approx(float(model(*found).detach()), abs=1e-5)
    assert (count, right) == (len(labels), int((expected.argmax(-1) == labels).sum())) and count > 2


def test_words_that_tell_the_label_are_learnt(tmp_path: Path) -> None:
    _, _, (*losses, loss, accuracy) = alone(prepared(tmp_path), 30)
    assert losses[0] == pytest.approx(1.0986, abs=0.1)
    assert losses[-1] < 0.1 and loss < 0.5 and accuracy > 0.9


def test_labels_are_in_what_a_checkpoint_keeps(tmp_path: Path) -> None:
    assert opened(prepared(tmp_path)).identity()["labels"] == ["animals", "colours", "numbers"]


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
    _, _, expected = alone(config, 3)
    for found in two_ranks.run(on_ranks, config, 3):
        assert found == pytest.approx(expected, abs=1e-4)


# What is wrong with the settings of LoRA, then with data, for a new run and for one that goes on.
MESSAGES = [
    *("runs/labels was trained with lora.rank 2, the config has 4", "lora.alpha 16.0", "lora.targets "),
    *["has 0 texts of 0 labels"] * 2,
    *["has 9 texts of 1 labels (x)"] * 2,
    *["line 2: expected an object with `text` and `label`"] * 2,
    *["262 labels; expected at most model.vocab_size, 261"] * 2,
]


def runs(folder: Path) -> list[str]:
    """Train a classifier with LoRA on another run, and ask for what cannot be; the errors. On a rank of a pool."""
    os.chdir(folder)
    train = dict(init_from="base", engine="plain", max_steps=4, eval_interval=2)
    config = prepared(folder, lora=dict(rank=2), model=dict(vocab_size=261), train=train)
    config = replace(config, data=replace(config.data, tokenizer="base/tokenizer.json"))
    config = replace(config, name="labels", logging=LoggingConfig(tensorboard=False, sample_tokens=0))
    tuned(config)
    errors = []

    def kept() -> dict[Path, bytes]:
        """All that lies in the runs' folders, but what every start writes."""
        paths = [path for path in Path("runs").rglob("*") if path.is_file() and path.name not in ("lock", "nonce")]
        return {path: path.read_bytes() for path in paths}

    def refused(changed: RunConfig) -> None:
        before = kept()
        try:
            tuned(changed)
        except InputError as error:
            errors.append(str(error))
        errors.extend(f"it changed {path}" for path, _ in kept().items() ^ before.items())

    longer = replace(config, train=replace(config.train, max_steps=6))
    for lora in (dict(rank=4), dict(alpha=1.0), dict(targets=("up",))):
        refused(replace(longer, lora=replace(config.lora, **lora)))
    for lines in ([], [GOOD] * 9, [GOOD, {"text": "b"}], [{"text": "a", "label": str(i)} for i in range(262)]):
        write_texts(folder / "other.jsonl", lines)
        data = replace(config.data, source=str(folder / "other.jsonl"))
        refused(replace(config, name="other", data=data))
        refused(replace(longer, data=data))
    return errors


def test_a_run_is_read_and_what_cannot_be_changes_nothing(one_rank: RankPool, tmp_path: Path) -> None:
    write_run(tmp_path / "base", plain(case(model=dict(vocab_size=261))))
    (errors,) = one_rank.run(runs, tmp_path)
    for error, message in zip(errors, MESSAGES, strict=True):
        assert message in error
    lines = [json.loads(line) for line in (tmp_path / "runs/labels/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [0, 2, 4]
    assert load_trained(tmp_path / "runs/labels", classifier=True).labels == (*WORDS,)
