"""Reads the memory of a process, the page cache and page tables. Linux, since 5.14."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

MADV_POPULATE_READ = 22


class Memory:
    """Memory taken since `Memory()`: what was there before, such as imported libraries, does not count."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
        self._resident, self._anonymous = _kilobytes("status")["VmRSS"], _anonymous()

    def taken(self) -> dict[str, float]:
        """MB: the peak, pages mapped from files included, and of what is no file's, now."""
        peak = _kilobytes("status")["VmHWM"] - self._resident
        return {"peak_mb": peak / 1e3, "anonymous_mb": (_anonymous() - self._anonymous) / 1e3}


def _anonymous() -> int:
    """kB that are no file's, this process's part of what several share."""
    fields = _kilobytes("smaps_rollup")
    return fields["Pss_Anon"] + fields["Pss_Shmem"]


def _kilobytes(name: str) -> dict[str, int]:
    """Fields of a file of /proc/self."""
    lines = Path("/proc/self", name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split()[:2] for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) for name, value in pairs}


def warm(paths: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            pages.madvise(MADV_POPULATE_READ)


def populate(folder: Path) -> None:
    """Put every page of the files under `folder` that this process has mapped into its page table."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/"):
            begin, end = (int(word, 16) for word in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)


def drop(paths: Iterable[Path]) -> None:
    """Put files out of the page cache, as far as they are written and nobody maps them."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
