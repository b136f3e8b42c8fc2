"""What an engine is for the training loop, and how a checkpoint sees its fp32 state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from llm.checkpoint.manifest import Piece
from llm.checkpoint.reader import CheckpointReader
from llm.config import RunConfig
from llm.config.matrices import MOMENTS, moments_of
from llm.data.batch import Batch
from llm.model.layers import IGNORED_TARGET, Documents
from llm.parallel.agreement import patient_group, together
from llm.parallel.mesh import Mesh
from llm.slices import Slice, slice_of
from llm.train.stragglers import Stopwatch

if TYPE_CHECKING:  # it imports much of torch that other runs never need
    from llm.train.compiled import CompiledBlocks

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


Measure: TypeAlias = Callable[[nn.Module, MicroBatch], Tensor]


def loss_and_count(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The sum of the losses of a batch and the count of its targets, fp64 [2]."""
    return torch.stack([model(*batch).double(), (batch.targets != IGNORED_TARGET).sum().double()])


Refuse: TypeAlias = Callable[[Tensor], Tensor]
"""Whether a step must not change the weights, bool [], by its gradient's norm []. May be collective."""


def not_finite(norm: Tensor) -> Tensor:
    return norm.isfinite().logical_not()


class StepResult(NamedTuple):
    """Tensors [] on a device: reading one waits for the step. One that is skipped or left out changes nothing."""

    grad_norm: Tensor
    """Global norm before clipping."""
    skipped: Tensor
    """Whether fp16's gradients overflowed, which a smaller loss scale can mend."""
    left_out: Tensor
    """Whether it was refused for another reason."""


class WeightSource(Protocol):
    """Where an engine's weights come from: a CheckpointReader, or InitialWeights."""

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """`part` of "master", "exp_avg" or "exp_avg_sq" of a parameter, fp32 [part.shape]."""
        ...


