"""Cross-entropy of logits, and of the linear layer that makes them."""

from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.cross_entropy.rows import cross_entropy
from kernels.cross_entropy.vocabulary import Vocabulary, WholeVocabulary

__all__ = ["Vocabulary", "WholeVocabulary", "cross_entropy", "linear_cross_entropy"]
