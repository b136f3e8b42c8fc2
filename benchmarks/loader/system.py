"""The interface of a loader that can be measured."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.loader.cases import Case
from benchmarks.loader.tokens import TokenSet


class Batch(NamedTuple):
    """One batch of B rows of T inputs. It may be overwritten by the next."""

    inputs: Tensor
    """[B, T] int64; in the native form [B, T + 1] as in the file, inputs and labels in one."""
    labels: Tensor | None
    """[B, T] int64; None in the native form."""
    position_ids: Tensor | None = None
    """[B, T] int32 or int64, counted from 0 in every document; None unless documents are told apart."""
    cu_seqlens: Tensor | None = None
    """[documents + 1], where documents begin in the B * T inputs, from 0 to B * T; None likewise."""


Batches = Generator[Batch, None, None]


class System:
    """A loader. Subclasses say how its batches are made, and what it needs before."""

    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        """Convert the tokens into the form that it reads, unless that is there."""

    def files(self, tokens: TokenSet, seq_len: int) -> list[Path]:
        """What it reads, for warming and dropping caches."""
        return tokens.paths

    def begin(self) -> None:
        """What a training process does anyway before it opens a loader; not timed."""

    def state(self, tokens: TokenSet, case: Case, consumed: int) -> Any:
        """What it is resumed from after `consumed` samples."""
        return consumed

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        """Its batches without end, from the start or from a state. Closing the iterator ends the loader."""
        raise NotImplementedError


class Stateful(System):
    """A loader of batches of rows of T + 1 tokens, with state_dict and load_state_dict."""

    def loader(self, tokens: TokenSet, case: Case) -> Any:
        raise NotImplementedError

    def rows(self, found: Any) -> Tensor:
        """The rows, [B, T + 1], of what the loader yields."""
        return found

    def state(self, tokens: TokenSet, case: Case, consumed: int) -> Any:
        loader = self.loader(tokens, case)
        for done, _ in enumerate(loader, 1):
            if done * case.rows >= consumed:
                break
        return loader.state_dict()

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        loader = self.loader(tokens, case)
        if state is not None:
            loader.load_state_dict(state)
        while True:
            for found in loader:
                rows = self.rows(found).to(torch.int64)
                yield Batch(rows[:, :-1], rows[:, 1:])
