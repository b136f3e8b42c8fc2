"""Which rank says what ends the run, when its launcher ends the others sooner or later than they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A rank that fails as all of its host do, a while after the launcher may have told it to end.
FAILING = """
import os, sys
from llm.cluster import script
from llm.cluster.signals import Stop
from llm.errors import InputError
script.PATIENCE_SECONDS = float(sys.argv[1])
def fail(ranks, stop):
    if len(sys.argv) > 2:
        os.kill(os.getpid(), int(sys.argv[2]))
    raise InputError("the data is not prepared")
script.run_script(fail, Stop())
"""


def failing(rank: int, *arguments: str) -> tuple[int, str]:
    """The exit code and the standard error of rank `rank` of two on one host."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environ = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    command = [sys.executable, "-c", FAILING, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("rank", "arguments", "says"),
    [
        (0, ["60"], True),
        (0, ["60", str(signal.SIGTERM.value)], True),
        (1, ["0.1"], True),  # nobody ends it: what failed may be of this rank alone
        (1, ["60", str(signal.SIGTERM.value)], False),  # the launcher was faster than this rank
    ],
)
def test_what_all_ranks_of_a_host_know_is_said_once(rank: int, arguments: list[str], says: bool) -> None:
    code, said = failing(rank, *arguments)
    assert (code, said) == (2, "error: the data is not prepared\n" if says else "")
