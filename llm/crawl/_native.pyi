from collections.abc import Sequence

import numpy as np

def words(text: str) -> list[str]: ...
def sentences(text: str) -> int: ...
def statistics(
    text: str,
    words: list[str] | None,
    stop_words: Sequence[str],
    short_line: int,
    top: Sequence[int],
    duplicate: Sequence[int],
) -> tuple[list[int], list[int], list[int]]: ...
def ngrams(text: str, n: int) -> np.ndarray: ...
