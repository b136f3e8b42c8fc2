"""Starts and ends a launch script, on every rank: it watches the launcher, explains failures, sets the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from llm.cluster.failure import STOPPED, exit_code, record_error, start_is_over, tell_start
from llm.cluster.preflight import provide_home
from llm.cluster.ranks import discover_ranks
from llm.cluster.signals import Stop
from llm.cluster.watchdog import watch_launcher
from llm.errors import Agreed, CheckpointError, CorruptError, InputError, ReadError, RendezvousError, Stopped
from llm.sinks import protect_streams

PATIENCE_SECONDS = 10.0


def run_script(action: Callable[..., None], stop: Stop | None = None) -> None:
    """Run `action(ranks)`, or `action(ranks, stop)`, on this rank, watched; if it fails, say why and end the process.

    What a user can mend or must know is said in one line, the rest by a traceback. What every rank knows is said by
    rank 0, what one host knows by its first rank: the others wait PATIENCE_SECONDS to be ended, and then say it too,
    unless they were told to end before they failed. Exit codes: 75 for Stopped (0 under torchrun, which starts again
    what ends with another code), else those of llm/cluster/failure.py. stop: is asked by signals and the launcher's
    death; None: they end the process.
    """
    if code := start_is_over(os.environ):
        _leave(code if code == STOPPED else 0)  # 0: torchrun does not start it once more
    protect_streams()
    if stop is not None:
        os.umask(0o077)  # the files that libraries write into the run's folder are the owner's too
        stop.start = os.environ.get("INGOT_START")
        stop.listen()
    done = watch_launcher(stop)
    ranks = None
    try:
        provide_home()
        ranks = discover_ranks(os.environ)
        action(ranks) if stop is None else action(ranks, stop)
    except Stopped:
        _leave(0 if ranks is not None and ranks.launcher == "torchrun" else STOPPED)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the process ends
        code = exit_code(error)
        tell_start(code, os.environ)
        if ranks is not None and stop is not None and stop.failed is not None:
            record_error(stop.failed, error, rank=ranks.rank)
        shared = isinstance(error, (Agreed, CheckpointError, FloatingPointError, ReadError, CorruptError))
        if not shared and not isinstance(error, (InputError, RendezvousError)):
            traceback.print_exception(error)
        else:
            # A launcher ends all ranks once one has gone: not the one that tells.
            other = ranks is not None and ranks.rank > 0 and (shared or ranks.local_rank > 0)
            if not (other and (stop or Stop()).await_end(PATIENCE_SECONDS)):
                print(f"error: {error}", file=sys.stderr)
        _leave(code)
    done.set()  # only the exit is left


def _leave(code: int) -> NoReturn:
    # Not sys.exit: tearing down a process group would wait for ranks that may be gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_alone(action: Callable[[list[str]], None]) -> None:
    """Run `action` on the arguments of a script of one process; an InputError ends it with one line and exit code 2."""
    protect_streams()
    try:
        action(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def own_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A script's own options, and its other arguments. Raises InputError on a value that an option cannot have.

    parser: made with exit_on_error=False.
    """
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; --help lists the options") from error
