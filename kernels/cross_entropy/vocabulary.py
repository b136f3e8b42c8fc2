"""The part of the vocabulary that a rank's logits cover, and how ranks join their parts."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.dispatch import KernelError


class Vocabulary(Protocol):
    """The columns of the logits [n, V] that this rank has."""

    start: int  # token id of the first column
    rows: int  # columns that are token ids; those after them are padding

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        """log sum_j exp(z_j) and the target's logit (0 if elsewhere) of this rank -> of all; fp32 [n] each."""
        ...


class FullVocabulary:
    """A vocabulary that one rank holds."""

    def __init__(self, rows: int) -> None:
        self.start = 0
        self.rows = rows

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        return log_sum, target_logit


class Terms(NamedTuple):
    """What a row's loss depends on beyond its logits and target."""

    vocabulary: Vocabulary
    ignore_index: int
    z_loss: float
    softcap: float

    @property
    def numbers(self) -> tuple[int, int, int, float, float]:
        """(rows, start, ignore_index, z_loss, softcap), in which order the kernels take them."""
        return self.vocabulary.rows, self.vocabulary.start, self.ignore_index, self.z_loss, self.softcap


def check(op: str, N: int, V: int, targets: Tensor, vocabulary: Vocabulary) -> None:
    """KernelError unless targets and vocabulary fit logits [N, V]."""
    # Not by `expect`: torch.compile cannot make a message of sizes that it does not know.
    if targets.shape != (N,) or targets.dtype != torch.int64:
        found = f"targets {targets.dtype} of shape {tuple(targets.shape)}"
        raise KernelError(f"{op}: found {found}, expected torch.int64 of ({N},)")
    if vocabulary.rows > V:
        raise KernelError(f"{op}: found {V} columns of logits, expected at least the vocabulary's {vocabulary.rows}")
