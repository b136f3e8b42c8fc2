"""What a run trains on, and what it predicts: `start` and the loop ask a Source, and know no kind of it.

`Pretraining` reads token files; those of llm/finetune read what a fine-tuning task has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from llm.config import RunConfig
from llm.data.batch import Batch, Loader
from llm.data.corpora import Corpora
from llm.data.loader import open_loader, validation_batches
from llm.data.tokens.hashes import HashCheck
from llm.files import replace
from llm.model.build import Model
from llm.model.forms import Forms
from llm.parallel.collectives import Waits
from llm.parallel.mesh import Mesh
from llm.train.build import build_model
from llm.train.checks import check_tokenizer, remarks
from llm.train.engines.base import Engine, MicroBatch, WeightSource
from llm.train.init_from import open_weights
from llm.train.resume import check_resumable

Say: TypeAlias = Callable[[str], None]


class Source(ABC):
    """The data of a run, opened once in each process. Methods raise InputError, and are not collective but `weights`
    and `evaluate`.
    """

    config: RunConfig
    tokenizer: Path
    """Its tokenizer.json."""

    def save(self, folder: Path) -> None:
        """Write what reading the finished model needs into the run's folder."""
        replace(folder / "tokenizer.json", self.tokenizer.read_bytes())

    @abstractmethod
    def resumed(self, state: dict[str, Any]) -> Source:
        """What goes on where a checkpoint with this state.json ended; InputError unless its data are the same."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps to tell these data from others: JSON, not empty."""

    @abstractmethod
    def describe(self) -> str:
        """Check the tokenizer, and say what is read in one line."""

    @abstractmethod
    def loader(self, *, dp_rank: int, dp_size: int, consumed: int, widen: bool) -> Loader:
        """As `open_loader`."""

    @abstractmethod
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> Iterator[tuple[Batch, int]]:
        """As `llm.data.loader.validation_batches`."""

    def hash_check(self, *, dp_rank: int, dp_size: int) -> HashCheck | None:
        """What looks for damage while the run trains, where there is anything to look at."""
        return None

    def remarks(self) -> list[str]:
        """What the user should know of these data."""
        return []

    def bits_per_byte(self, loss: float) -> float | None:
        """A validation loss in nats per token as bits per byte of text; None where that is not known."""
        return None

    def build_model(self, config: RunConfig, mesh: Mesh | None, forms: Forms | None, waits: Waits) -> Model:
        """The model that these data train, as llm.train.build.build_model."""
        return build_model(config, mesh, forms, waits)

    def weights(self, say: Say) -> WeightSource:
        """Those that train.init_from names. Collective."""
        return open_weights(self.config, self.tokenizer, say)

    def evaluate(self, engine: Engine, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """What a validation measures, `val_loss` (mean over the counted targets) first. Collective."""
        total, count = engine.evaluate(batches)
        return {"val_loss": total / max(count, 1)}  # none counts where a stop was agreed on before the first batch


class Pretraining(Source):
    """Token files, of which every token is learnt."""

    def __init__(self, corpora: Corpora) -> None:
        self.corpora, self.config, self.tokenizer = corpora, corpora.config, corpora.folder / "tokenizer.json"

    @classmethod
    def open(cls, config: RunConfig, say: Say) -> Pretraining:
        """As Corpora.open."""
        return cls(Corpora.open(config, say))

    def resumed(self, state: dict[str, Any]) -> Source:
        return Pretraining(check_resumable(self.config, self.corpora, state))

    def identity(self) -> dict[str, Any]:
        return self.corpora.identity()

    def describe(self) -> str:
        return check_tokenizer(self.corpora)

    def loader(self, *, dp_rank: int, dp_size: int, consumed: int, widen: bool) -> Loader:
        return open_loader(self.corpora, dp_rank=dp_rank, dp_size=dp_size, consumed=consumed, widen=widen)

    def validation_batches(self, *, dp_rank: int, dp_size: int) -> Iterator[tuple[Batch, int]]:
        return validation_batches(self.corpora, dp_rank=dp_rank, dp_size=dp_size)

    def hash_check(self, *, dp_rank: int, dp_size: int) -> HashCheck | None:
        return self.corpora.hash_check(dp_rank, dp_size)

    def remarks(self) -> list[str]:
        return remarks(self.corpora)

    def bits_per_byte(self, loss: float) -> float | None:
        return self.corpora.manifest.bits_per_byte(loss)
