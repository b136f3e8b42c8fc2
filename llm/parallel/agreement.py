"""Lets the ranks of a group (by default all) agree and exchange strings, without pickle: as bytes in tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm.errors import Agreed, CheckpointError, InputError, PeerError, ReadError

T = TypeVar("T")
MESSAGE_BYTES = 4096


def backend_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where the group's backend can see a tensor."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _pack(text: str | None) -> torch.Tensor:
    """uint8 [8 + MESSAGE_BYTES]: the text's length + 1 (0: no text) and its bytes, cut to MESSAGE_BYTES."""
    data = (text or "").encode()[:MESSAGE_BYTES]
    length = 0 if text is None else len(data) + 1
    padded = length.to_bytes(8, "little") + data.ljust(MESSAGE_BYTES, b"\0")
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def _unpack(message: torch.Tensor) -> str | None:
    data = message.cpu().numpy().tobytes()
    length = int.from_bytes(data[:8], "little") - 1
    return None if length < 0 else data[8 : 8 + length].decode(errors="replace")


def exchange(text: str | None, group: dist.ProcessGroup | None = None) -> list[str | None]:
    """Every rank's text, by rank, cut to 4096 bytes. A barrier."""
    message = _pack(text).to(backend_device(group))
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(messages, message, group)
    return [_unpack(message) for message in messages]


def broadcast(text: str, group: dist.ProcessGroup | None = None) -> str:
    """The text of the group's rank 0, on every rank; cut to 4096 bytes."""
    message = _pack(text).to(backend_device(group))
    dist.broadcast(message, group_src=0, group=group)
    return _unpack(message) or ""


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank of the group; if it fails on any, every rank raises.

    So no rank waits for one that has gone, and all of them exit with the same code. Collective; `action` must not
    communicate. Raises what the first rank that failed has raised: Agreed for an InputError, a CheckpointError, a
    ReadError, or for any other failure RuntimeError on a rank that failed and PeerError on the rest.
    """
    result, cause, error = None, None, None
    try:
        result = action()
    except InputError as failure:
        error = f"input:{failure}"
    except ReadError as failure:
        cause, error = failure, f"read:{failure}"
    except CheckpointError as failure:
        cause, error = failure, f"checkpoint:{failure}"
    except Exception as failure:  # noqa: BLE001 - whatever it was, the others must hear of it
        cause, error = failure, f"other:rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
    first = next((text for text in exchange(error, group) if text is not None), None)
    if first is None:
        return result  # pyright: ignore[reportReturnType]
    kind, message = first.split(":", 1)
    other = PeerError if cause is None else RuntimeError
    kinds = {"input": Agreed, "checkpoint": CheckpointError, "read": ReadError, "other": other}
    raise kinds[kind](message) from cause


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks that wait for one another for days if need be, whatever the time-out. Collective."""
    group: Any = dist.new_group(timeout=timedelta(days=365), backend="gloo")
    yield group
    dist.destroy_process_group(group)


def lead_first(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait, for days if need be. Collective; raises as `together` does."""
    with patient_group() as patient:
        together(lambda: action() if dist.get_rank() == 0 else None, patient)
