"""Why a start of a run failed, for whoever starts it again: a passing fault, a bad input or a bad host."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llm.errors import BadHost, CorruptError, InputError, PeerError

# Exit codes. What passes may be tried again as it is; a bad input must be mended; a bad host must be left out.
PASSING, BAD_INPUT, BAD_HOST, STOPPED = 1, 2, 69, 75
# What CUDA and torch say of a GPU or driver that fails by itself. Illegal addresses and device-side assertions are not
# among them: programs cause these at least as often as GPUs.
BAD_GPU = re.compile(
    r"uncorrectable (ECC|NVLink) error|hardware stack error|no CUDA-capable device|No CUDA GPUs are available"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|CUDA driver initialization failed|system not yet initialized"
    r"|system has unsupported display driver|CUDA error: unknown error",
    re.IGNORECASE,
)


def exit_code(error: Exception) -> int:
    """The code that a process ends with, which `error` ends."""
    odd = isinstance(error, CorruptError) and error.odd
    gpu = isinstance(error, RuntimeError) and not isinstance(error, PeerError) and BAD_GPU.search(str(error))
    if odd or gpu or isinstance(error, BadHost):
        return BAD_HOST
    return BAD_INPUT if isinstance(error, InputError) else PASSING


def record_error(path: Path, error: Exception, *, rank: int) -> None:
    """`record_failure` of what ends this rank, unless another one is to blame, whose host the record must name."""
    odd = error.odd if isinstance(error, CorruptError) else ()
    if not isinstance(error, PeerError) and (not odd or rank in odd):
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        record_failure(path, exit_code(error), reason, rank=rank)


def record_failure(path: Path, code: int, reason: str, *, rank: int, host: str | None = None) -> None:
    """Write into `path` what ended the run, unless a rank has done so: the first failure is the cause of the others.

    host: that of the rank that failed; None: this one. A disk that cannot be written leaves no record.
    """
    record = {"code": code, "reason": reason, "rank": rank, "host": host or socket.gethostname()}
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))


def tell_start(code: int, environ: Mapping[str, str]) -> None:
    """Add an exit code to the file of this start (launch/relay.sh), since a launcher may end with another one."""
    if "INGOT_START" in environ:
        with suppress(OSError), open(environ["INGOT_START"], "a", encoding="utf-8") as file:
            file.write(f"{code}\n")


def start_is_over(environ: Mapping[str, str]) -> int | None:
    """Of a rank that torchrun starts again though its start was stopped, or the input is bad: that exit code."""
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        with suppress(OSError):
            codes = Path(environ.get("INGOT_START", os.devnull)).read_text(encoding="utf-8").split()
            return next((code for code in (BAD_INPUT, STOPPED) if str(code) in codes), None)
    return None
