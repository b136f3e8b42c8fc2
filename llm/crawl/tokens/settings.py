"""The sections `tokenizer` and `tokenize` of a corpus's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.config.sections import check_at_least
from llm.errors import require


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, trained on the corpus or taken as it is."""

    path: str | None = None
    """A tokenizer.json or the ranks of a tiktoken encoding; null: a byte-level BPE is trained."""
    end_token: str | int | None = None
    """Of a given tokenizer: the token that ends documents, by name or id; null: the known one that it has."""
    vocab_size: int = 32_768
    """Token ids of the trained one, the end-of-document token included."""
    pattern: Literal["gpt2", "o200k"] = "gpt2"
    """What splits text into words before merges are learned."""
    max_bytes: int = 1 << 28
    """Text to train on, at most: whole documents from everywhere in the training split."""

    def __post_init__(self) -> None:
        check_at_least(257, "tokenizer.", self, "vocab_size")
        check_at_least(1, "tokenizer.", self, "max_bytes")
        largest = 2**31  # the trainers count pairs in 32 bits
        require(self.max_bytes <= largest, f"tokenizer.max_bytes is {self.max_bytes}; expected at most {largest}")


@dataclass(frozen=True)
class TokenizeConfig:
    """The token shards."""

    validation_fraction: float = 0.01
    """Share of the clusters of duplicates, by the hash of the first document's id, that is kept for validation."""
    library: Literal["gigatoken", "tokenizers"] = "gigatoken"
    """What learns merges and encodes. Both give the same; tokenizers is many times slower, and takes any tokenizer."""

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        require(0 < fraction < 1, f"tokenize.validation_fraction is {fraction}; expected between 0 and 1")
