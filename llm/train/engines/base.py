"""The interface between the training loop and an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.checkpoint.manifest import Piece
from llm.data.batch import Batch
from llm.model.layers import IGNORED_TARGET, Documents
from llm.slices import Slice

# Adam's moments, by the names that checkpoints, torch and DeepSpeed use.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Of the model's own weights and activations, by train.precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MicroBatch(NamedTuple):
    """The arguments of one forward pass, on the engine's device."""

    tokens: Tensor
    """int64 [B, T]"""
    positions: Tensor
    """int64 [T]"""
    samples: Tensor
    """int64 [B]: global sample numbers"""
    targets: Tensor
    """int64 [B, T]; IGNORED_TARGET where not counted"""
    documents: Documents | None = None
    """None unless data.document_masks"""


def micro_batch(batch: Batch, device: torch.device, rows: int | None = None) -> MicroBatch:
    """Widen a loader's batch on the device; only its first `rows` rows have targets (default: all)."""
    tokens = batch.tokens.to(device, non_blocking=True).long()
    targets = tokens[:, 1:]
    if batch.counted is not None:
        targets = targets.masked_fill(batch.counted.to(device, non_blocking=True) == 0, IGNORED_TARGET)
    if rows is not None and rows < len(tokens):
        targets = targets.clone()
        targets[rows:] = IGNORED_TARGET
    documents = None
    if batch.position_ids is not None and batch.cu_seqlens is not None:
        position_ids = batch.position_ids.to(device, non_blocking=True).long()
        documents = Documents(position_ids, batch.cu_seqlens.to(device, non_blocking=True))
    positions = torch.arange(targets.shape[1], device=device)
    samples = batch.sample_ids.to(device, non_blocking=True)
    return MicroBatch(tokens[:, :-1], positions, samples, targets, documents)


class StepResult(NamedTuple):
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """The gradients overflowed: weights and Adam's step are as before."""


class WeightSource(Protocol):
    """Where an engine's weights come from: a CheckpointReader, or InitialWeights."""

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """`part` of "master", "exp_avg" or "exp_avg_sq" of a parameter, fp32 [part.shape]."""
        ...


class Engine(Protocol):
    """Holds the model and the optimizer, spread over ranks in its own way.

    Every method is collective but set_lr and those that say so.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name; under ZeRO 3 they are partitioned."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every data-parallel rank holds the same weights, rather than a part of them."""
        ...

    def local_weight(self, name: str) -> Tensor:
        """What this rank keeps of a parameter between steps, as the forward pass uses it; not collective.

        All of its tensor-parallel slice, or under ZeRO 3 and FSDP this rank's partition of it.
        """
        ...

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> float:
        """Accumulate the gradient of (sum of losses over all ranks) / target_count and return that quotient."""
        ...

    def step(self) -> StepResult:
        """Clip by the global norm and update the weights, unless the gradients overflowed."""
        ...

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Sum of losses and count of targets over all ranks, without dropout; every rank passes as many batches."""
        ...

    def gradient(self, name: str) -> Tensor:
        """The accumulated gradient of a parameter in its global shape, fp32; between forward_backward and step."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def state_pieces(self) -> Iterator[Piece]:
        """What this rank writes: over all ranks, each element of master weights and moments exactly once."""
        ...

    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        """Fill master weights, and moments if optimizer_step > 0, from any layout's, and publish them."""
        ...

    def scalar_state(self) -> dict[str, Any]:
        """JSON-ready: `optimizer_step` (updates made) and `loss_scale` (None unless fp16)."""
        ...

    def load_scalar_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def sum_over(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """All-reduce a small CPU tensor in place through `device`, where the group's backend can see it."""
    if group is None or group.size() == 1:
        return
    on_device = values.to(device)
    dist.all_reduce(on_device, group=group)
    values.copy_(on_device)
