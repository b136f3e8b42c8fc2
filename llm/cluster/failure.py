"""Why a start of a run failed, for whoever starts it again: a passing fault, a bad input or a bad host."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

# Exit codes. What passes may be tried again as it is; a bad input must be mended; a bad host must be left out.
PASSING, BAD_INPUT, BAD_HOST, STOPPED = 1, 2, 69, 75


def record_failure(path: Path, code: int, reason: str, *, rank: int, host: str | None = None) -> None:
    """Write into `path` what ended the run, unless a rank has done so: the first failure is the cause of the others.

    host: that of the rank that failed; None: this one. A disk that cannot be written leaves no record.
    """
    record = {"code": code, "reason": reason, "rank": rank, "host": host or socket.gethostname()}
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))
