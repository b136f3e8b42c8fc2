"""The C++ extension (csrc/bind.cpp). All of it works without the GIL and checks every index."""

import numpy as np
from numpy.typing import NDArray

class DamagedFile(RuntimeError): ...

class FileCache:
    opened: int
    held: int
    def __init__(self, capacity: int = ...) -> None: ...

class Corpus:
    def __init__(
        self, *, format: str, item_size: int, paths: list[str], tokens: list[int], vocab_size: int, cache: FileCache
    ) -> None: ...
    def __len__(self) -> int: ...
    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray: ...

class TokenStore:
    def __init__(self, path: str, item_size: int, n_tokens: int) -> None: ...
    def __len__(self) -> int: ...
    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray: ...

class Prefetcher:
    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        seed: int,
        first: int,
        stride: int,
        rows: int,
        depth: int,
        threads: int,
    ) -> None: ...
    def next(self) -> tuple[NDArray, NDArray[np.int64]]: ...
    def close(self) -> None: ...

def positions(seed: int, n_samples: int, first: int, count: int) -> NDArray[np.int64]: ...
