"""Cross-entropy of logits, and of the linear layer that makes them."""

from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.cross_entropy.rows import cross_entropy
from kernels.cross_entropy.vocabulary import FullVocabulary, Vocabulary

__all__ = ["FullVocabulary", "Vocabulary", "cross_entropy", "linear_cross_entropy"]