class Fragment(NamedTuple):
    """`numel` elements from `offset` of `flat` are those from `start` of the flattened slice of a parameter.

    `flat` holds fp32 weights and is a key of the optimizer's state. A vocabulary's padding rows are not counted.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view [numel] of a tensor that is laid out as `flat`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def tensors(self, optimizer: Optimizer, moments: Iterable[str]) -> dict[str, Tensor]:
        """Views [numel] of the master weights and of these moments."""
        return {"master": self.of(self.flat)} | {kind: self.of(optimizer.state[self.flat][kind]) for kind in moments}


class Engine(ABC):
    """Holds the model and the optimizer, spread over ranks in its own way.

    Every method is collective but set_lr and those that say so.
    """

    optimizer: Optimizer
    """Of optim.name, over the fp32 masters."""
    replicated: bool
    """Whether every data-parallel rank holds the same weights, rather than a part of them."""
    replicated_state: bool
    """Whether every data-parallel rank holds the same masters and moments."""
    compiled: CompiledBlocks | None = None
    """The graphs of the model's blocks, with train.compile."""

    def __init__(self, config: RunConfig, model: nn.Module, mesh: Mesh | None, device: torch.device) -> None:
        """mesh: None for a process alone, which only the plain engine can be."""
        self.model, self.device, self.grad_clip = model, device, config.optim.grad_clip
        self.dp_group = mesh.dp_group if mesh is not None else None
        self.dp_rank, self.tp_rank = (mesh.dp_rank, mesh.tp_rank) if mesh is not None else (0, 0)
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        """The model's parameters by name; under ZeRO 3 they are partitioned."""
        self.slices = {name: slice_of(parameter) for name, parameter in self.parameters.items()}
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        """Those that steps change: all, or with LoRA few of them."""
        self.moments = {name: moments_of(name, config.optim) for name in self.trained}
        """What the optimizer keeps of each of them."""
        self.forward_time = Stopwatch(device)  # of steps, not of validations
        self.pieces_read = 0
        """By load_pieces, for who watches its progress."""
        self.waits: dict[str, Stopwatch] = {}
        """Of the groups, "dp" and "tp", all of whose collectives are issued by Ingot: this rank's waits in them.

        They run while a step of the training loop does."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates made. May wait for the device."""

    @abstractmethod
    def local_weight(self, name: str) -> Tensor:
        """What this rank keeps of a parameter between steps, as the forward pass uses it; not collective.

        All of its tensor-parallel slice, or under ZeRO 3 and FSDP this rank's partition of it.
        """

    @abstractmethod
    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> Tensor:
        """Accumulate the gradient of (sum of losses over all ranks) / target_count and return that quotient.

        Returns fp64 [] on the device. target_count: a tensor is int64 [] there.
        """

    @abstractmethod
    def step(self, refuse: Refuse = not_finite) -> StepResult:
        """Clip by the global norm and update weights, moments and Adam's step, unless the norm is refused.

        A norm that is not finite must be.
        """

    @abstractmethod
    def measure(self, micro_batches: Iterable[MicroBatch], of: Measure, numbers: int) -> list[float]:
        """The sums over all ranks and batches of what `of` gives of the model and a batch, fp64 [numbers].

        Without dropout; every rank passes as many batches.
        """

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Sum of losses and count of targets over all ranks, as `measure`."""
        loss, count = self.measure(micro_batches, loss_and_count, 2)
        return loss, int(count)

    @abstractmethod
    def gradient(self, name: str) -> Tensor:
        """The accumulated gradient of a trained parameter, fp32 [global shape]; between forward_backward and step."""

    @abstractmethod
    def scalar_state(self) -> dict[str, Any]:
        """JSON-ready: `optimizer_step` (updates made) and `loss_scale` (None unless fp16)."""

    @abstractmethod
    def load_scalar_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def _fragments(self) -> dict[str, Fragment]:
        """This rank's part of the fp32 state, by parameter."""

    @abstractmethod
    def _publish(self) -> None:
        """Copy changed masters to the weights that the forward pass uses."""

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_pieces(self) -> Iterator[Piece]:
        """What this rank writes, as views of it: over all ranks, each element of masters and moments exactly once."""
        if self.replicated_state and self.dp_rank != 0:
            return
        for name, fragment in self._fragments().items():
            part = self.slices[name]
            if fragment.numel == 0 or (part.is_full and self.tp_rank != 0):
                continue
            kinds = self.moments.get(name, ()) if self.updates else ()
            for kind, tensor in fragment.tensors(self.optimizer, kinds).items():
                yield Piece(name, kind, part, fragment.start, tensor.float())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The fp32 weights that steps change and their moments, as this rank's optimizer holds them; not collective.

        By what they are, such as "exp_avg of blocks.0.qkv.weight": under ZeRO a tensor has many parameters, of which
        it is the first.
        """
        first = {fragment.flat: name for name, fragment in reversed(self._fragments().items()) if name in self.moments}
        states = {flat: {"weights": flat.detach(), **self.optimizer.state.get(flat, {})} for flat in first}
        return {
            f"{kind} of {name}": states[flat][kind]
            for flat, name in first.items()
            for kind in ("weights", *MOMENTS)
            if kind in states[flat]
        }

    @torch.no_grad()
    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        """Fill master weights, and moments if optimizer_step > 0, from any layout's, and publish them.

        What a rank's part of the source raises is raised by every rank.
        """
        if self.dp_group is None:  # a process alone, though other ranks may be there
            self._read_pieces(source, optimizer_step)
        else:
            with patient_group() as patient:  # the storage may be slower for one rank than the time-out allows
                together(lambda: self._read_pieces(source, optimizer_step), patient)
        self._publish()

    def _read_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        for name, fragment in self._fragments().items():
            self.pieces_read += 1
            flat, state = fragment.flat, self.optimizer.state
            kinds = self.moments.get(name, ()) if optimizer_step else ()
            if kinds:
                if flat not in state:  # several fragments may lie in one tensor
                    state[flat] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
                state[flat]["step"] = torch.tensor(float(optimizer_step), device=flat.device)
            tensors = fragment.tensors(self.optimizer, kinds) if fragment.numel else {}
            for kind, tensor in tensors.items():
                part, start, numel = self.slices[name], fragment.start, fragment.numel
                if isinstance(source, CheckpointReader):  # which may be of many ranks: each reads its own part
                    tensor.copy_(source.read_range(name, kind, part, start, numel))
                else:
                    tensor.copy_(source.read_slice(name, kind, part).flatten().narrow(0, start, numel))

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Give back what is held beyond the process group, which its creator ends."""


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`values`, all-reduced in place; they lie where the group's backend can see them."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values
