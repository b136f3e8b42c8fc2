"""The part of the exhaustive lists that a commit chooses."""

from __future__ import annotations

import hashlib


def is_chosen(test: str, chosen_by: str, one_in: int) -> bool:
    """Whether a test is among the one in `one_in` that the text `chosen_by` chooses."""
    digest = hashlib.sha256(f"{chosen_by} {test}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0
