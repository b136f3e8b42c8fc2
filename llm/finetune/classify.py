"""Classification: the model reads a text, and a head of one row for each label says, at its last token, which it has.

To the model a label is the token that follows the text, from a vocabulary of labels, and alone is learnt. So samples,
losses and layouts are those of other examples. Data: {"text": ..., "label": ...} in JSON, one a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import RunConfig
from llm.data.corpus.files import list_files
from llm.data.corpus.texts import check_unicode, records
from llm.data.prepare.tokenise import given_tokenizer
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.manifest import SPLITS
from llm.errors import InputError, require
from llm.finetune.examples import Example, Examples
from llm.model.build import Model
from llm.model.forms import Forms
from llm.model.init import initial_tensor
from llm.model.layers import IGNORED_TARGET
from llm.parallel.collectives import Waits
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.build import build_model
from llm.train.engines.base import Engine, MicroBatch, WeightSource
from llm.train.source import Say
from llm.typed import shown

HEAD = "head.weight"


class Classification(Examples):
    """The labelled texts of data.source, of which those longer than a sample lose their ends."""

    def __init__(self, config: RunConfig) -> None:
        """Raises InputError, which names the line, for what is no labelled text; and for fewer than two labels, or more
        than the vocabulary has ids.
        """
        tokens, found = given_tokenizer(config), list(labelled(config.data.source))
        self.labels = sorted({label for _, _, label in found})
        count, size = len(self.labels), config.model.vocab_size
        said = f"data.source {config.data.source} has {len(found)} texts of {count} labels"
        require(count > 1, f"{said} ({', '.join(self.labels)}); expected two or more, to be told apart")
        require(count <= size, f"{said}; expected at most model.vocab_size, {size}")
        super().__init__(config, tokens, self._examples(found, tokens), "texts")
        self.cut = self.longer

    @classmethod
    def open(cls, config: RunConfig, say: Say) -> Classification:
        return cls(config)

    def _examples(self, found: list[tuple[str, str, str]], tokens: Tokenizer) -> Iterator[tuple[str, Example]]:
        """The tokens of a text, of which there is room for data.seq_len, and the number of its label."""
        numbers, self.longer = {label: number for number, label in enumerate(self.labels)}, 0
        for where, text, label in found:
            ids = text_tokens(where, text, tokens)
            self.longer += len(ids) > self.config.data.seq_len
            given = ids[: self.config.data.seq_len]
            yield where, Example([*given, numbers[label]], [False] * len(given) + [True])

    def counts(self, split: str) -> Counter[str]:
        """How many texts of "train" or "validation" have each label."""
        samples = self.samples[split]
        return Counter(self.labels[number] for number in samples.tokens[samples.learnt == 1].tolist())

    def describe(self) -> str:
        train, validation = (self.counts(name) for name in SPLITS)
        (most, _), *_ = train.most_common(1)
        share = f"{validation[most] / validation.total():.1%}"
        return (
            f"{super().describe()}; {len(self.labels)} labels, the most frequent, {most}, is that of {share} of these"
        )

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"labels": self.labels}

    def build_model(self, config: RunConfig, mesh: Mesh | None, forms: Forms | None, waits: Waits) -> Model:
        return build_model(config, mesh, forms, waits, len(self.labels))

    def weights(self, say: Say) -> WeightSource:
        return UnderNewHead(super().weights(say), self.config)

    def evaluate(self, engine: Engine, batches: Iterable[MicroBatch]) -> dict[str, float]:
        loss, count, right = engine.measure(batches, loss_count_and_right, 3)
        return {"val_loss": loss / max(count, 1), "val_accuracy": right / max(count, 1)}


class UnderNewHead:
    """The weights of another run below a head that is initial."""

    def __init__(self, below: WeightSource, config: RunConfig) -> None:
        self.below, self.config = below, config

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        if name != HEAD:
            return self.below.read_slice(name, kind, part)
        return part.take(initial_tensor(self.config.model, self.config.seed, name, part.global_shape))


def loss_count_and_right(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The sum of the losses of a batch, its texts, and those whose most probable label is theirs: fp64 [3]."""
    counted = batch.targets != IGNORED_TARGET
    logits: Tensor = model(batch.tokens, batch.positions, batch.samples, None, batch.documents)[counted]
    labels = batch.targets[counted]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([x.double() for x in (loss, counted.sum(), (logits.argmax(-1) == labels).sum())])


def text_tokens(place: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text. Raises InputError, which names its place, where there is none."""
    found = tokenizer.encode(text) if text.strip() else []
    require(bool(found), f"{place}: the text is empty, or the tokenizer has no token for it; expected some")
    return found


def labelled(source: str) -> Iterator[tuple[str, str, str]]:
    """(place, text, label) of each record of JSON files. Raises InputError for any other, and as `list_files`."""
    for path in list_files(source)[0]:
        for where, record in records(path, "text"):
            text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
            if not (isinstance(text, str) and text.strip() and isinstance(label, str) and label.strip()):
                expected = "expected an object with `text` and `label`, texts that are not empty"
                raise InputError(f"{where}: {expected}; found {shown(record)}")
            for field in (text, label):
                check_unicode(field, f"{where}: {shown(field)}")
            yield where, text, label
