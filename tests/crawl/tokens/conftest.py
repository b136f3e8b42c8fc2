"""Fixtures of the tests of tokenizers and shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokens_corpus import Corpus, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path)
