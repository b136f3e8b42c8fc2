"""The machine's limit: benchmarks/loader/gather.c, compiled where it runs, copies the same rows into the same types."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from benchmarks.loader.system import Job, System
from benchmarks.loader.tokens import TokenSet

SOURCE = Path(__file__).with_name("gather.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11")


class Gather(System):
    """form: as of ours.Ingot. It has no batches to hand out; `rate` takes the place of timing them."""

    def __init__(self, form: str) -> None:
        self.form = form

    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        subprocess.run(["cc", *FLAGS, "-o", str(_program(tokens)), str(SOURCE)], check=True)

    def rate(self, tokens: TokenSet, job: Job, seconds: float, mapped: bool) -> dict[str, Any]:
        """Tokens, seconds, CPU seconds and checksum of one run; seconds 0: of one batch."""
        out = tokens.item_size if self.form == "native" else 8
        eod = tokens.eod_id if job.documents else -1
        arguments = (tokens.paths[0], tokens.item_size, out, job.seq_len, job.rows, seconds, eod, int(mapped))
        command = [str(_program(tokens)), *map(str, arguments)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        count, took, cpu, checksum = int(words[0]), float(words[1]), float(words[2]), int(words[3])
        return {"tokens": count, "seconds": took, "cpu_seconds": cpu, "checksum": checksum}


def _program(tokens: TokenSet) -> Path:
    return tokens.folder / "gather"
