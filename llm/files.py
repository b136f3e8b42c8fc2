"""Writes files completely or not at all: private, fsynced, never through a symlink. Also computes their hashes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import reprlib
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import xxhash

from llm.errors import CheckpointError, InputError, ReadError, require

if TYPE_CHECKING:  # what is read before torch is imported, such as a corpus's manifest, needs this module too
    import torch
    from torch import Tensor

T = TypeVar("T")
# Bytes that are hashed at once: few enough to be in the processor's cache still when they are written, or just read.
CHUNK = 1 << 20
# By the names of the commands that print them, `xxh128sum` and `sha256sum`.
HASHES: dict[str, Callable[[], Any]] = {"xxh128": xxhash.xxh128, "sha256": hashlib.sha256}
# What says that a file is not there, or not for us, whenever it is asked; all else may pass.
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
UNFIT = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EFBIG)  # a link, no regular file, a socket, too large
# Of JSON. Of a checkpoint's manifest, in which a piece has 8 values, that makes 125,000 pieces.
MAX_VALUES, MAX_DEPTH = 1_000_000, 64
SMALL_JSON = 1 << 24  # bytes of a file that a run writes
LONGEST_LINE = 1 << 20  # bytes of a line of metrics
SPARSE_FROM, SPARSE = 1 << 30, 16  # bytes, hashed in a second or two; no files of weights, ids or text are so empty
HOLES = "most of which were never written to the disk"
WAITS = (0.1, 0.5, 2.0)  # seconds before a read that failed is tried again
# torch's names, and those of safetensors.
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def open_regular(path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """os.open of a regular file: OSError, at once, for a pipe, a device or a folder, and with O_NOFOLLOW for a link."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)  # else a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def open_own(path: Path, mode: Literal["a", "w"]) -> io.FileIO:
    """A file in a folder of ours, unbuffered, to append to or to write anew, 0600 if it is new; OSError for a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    return io.FileIO(open_regular(path, flags), mode)


def read_up_to(path: Path | str, limit: int, flags: int = os.O_RDONLY) -> bytes:
    """The bytes of a regular file or of what a link leads to; OSError for another kind, or more than `limit` bytes.

    With O_NOFOLLOW among `flags`, a link is another kind.
    """
    with open(open_regular(path, flags), "rb") as file:
        size = os.fstat(file.fileno()).st_size or limit  # /proc says 0
        content = file.read(min(size, limit) + 1)
    if content is None or len(content) > limit:  # None: of /proc, and has nothing to read yet
        raise OSError(errno.EFBIG, f"is no file of at most {limit} bytes", str(path))
    return content


def create(path: Path, parts: Iterable[bytes | memoryview], size: int, algorithm: str = "xxh128") -> str:
    """Write a new file of `size` bytes, mode 0600, fsync it and return its hash by an algorithm of HASHES, in hex.

    Raises CheckpointError, naming the bytes needed and free, where the disk or the quota is full,
    and FileExistsError where there is such a file.
    """
    digest = HASHES[algorithm]()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    digest.update(chunk)
                    write_all(file.fileno(), chunk)
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    # The disk begins now, beside what follows, and not at the fsync.
                    end = os.lseek(file.fileno(), 0, os.SEEK_CUR)
                    os.posix_fadvise(file.fileno(), end - len(view), len(view), os.POSIX_FADV_DONTNEED)
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(path, size) from error
    return digest.hexdigest()


def create_bytes(path: Path, content: bytes) -> tuple[int, str]:
    """`create` a file that holds `content`: (size, xxh128)."""
    return len(content), create(path, [content], len(content))


def create_safetensors(
    path: Path, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]], tensors: Iterator[Tensor]
) -> tuple[int, str]:
    """`create` a safetensors file of the next tensors, on the CPU and of these shapes, one by one: (size, xxh128)."""
    import torch

    # Not by safetensors.save_file: the hash is of what was meant to be written, and a full disk is an OSError.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[str(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format pads its header so that the tensors are aligned

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name, shape in shapes.items():
            tensor = next(tensors)
            found, expected = (tensor.dtype, tuple(tensor.shape)), (dtype, tuple(shape))
            assert found == expected, f"{name} is {found}; expected {expected}"
            yield memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore

    size = 8 + len(text) + end
    return size, create(path, parts(), size)


def by_size(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in lists of at most `limit` bytes, or of one item that has more."""
    group, total = list[T](), 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def write_all(descriptor: int, view: memoryview) -> None:
    """os.write until all of `view` is written: one call may take less."""
    while len(view):
        view = view[os.write(descriptor, view) :]


def room_for(path: Path) -> int:
    """Bytes that the file or folder may take: those free and those that it has."""
    status = os.statvfs(path.parent)
    allocated = os.lstat(path).st_blocks * 512 if path.exists() else 0
    return status.f_bavail * status.f_frsize + allocated


def check_room(path: Path, size: int) -> None:
    """Raise CheckpointError unless `path`, a file or folder, may take `size` bytes."""
    if size > room_for(path):
        raise _disk_full(path, size)


