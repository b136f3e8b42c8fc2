"""Small agreements between ranks, without pickle: strings travel as bytes in tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from llm.errors import Agreed, InputError

T = TypeVar("T")
MESSAGE_BYTES = 4096


def backend_device() -> torch.device:
    """Where the default group's backend can see a tensor."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _pack(text: str | None) -> torch.Tensor:
    """The text's length + 1 (0: no text) and its bytes, cut to MESSAGE_BYTES."""
    message = torch.zeros(MESSAGE_BYTES + 8, dtype=torch.uint8)
    if text is not None:
        data = text.encode()[:MESSAGE_BYTES]
        message[:8] = torch.tensor([len(data) + 1]).view(torch.uint8)
        message[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else message[:0]
    return message.to(backend_device())


def _unpack(message: torch.Tensor) -> str | None:
    message = message.cpu()
    length = int(message[:8].clone().view(torch.int64)) - 1
    return None if length < 0 else bytes(message[8 : 8 + length].tolist()).decode(errors="replace")


def exchange(text: str | None) -> list[str | None]:
    """Every rank's text, by rank; a barrier too. Texts are cut to 4096 bytes."""
    mine = _pack(text)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [_unpack(message) for message in everyone]


def exchange_errors(error: str | None) -> str | None:
    """The first rank's error, on every rank; None if no rank had one. A barrier."""
    return next((text for text in exchange(error) if text is not None), None)


def broadcast(text: str) -> str:
    """Rank 0's text, on every rank; cut to 4096 bytes."""
    message = _pack(text)
    dist.broadcast(message, src=0)
    return _unpack(message) or ""


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, every rank raises.

    So no rank waits for one that has gone, and all of them exit with the same code. Collective; `action` must not
    communicate. Raises Agreed with the first InputError's message, or RuntimeError with that of another failure.
    """
    result, problem, error = None, None, None
    try:
        result = action()
    except InputError as failure:
        error = f"input:{failure}"
    except Exception as failure:  # noqa: BLE001 - whatever it was, the others must hear of it
        problem, error = failure, f"other:rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
    first = exchange_errors(error)
    if first is None:
        return result  # pyright: ignore[reportReturnType]
    kind, message = first.split(":", 1)
    raise Agreed(message) if kind == "input" else RuntimeError(message) from problem
