"""Counts the bytes of live tensor storages in a program.

The counter is a dispatch mode: it sees every operator of torch, whoever calls it, DeepSpeed and FSDP2 included, on a
CPU and on a GPU. It sees backward passes too: autograd runs them on the thread that asks for them (CPU), or hands that
thread's modes to its own (GPU). It does not see threads that a library starts; neither engine computes on any.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Bytes of the tensor storages that are alive on this rank, those that only autograd's graph holds included.

    Storages are known from the moment an operator returns them while this is entered; those that exist before, if a
    Python object or a gradient of one holds them. Each counts once, however many tensors share it, and as large as it
    is when asked. What an operator allocates for itself and frees before it returns is not seen.

    existing: whether those that exist before count.
    """

    def __init__(self, *, existing: bool = True) -> None:
        super().__init__()
        self.existing = existing
        self.peak = 0
        """The most bytes that were alive after any operator, since this was entered."""
        # By address. A weak reference keeps the address from being used again.
        self._known: dict[int, StorageWeakRef] = {}
        self._ignored: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> LiveStorages:
        tensors = [obj for obj in gc.get_objects() if issubclass(type(obj), Tensor)]
        gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        self._learn([*tensors, *gradients], self._known if self.existing else self._ignored)
        self.peak = self.live()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self._learn(tree_leaves(result), self._known)
        self.peak = max(self.peak, self.live())
        return result

    def _learn(self, values: Iterable[Any], known: dict[int, StorageWeakRef]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.device.type != "meta" and not is_wrapper(type(value)):
                reference = StorageWeakRef(value.untyped_storage())
                if reference.cdata not in self._ignored:
                    known.setdefault(reference.cdata, reference)

    def live(self) -> int:
        """Bytes that are alive now."""
        total = 0
        for address, reference in list(self._known.items()):
            storage = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._known[address]
            else:
                total += storage.nbytes()
        return total


def is_wrapper(kind: type) -> bool:
    """Whether tensors of this class, such as DTensor, consist of other tensors."""
    return hasattr(kind, "__tensor_flatten__")
