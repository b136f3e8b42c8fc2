"""What a process and its descendants use: memory, CPU time, page tables. Linux, since 5.14."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

MADV_POPULATE_READ = 22


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:  # the thread has ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its living descendants."""
    total = time.process_time()
    for pid in descendants(os.getpid()):
        try:
            total += time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): the clock of another process
        except OSError:
            continue
    return total


class Memory:
    """Memory taken since `Memory()`: what was there before, such as imported libraries, does not count."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        self._resident = _fields("/proc/self/status")["VmRSS"]
        self._anonymous = _anonymous(os.getpid())

    def taken(self) -> dict[str, float]:
        """MB: the peak, pages mapped from files included, and of what is no file's, now. Descendants included."""
        below = descendants(os.getpid())
        peak = _fields("/proc/self/status")["VmHWM"] - self._resident
        peak += sum(_fields(f"/proc/{pid}/smaps_rollup").get("Pss", 0) for pid in below)
        anonymous = sum(map(_anonymous, [os.getpid(), *below])) - self._anonymous
        return {"peak_mb": peak / 1e3, "anonymous_mb": anonymous / 1e3}


def _anonymous(pid: int) -> int:
    """kB that are no file's, its part of what processes share."""
    fields = _fields(f"/proc/{pid}/smaps_rollup")
    return fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0)


def _fields(path: str) -> dict[str, int]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:  # the process has ended meanwhile
        return {}
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
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/"):
            begin, end = (int(word, 16) for word in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)


def drop(paths: Iterable[Path]) -> None:
    """Put files out of the page cache, as far as they are written and nobody maps them."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
