"""Keeps DeepSpeed's log away from the terminal, where it would bury the run's own lines."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TextIO

from llm.files import open_own


def divert(path: Path) -> TextIO:
    """Send what DeepSpeed logs from now on to the file `path`, its errors to the standard error as well.

    To be called before deepspeed is imported, which logs. Returns the file, for what DeepSpeed prints.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    log = io.TextIOWrapper(open_own(path, "a"), "utf-8", write_through=True)
    file, shown = logging.StreamHandler(log), logging.StreamHandler()
    shown.setLevel(logging.ERROR)
    for handler in (file, shown):
        handler.setFormatter(logging.Formatter("%(asctime)s DeepSpeed %(levelname)s %(filename)s: %(message)s"))

    def keep(record: logging.LogRecord) -> bool:
        for handler in (file, shown):
            if record.levelno >= handler.level:
                handler.handle(record)
        return False

    # A filter, which outlives the handlers that DeepSpeed gives its logger when it is imported.
    logging.getLogger("DeepSpeed").filters[:] = [keep]
    return log
