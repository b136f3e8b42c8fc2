"""Errors that the user can mend. Every script ends them alike: with one line that says what to do."""

from __future__ import annotations

from collections.abc import Collection


class InputError(Exception):
    """The config, the input or the machine cannot be used as asked: the process exits with 2.

    The message says what was found, what was expected and what to do.
    """


class Agreed(InputError):
    """An InputError that every rank raises alike, so that one of them may speak for all."""


class BadHost(InputError):
    """This host, or a GPU of it, cannot be used: the process exits with 69, and another host may do."""


class DamagedFile(InputError):
    """A token file is missing, cannot be read, or is not what its corpus says of it.

    The message names the file, the byte where there is one, what was found and what was expected.
    """


class CorruptError(Exception):
    """Weights, moments or gradients are not what they must be, bit by bit: raised by every rank.

    odd: the ranks that are proven wrong; exit code 69 if there are any, else 1.
    """

    def __init__(self, message: str, odd: Collection[int] = ()) -> None:
        super().__init__(message)
        self.odd = odd


class ReplicaError(CorruptError):
    """Ranks that should hold the same weights do not (llm/train/guard.py)."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the process exits with 1."""


class ReadError(Exception):
    """A disk or network failed while a file was read, again and again: it may be whole; the process exits with 1."""


class RendezvousError(RuntimeError):
    """The ranks did not all meet at MASTER_ADDR:MASTER_PORT in time (exit code 1)."""


class PeerError(RuntimeError):
    """Another rank has failed, which the message names: this one and its host are not to blame (exit code 1)."""


class Stopped(Exception):
    """All ranks have agreed to stop, and saved (llm/train/ballot.py); exit code 75: the same command goes on."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)
