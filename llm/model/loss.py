"""The language model's loss: the cross-entropy of its last layer over the targets that count."""

from __future__ import annotations

from torch import Tensor

from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.cross_entropy.vocabulary import Vocabulary

# A target of this value is not counted in the loss.
IGNORED_TARGET = -100


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, vocabulary: Vocabulary | None = None, impl: str = "auto"
) -> Tensor:
    """Sum of the losses of counted tokens: x [..., C], weight [V_tp, C], targets int64 [...] -> fp32 [].

    V_tp is this rank's part of the vocabulary, padding included; the whole of it if `vocabulary` is None.
    """
    return linear_cross_entropy(
        x, weight, targets, z_loss=z_loss, ignore_index=IGNORED_TARGET, vocabulary=vocabulary, impl=impl
    )
