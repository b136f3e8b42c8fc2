"""Compiles the blocks of a GPT with torch.compile, so that all blocks of a kind share one graph (train.compile).

A key says what a graph is for: training or evaluation, a sequence length, a kind of block. The first block that is
called with a key compiles it. Whatever makes torch.compile trace the same key again is an error. Else a number that
changes from step to step would cost a compilation each time, and nobody would see why the run is slow.

- Weights are inputs of a graph. So is the number of each dropout's place in the network, which is wrapped for that.
- A graph has the whole block, collectives and recomputation included (fullgraph), and fixed shapes.
- Each block's forward method is replaced. Names of parameters stay, and hooks on a block run outside of its graph.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import calculate_time_spent, get_compilation_metrics
from torch.fx.experimental.sym_node import DynamicInt

from kernels.attention import Strided
from kernels.philox import DropoutKey
from llm.config import RunConfig
from llm.errors import InputError, require
from llm.model.build import Model
from llm.model.cache import KVCache
from llm.model.gpt import GPT, Block
from llm.model.layers import Documents

BACKEND = "inductor"


class Key(NamedTuple):
    """What a graph is for."""

    training: bool
    seq_len: int
    window: int | None
    sparse: Strided | None
    recompute: str
    grad: bool
    """Whether the block's input has a gradient; that of the first block has none where the embedding is frozen."""

    def __str__(self) -> str:
        kind = "".join(f", {name} {value}" for name, value in zip(self._fields[2:4], self[2:4], strict=True) if value)
        kind += ", input without a gradient" * (self.training and not self.grad)
        return f"{'training' if self.training else 'evaluation'} with {self.seq_len} positions{kind}"


class Graph:
    """A function of a block and its inputs that is compiled when it is called first."""

    def __init__(self, deterministic: bool) -> None:
        """deterministic: nothing is chosen by timing, so that ranks and runs compute alike."""
        self.count = 0
        """How often it was compiled."""
        options = {"config_patches": {"deterministic": deterministic}} if BACKEND == "inductor" else {}
        backend = partial(lookup_backend(BACKEND), **options)

        def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.count += 1
            return backend(graph, inputs)

        # torch.compile keeps its results by code object. With one of its own a graph meets no guards but its own.
        forward = Block.forward
        function = types.FunctionType(forward.__code__.replace(), forward.__globals__, "block", forward.__defaults__)
        self.call = torch.compile(function, backend=counted, fullgraph=True, dynamic=False)


class CompiledBlocks:
    """The graphs of a model's blocks."""

    def __init__(self, model: GPT, seq_lens: Collection[int], *, deterministic: bool) -> None:
        """Replace the forward methods of the blocks. seq_lens: of the run's phases; no others are compiled."""
        off = "torch.compile is turned off (TORCH_COMPILE_DISABLE); unset that, or use train.compile=none"
        require(not torch._dynamo.config.disable, f"train.compile blocks: {off}")
        self.seq_lens, self.deterministic = seq_lens, deterministic
        self.graphs: dict[Key, Graph] = {}
        self.said, self.start = 0, calculate_time_spent()["total_wall_time"]
        for module in cast("Iterable[Any]", model.blocks.modules()):
            if isinstance(key := getattr(module, "key", None), DropoutKey):
                module.key = replace(key, site=DynamicInt(key.site))  # else each block would need its own graph
        for block in cast("Iterable[Block]", model.blocks.values()):
            block.forward = partial(self._call, block)

    @staticmethod
    def of(config: RunConfig, model: Model) -> CompiledBlocks:
        """Of the model of a run, which is a GPT (llm/config/checks.py)."""
        assert isinstance(model, GPT), "an LSTM has no blocks of a transformer"
        lengths = dict.fromkeys(phase.seq_len for phase in config.phases)
        return CompiledBlocks(model, lengths, deterministic=config.train.deterministic)

    def _call(
        self,
        block: Block,
        x: Tensor,
        positions: Tensor,
        samples: Tensor,
        documents: Documents | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As Block.forward. Raises InputError where there is no graph, or not one alone."""
        if cache is not None:  # its length changes with every call
            return Block.forward(block, x, positions, samples, documents, cache)
        if documents is not None:  # whose number is another in each batch
            torch._dynamo.mark_dynamic(documents.cu_seqlens, 0)
        attention = block.attention
        key = Key(block.training, len(positions), attention.window, attention.sparse, block.recompute, x.requires_grad)
        if key not in self.graphs:
            lengths = ", ".join(map(str, self.seq_lens))
            found = f"found {key.seq_len} positions, expected those of the run's phases ({lengths})"
            require(key.seq_len in self.seq_lens, f"train.compile blocks: {found}; use train.compile=none")
            self.graphs[key] = Graph(self.deterministic)
        graph = self.graphs[key]
        try:
            result = graph.call(block, x, positions, samples, documents)
        except TorchDynamoException as error:
            raise InputError(f"train.compile blocks, {key}: {error}; use train.compile=none") from error
        if graph.count != 1:
            reason = next((metrics.recompile_reason or "" for metrics in get_compilation_metrics()[-1:]), "")
            changed = (reason.partition(": ")[2].splitlines() or ["unknown"])[0].strip()
            found = f"train.compile blocks, {key}: found {graph.count} graphs, expected 1"
            raise InputError(f"{found}; what has changed: {changed}; use train.compile=none")
        return result

    def news(self) -> str | None:
        """What was compiled since the last call, and in how many seconds of this process; None if nothing was."""
        new, start = [*self.graphs][self.said :], self.start
        self.said, self.start = len(self.graphs), calculate_time_spent()["total_wall_time"]
        return f"blocks compiled in {self.start - start:.1f} s: {'; '.join(map(str, new))}" if new else None
