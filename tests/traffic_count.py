"""What a program sends, counted: bytes of each collective.

The counter sees what benchmarks.layout.counters.LiveStorages sees, for the same reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.layout.counters import is_wrapper
from traffic_theory import Collective


class Volume(NamedTuple):
    """What was sent by one kind of collective.

    The payload of a call is its whole buffer on one rank: that of an all-reduce, broadcast or reduction, the output of
    an all-gather, the input of a reduce-scatter.
    """

    calls: int
    payload: int
    """bytes"""

    def plus(self, payload: int) -> Volume:
        """With one more call."""
        return Volume(self.calls + 1, self.payload + payload)


# Operator, without the namespace and a last "_" -> kind, and the argument that is the payload. None: not an argument,
# but `ranks` times the first.
OPERATORS: dict[str, tuple[str, int | None]] = {
    # c10d: what torch.distributed's functions call
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "_allgather_base": ("all_gather", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    # _c10d_functional
    "all_reduce": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "all_gather_into_tensor_out": ("all_gather", None),
    "all_gather_into_tensor_coalesced": ("all_gather", None),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_out": ("reduce_scatter", 0),
}
# Operators of the two namespaces that carry no tensor to another rank.
LOCAL = {"wait_tensor", "_wrap_tensor_autograd", "check_for_nan", "barrier", "monitored_barrier"}


class Traffic(TorchDispatchMode):
    """Counts the collectives that this rank takes part in while it is entered: `with Traffic() as traffic: ...`.

    Calls among one rank, which send nothing, are left out. Scalars are counted apart: calls of one
    element or two, such as a loss, a flag, the squares of a norm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.volumes: dict[Collective, Volume] = {}
        self.scalars = Volume(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises NotImplementedError for a collective that is not in the table."""
        if any(map(is_wrapper, types)):
            return NotImplemented  # it calls plain tensors' operators, which come here again
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        # What it calls in turn does not come here: an operator is counted once.
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        name = func._opname.removesuffix("_")
        if name in LOCAL:
            return
        if name not in OPERATORS:
            raise NotImplementedError(f"{func} is not counted; add it to traffic_count.OPERATORS")
        kind, argument = OPERATORS[name]
        ranks = _group_size(args)
        tensors = [leaf for leaf in tree_leaves(args[argument or 0]) if isinstance(leaf, Tensor)]
        payload = sum(t.numel() * t.element_size() for t in tensors) * (ranks if argument is None else 1)
        if ranks == 1:
            return
        if sum(t.numel() for t in tensors) <= 2:
            self.scalars = self.scalars.plus(payload)
        else:
            collective = Collective(kind, ranks)
            self.volumes[collective] = self.volumes.get(collective, Volume(0, 0)).plus(payload)

    @property
    def payload(self) -> dict[Collective, int]:
        """Bytes by collective."""
        return {collective: volume.payload for collective, volume in self.volumes.items()}


def _group_size(args: Iterable[Any]) -> int:
    """Ranks of the process group among an operator's arguments: an object, or its name as the last string."""
    names = []
    for arg in args:
        if isinstance(arg, str):
            names.append(arg)
        elif isinstance(arg, dist.ProcessGroup):
            return arg.size()
        elif isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return dist.distributed_c10d._resolve_process_group(names[-1]).size()