def _disk_full(path: Path, size: int) -> CheckpointError:
    what = f"the disk is full: {path} needs {size} bytes and {room_for(path)} are free"
    return CheckpointError(f"{what}; make room or save elsewhere, then start the run again")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, or, whatever happens, leave it as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    create_bytes(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`replace` a file by JSON, where a number that is not finite is the text "nan" or "inf"."""
    text = json.dumps(content, default=float)  # default: numbers of numpy
    finite = json.loads(text, parse_constant=lambda name: str(float(name)))
    replace(path, (json.dumps(finite, indent=1) + "\n").encode())


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path`, fsynced, when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path, mode: int = 0o700) -> Iterator[Path]:
    """An empty folder, which becomes `path` when the block ends without an exception, and is gone after one.

    mode: its own. Raises InputError where it cannot be made or `path` is taken: by all but an empty folder of no mount.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        special = path.is_symlink() or path.is_mount()  # which no folder can take the place of
        found = special or (path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None))
        require(not found, f"{path} is there already; choose another, or move it away")
        temporary.mkdir(mode, parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def patiently(read: Callable[[], T], path: Path) -> T:
    """What `read`, of a file or folder at `path`, gives: tried again where a disk or network fails it.

    Raises CheckpointError for what is not there or not permitted, ReadError where the last attempt fails otherwise.
    """
    waits = list(WAITS)
    while True:
        try:
            return read()
        except OSError as error:
            why, tries = error.strerror or error, len(WAITS) + 1
            if isinstance(error, LASTING) or error.errno in UNFIT:
                raise CheckpointError(f"{path} cannot be read: {why}") from error
            if not waits:
                raise ReadError(f"{path} could not be read in {tries} attempts: {why}; it may be whole") from error
        time.sleep(waits.pop(0))


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file; CheckpointError for anything else, a symlink included, ReadError as above."""
    status = patiently(lambda: os.lstat(path), path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def read_regular(path: Path, most: int) -> bytes:
    """`read_up_to`, patiently and not through a link; raises CheckpointError, ReadError."""
    regular_size(path)
    return patiently(lambda: read_up_to(path, most, os.O_NOFOLLOW), path)


def read_json(path: Path, most: int = SMALL_JSON) -> dict[str, Any]:
    """`parse_json` of a regular file of at most `most` bytes; raises CheckpointError, ReadError."""
    return parse_json(read_regular(path, most), str(path))


def parse_json(text: bytes, what: str, values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `text`: no key twice, no NaN, at most MAX_DEPTH levels and about `values` values.

    Raises CheckpointError, naming `what`, on anything else.
    """
    # Before it is parsed: a short text may hold many values, of which each takes 20 times the memory of its text.
    if sum(map(text.count, (b",", b"[", b"{"))) > values:
        raise CheckpointError(f"{what} holds more than {values} values")
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise CheckpointError(f"{what} is nested more than {MAX_DEPTH} levels deep")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice in an object")
    return found


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, each with its JSON object; None for one that is torn, longer than LONGEST_LINE, or no JSON.

    One of those that are too long comes in parts. Raises InputError for what is no regular file, OSError.
    """
    torn = False  # whether the line goes on from the part before
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # which does not wait for a pipe's other end
        require(stat.S_ISREG(os.fstat(file.fileno()).st_mode), f"{path} is not a regular file; move it away")
        while line := file.readline(LONGEST_LINE):
            whole, torn = not torn and line.endswith(b"\n"), not line.endswith(b"\n")
            found = None
            if whole:
                with suppress(CheckpointError):
                    found = parse_json(line, str(path))
            yield line, found


def remote_bytes(system: Any, path: str, most: int, start: int | None = None) -> bytes:
    """The bytes of a file of an fsspec file system: all of them, or `most` from `start` on.

    A web server may send more than it is asked for, and no end: one byte more is read then, and no other. Raises
    CheckpointError for a whole file of more than `most` bytes, and what the file system raises.
    """
    if "http" not in system.protocol:  # what has told a size keeps to it
        long, ends = start is None and system.info(path)["size"] > most, None if start is None else start + most
        text = b"" if long else system.cat_file(path, start=start, end=ends)
    else:
        headers = {} if start is None else {"headers": {"Range": f"bytes={start}-{start + most - 1}"}}
        parts, left = list[bytes](), most + 1
        with system.open(path, block_size=0, size=1, **headers) as file:  # a stream; no size is asked for first
            while left > 0 and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        text, long = b"".join(parts), start is None and left <= 0
    if long:
        raise CheckpointError(f"{path} has more than {most} bytes")
    return text


def hash_of(path: Path | str, algorithm: str, progress: Callable[[int], None] = lambda count: None) -> str:
    """The hash of a file by an algorithm of HASHES, in hex; raises OSError.

    progress: called with the bytes read since its last call.
    """
    digest, buffer = HASHES[algorithm](), memoryview(bytearray(CHUNK))
    with open(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def mostly_holes(paths: Sequence[Path | str]) -> bool:
    """Whether files of SPARSE_FROM bytes or more, taken together, have data in less than a SPARSE-th; raises OSError.

    The rest was never written: it takes no room on a disk, but time to hash. A file system that compresses may say so
    of zeros that were written; one that cannot tell says that all is data.
    """
    total, data = sum(os.stat(path).st_size for path in paths), 0
    for path in paths if total >= SPARSE_FROM else ():
        with open(open_regular(path), "rb", buffering=0) as file:
            end = 0
            while data * SPARSE < total:
                try:
                    begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # no data from `end` on
                        raise
                    break
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                data += end - begin
    return total >= SPARSE_FROM and data * SPARSE < total


def sha256_of(path: Path | str, progress: Callable[[int], None] = lambda count: None) -> str:
    """`hash_of` by SHA-256: what data is known by. OSError too for a file that is `mostly_holes`."""
    if mostly_holes([path]):
        raise OSError(errno.EFBIG, f"has {os.stat(path).st_size} bytes, {HOLES}", str(path))
    return hash_of(path, "sha256", progress)


def claim(path: Path) -> None:
    """Make the folder that a report, option --json, will lie in; InputError if it cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--json {path}: the folder cannot be made ({error}); choose another path") from error
    writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    require(writable, f"--json {path} is a folder or lies in one that cannot be written; choose another path")
