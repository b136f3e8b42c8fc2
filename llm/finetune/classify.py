"""Classification: the model reads a text, and a head of one row for each label says, at its last token, which it has.

To the model a label is the token that follows the text, from a vocabulary of labels, and the only target of its row.
So every layout, loss and count is pretraining's. What pads a row comes after the target, where it changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llm.checkpoint.reader import tokenizer_of
from llm.config import RunConfig
from llm.data.batch import Batch, Loader, Step
from llm.data.samples.schedule import Curriculum, Schedule
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError, require
from llm.files import sha256_of
from llm.finetune.labelled import Labelled, read_labelled
from llm.model.forms import Forms
from llm.model.gpt import GPT
from llm.model.init import initial_tensor
from llm.model.layers import IGNORED_TARGET
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.build import build_model
from llm.train.engines.base import Engine, MicroBatch, WeightSource
from llm.train.resume import check_steps
from llm.train.source import Say, Source

HEAD = "head.weight"


class Rows:
    """Texts in rows: [n, T + 1] token ids up to the text's last one of T, then the number of its label."""

    def __init__(self, texts: list[tuple[str, int]], tokenizer: Tokenizer, seq_len: int) -> None:
        """Of longer texts the first `seq_len` tokens are kept. Raises InputError for a text without tokens."""
        encoded, _ = tokenizer.encode_batch([text for text, _ in texts])
        self.labels = np.array([label for _, label in texts])
        self.cut = sum(len(ids) > seq_len for ids in encoded)
        """Texts that are longer than a row."""
        self.tokens: NDArray[np.int32] = np.repeat(self.labels[:, None], seq_len + 1, axis=1).astype(np.int32)
        self.counted: NDArray[np.uint8] = np.zeros((len(texts), seq_len), np.uint8)
        for row, (ids, (text, _)) in enumerate(zip(encoded, texts, strict=True)):
            kept = ids[:seq_len]
            require(bool(kept), f"the tokenizer has no token for the text {text[:40]!r}")
            self.tokens[row, : len(kept)] = kept
            self.counted[row, len(kept) - 1] = 1

    def batch(self, positions: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> Batch:
        """These rows, under these global sample numbers."""
        arrays = self.tokens[positions], sample_ids, self.counted[positions]
        tokens, ids, counted = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return Batch(tokens, ids, counted=counted)


class LabelledLoader(Loader):
    """Training batches of one data-parallel rank: each epoch is another permutation of the rows."""

    def __init__(self, rows: Rows, config: RunConfig, dp_rank: int, dp_size: int, consumed: int) -> None:
        super().__init__(Curriculum(config.phases, ({"labelled": 1.0},), lambda name, T: len(rows.labels)), consumed)
        self._rows, self._size = rows, config.train.micro_batch_size
        self._dp_rank, self._share = dp_rank, config.train.global_batch_size // dp_size
        self._schedule = Schedule(config.seed, self._curriculum.phases)
        self._global_batch = config.train.global_batch_size

    def _assemble(self) -> tuple[Step, int]:
        first = self.consumed + self._dp_rank * self._share
        _, positions, _ = self._schedule.locate(first, self._share)
        ids = np.arange(first, first + self._share)
        starts = range(0, self._share, self._size)
        batches = [self._rows.batch(positions[i : i + self._size], ids[i : i + self._size]) for i in starts]
        return Step(batches, self._global_batch), self._global_batch


class Classification(Source):
    """Labelled texts, of which the labels are learnt."""

    def __init__(self, config: RunConfig, tokenizer: Path, texts: Labelled) -> None:
        """Raises InputError where the labels are more than the vocabulary, whose ids stand for them in a row."""
        self.config, self.tokenizer, self.texts = config, tokenizer, texts
        labels, size, T = len(texts.labels), config.model.vocab_size, config.data.seq_len
        require(labels <= size, f"{config.data.source} has {labels} labels; expected model.vocab_size, {size}, at most")
        loaded = Tokenizer.load(tokenizer, config.data.end_token)
        require(loaded.vocab_size <= size, f"{tokenizer} has {loaded.vocab_size} tokens, model.vocab_size is {size}")
        self.train, self.validation = (Rows(split, loaded, T) for split in (texts.train, texts.validation))

    @classmethod
    def open(cls, config: RunConfig, say: Say) -> Classification:
        """Read data.source, and the tokenizer beside train.init_from. Raises InputError."""
        require(config.train.init_from is not None, "train.init_from is null; expected the weights to begin with")
        for key in ("blend", "phases", "document_masks"):
            found = getattr(config.data, key)
            require(not found, f"data.{key} is {found}; finetune.task classify reads rows of data.source alone")
        tokenizer = tokenizer_of(Path(config.train.init_from or ""))
        if tokenizer is None:
            raise InputError(f"no tokenizer.json in train.init_from {config.train.init_from}, nor two folders above")
        return cls(config, tokenizer, read_labelled(Path(config.data.source), config.data.validation_fraction))

    def resumed(self, state: dict[str, Any]) -> Source:
        found, own = state["data"], self.identity()
        changed = ", ".join(key for key in own if found.get(key) != own[key])
        require(not changed, f"runs/{self.config.name} was trained on other {changed}; choose another --name")
        check_steps(self.config, state)
        return self

    def identity(self) -> dict[str, Any]:
        tokenizer = sha256_of(self.tokenizer)
        return {"labels": [*self.texts.labels], "source": self.texts.sha256, "tokenizer": tokenizer}

    def describe(self) -> str:
        train, validation = self.train.labels, self.validation.labels
        (most, _), *_ = Counter(train.tolist()).most_common(1)
        share = float((validation == most).mean())
        return (
            f"{len(self.texts.labels)} labels; {len(train)} texts to train on, {len(validation)} to validate, of which "
            f"{share:.1%} have the most frequent label, {self.texts.labels[most]}"
        )

    def remarks(self) -> list[str]:
        cut, T = self.train.cut + self.validation.cut, self.config.data.seq_len
        return [f"warning: of {cut} texts longer than data.seq_len {T}, the first {T} tokens are read"] if cut else []

    def loader(self, *, dp_rank: int, dp_size: int, consumed: int, widen: bool) -> Loader:
        return LabelledLoader(self.train, self.config, dp_rank, dp_size, consumed)

    def validation_batches(self, *, dp_rank: int, dp_size: int) -> Iterator[tuple[Batch, int]]:
        rows, available = self.config.train.micro_batch_size, len(self.validation.labels)
        wanted = self.config.data.validation_samples or available
        require(wanted <= available, f"data.validation_samples is {wanted}; {available} texts are kept for validation")

        def batches() -> Iterator[tuple[Batch, int]]:  # apart, so that the check is made before the first is asked for
            for start in range(0, wanted, rows * dp_size):
                first = start + dp_rank * rows
                ids = np.minimum(np.arange(first, first + rows), wanted - 1)
                yield self.validation.batch(ids, ids), min(max(wanted - first, 0), rows)

        return batches()

    def build_model(self, config: RunConfig, mesh: Mesh | None, forms: Forms | None) -> GPT:
        return build_model(config, mesh, forms, len(self.texts.labels))

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
    logits: Tensor = model(batch.tokens, batch.positions, batch.samples)[counted]
    labels = batch.targets[counted]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([x.double() for x in (loss, counted.sum(), (logits.argmax(-1) == labels).sum())])
