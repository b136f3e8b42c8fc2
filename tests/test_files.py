"""Files that are written whole: how they are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llm.files import by_size


@given(sizes=st.lists(st.integers(0, 12)), limit=st.integers(1, 10))
def test_groups_are_as_few_as_their_order_allows(sizes: list[int], limit: int) -> None:
    groups = list(by_size(sizes, int, limit))
    assert [size for group in groups for size in group] == sizes
    assert all(group and (sum(group) <= limit or len(group) == 1) for group in groups)
    assert all(sum(group) + after[0] > limit for group, after in pairwise(groups))
