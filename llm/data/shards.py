"""A token corpus: token files, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShardList:
    """A token corpus."""

    name: str
    format: str
    dtype: str
    paths: tuple[str, ...]
    tokens: tuple[int, ...]
    vocab_size: int
    eod_id: int
    eod_first: bool = False
    plans: dict[int, str] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens)


def inspect_files(name: str, pattern: str, *, vocab_size: int, eod_id: int, raw_dtype: str | None = None) -> ShardList:
    """Interim, until the branch of the formats is merged."""
    raise NotImplementedError(f"{name}: token files without a manifest")
