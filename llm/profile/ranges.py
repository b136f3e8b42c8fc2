"""Names what the profiler sees: a range around each part of the model and of the step, while a profile is taken.

`Ranges` puts forward hooks on the model's layers and a wrapper around five methods of the run, and takes all of them
off again. Outside of it the model and the engines are as written: unprofiled steps pay nothing. No hook changes a
value, and none communicates. llm/profile/trace.py reads the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llm.model.parts import MODEL_PARTS, PART_OF_LAYER

PREFIX = "ingot/"
# gradients: accumulation, what the engine does around the model, and autograd's own time between operations.
# clip and publish: the update before and after the optimizer's step.
STEP_PARTS = ("data", "gradients", "clip", "optimizer", "publish", "collectives")
PARTS = (*MODEL_PARTS, *STEP_PARTS)
# Ranges that are no part, with the part of what lies in no range within them; None: what came before.
CONTAINERS = {"model": None, "block": None, "forward_backward": "gradients", "update": "clip", "vote": "collectives"}


def mark_range(name: str) -> Any:
    """A context that the profiler sees as a range.

    Not torch.profiler.record_function: that is an operator, which dispatch modes see (llm/profile/memory.py), and
    costs five times as much.
    """
    return torch._C._profiler._RecordFunctionFast(PREFIX + name)  # pyright: ignore[reportAttributeAccessIssue]


class Ranges:
    """Ranges around the layers of `model` and these methods: (range, object, name of its method)."""

    def __init__(self, model: nn.Module, methods: Sequence[tuple[str, Any, str]], *, nvtx: bool) -> None:
        """nvtx: also as NVTX ranges, for NVIDIA's own tools; on a GPU alone."""
        self.model, self.methods, self.nvtx = model, methods, nvtx
        self.handles: list[Any] = []
        self.open: list[Any] = []

    def __enter__(self) -> Ranges:
        for path, module in self.model.named_modules():
            name = path.rpartition(".")[2]
            found = "block" if path.rpartition(".")[0] == "blocks" else PART_OF_LAYER.get(name)
            if path == "":
                found = "model"
            if found is not None and (path.count(".") in (0, 2) or found == "block"):
                self._hook(module, found)
        for name, owner, method in self.methods:
            assert method not in vars(owner), f"{method} is wrapped already"
            setattr(owner, method, self._wrapped(name, getattr(owner, method)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for _, owner, method in self.methods:
            delattr(owner, method)  # of the object: its class's own is there again
        self.handles.clear()

    def begin(self, name: str) -> None:
        mark = mark_range(name)
        mark.__enter__()
        self.open.append(mark)
        if self.nvtx:
            torch.cuda.nvtx.range_push(name)

    def end(self) -> None:
        if self.nvtx:
            torch.cuda.nvtx.range_pop()
        self.open.pop().__exit__(None, None, None)

    def _hook(self, module: nn.Module, name: str) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            self.begin(name)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self.end()

        # First and last of the layer's hooks. always_call: recomputation leaves a layer by an exception once it has
        # all that the backward pass needs (torch.utils.checkpoint).
        self.handles += [
            module.register_forward_pre_hook(before, prepend=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.begin(name)
            try:
                return method(*args, **options)
            finally:
                self.end()

        return call
