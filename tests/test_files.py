"""Files that are written whole: how they are cut, and their hashes."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from llm.files import CHUNK, by_size, create, create_bytes, hash_of


@given(sizes=st.lists(st.integers(0, 12)), limit=st.integers(1, 10))
def test_groups_are_as_few_as_their_order_allows(sizes: list[int], limit: int) -> None:
    groups = list(by_size(sizes, int, limit))
    assert [size for group in groups for size in group] == sizes
    assert all(group and (sum(group) <= limit or len(group) == 1) for group in groups)
    assert all(sum(group) + after[0] > limit for group, after in pairwise(groups))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_the_hash_is_of_all_that_is_written(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    expected = {"xxh128": xxhash.xxh3_128_hexdigest(content), "sha256": hashlib.sha256(content).hexdigest()}
    for algorithm, value in expected.items():
        parts = [content[: size // 3], b"", memoryview(content)[size // 3 :]]
        assert create(tmp_path / algorithm, parts, size, algorithm) == value
        assert (tmp_path / algorithm).read_bytes() == content
        assert hash_of(tmp_path / algorithm, algorithm) == value
    assert create_bytes(tmp_path / "whole", content) == (size, expected["xxh128"])


def test_the_hash_is_what_xxh128sum_prints(tmp_path: Path) -> None:
    """The published XXH128 of nothing, without a seed."""
    assert create(tmp_path / "empty", [], 0) == "99aa06d3014798d86001c324468d497f"
