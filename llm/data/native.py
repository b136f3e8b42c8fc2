"""The C++ loader (csrc/): threads assemble the coming steps in a ring of buffers that PyTorch owns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from llm.data.batch import Batch, Loader, Step
from llm.data.samples.sampler import Share
from llm.data.samples.schedule import Curriculum, SchedulePhase
from llm.data.tokens.shards import ShardList
from llm.errors import DamagedFile, InputError

RING_BYTES = 1 << 19  # assembled ahead, within these bounds of steps: little, to stay in the processor's cache
FEWEST_STEPS, MOST_STEPS = 3, 16
THREADS = 2  # that do it; they sleep while the ring is full


def import_native() -> ModuleType:
    """The extension llm.data._native; InputError when it is not built."""
    try:
        from llm.data import _native
    except ImportError as error:
        raise InputError(
            f"the C++ extension llm.data._native cannot be imported ({error}); run make setup, or, where no packing "
            "plan is to be written, set data.loader to numpy"
        ) from error
    return _native


class NativeCorpus:
    """The twin of llm.data.tokens.shards.NumpyCorpus on `_native.Corpus`."""

    def __init__(self, native: ModuleType, shards: ShardList, cache) -> None:
        self._native = native
        self.inner = native.Corpus(
            format=shards.format,
            item_size=getattr(torch, shards.dtype).itemsize,
            paths=shards.paths,
            tokens=shards.tokens,
            vocab_size=shards.vocab_size,
            cache=cache,
            sums=shards.sums.checked() if shards.sums else "",
        )

    def read_rows(self, starts, width: int):
        """Tokens [len(starts), width], row i from starts[i] on. DamagedFile as NumpyCorpus.read."""
        try:
            return self.inner.read_rows(starts, width)
        except self._native.DamagedFile as error:
            raise DamagedFile(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Slot:
    """The memory of one step of any phase, pinned when there is a GPU. What a run does not need is empty."""

    tokens: Tensor
    """uint8: the ids' bytes."""
    sample_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    counted: Tensor

    @classmethod
    def allocate(cls, phases: Sequence[SchedulePhase], share: Share, item_size: int, masks: bool, packed: bool) -> Slot:
        rows = [share.rows(phase) for phase in phases]
        inputs = max(n * phase.seq_len for n, phase in zip(rows, phases, strict=True))
        tokens = max(n * (phase.seq_len + 1) * item_size for n, phase in zip(rows, phases, strict=True))
        sizes = {
            "tokens": (tokens, torch.uint8),
            "sample_ids": (max(rows), torch.int64),
            "position_ids": (inputs if masks else 0, torch.int32),
            "cu_seqlens": (inputs + max(rows) // share.micro_batch if masks else 0, torch.int32),
            "counted": (inputs if packed else 0, torch.uint8),
        }
        pinned = torch.cuda.is_available()
        return cls(**{name: torch.empty(n, dtype=kind, pin_memory=pinned) for name, (n, kind) in sizes.items()})

    def batches(self, phase: SchedulePhase, share: Share, dtype: torch.dtype) -> list[Batch]:
        """Its micro-batches in a phase, with room for any number of documents in cu_seqlens."""
        rows, T, B = share.rows(phase), phase.seq_len, share.micro_batch
        views = {
            "tokens": self.tokens[: rows * (T + 1) * dtype.itemsize].view(dtype).view(-1, B, T + 1),
            "sample_ids": self.sample_ids[:rows].view(-1, B),
        }
        if self.position_ids.numel():
            views["position_ids"] = self.position_ids[: rows * T].view(-1, B, T)
            views["cu_seqlens"] = self.cu_seqlens[: rows // B * (B * T + 1)].view(-1, B * T + 1)
        if self.counted.numel():
            views["counted"] = self.counted[: rows * T].view(-1, B, T)
        return [Batch(**{name: view[i] for name, view in views.items()}) for i in range(rows // B)]


def masked(views: dict[tuple[int, int], Step], slot: int, phase: int, batch: int, documents: int) -> Batch:
    """A micro-batch of a slot in a phase when it has so many documents."""
    view = views[slot, phase].batches[batch]
    assert view.cu_seqlens is not None
    return dataclasses.replace(view, cu_seqlens=view.cu_seqlens[: documents + 1])


class NativeLoader(Loader):
    """Steps assembled ahead by C++ threads; tensors are views of the ring's memory."""

    def __init__(
        self,
        native: ModuleType,
        corpora: Sequence[ShardList],
        curriculum: Curriculum,
        share: Share,
        seed: int,
        consumed: int,
        *,
        packed: bool,
        document_masks: bool,
        skip_damaged: bool,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the tokens, that of the files or int64."""
        super().__init__(curriculum, consumed)
        self._native, self._phases, self._share = native, curriculum.phases, share
        self._dtype, self._masks, self._packed, self._skip = dtype, document_masks, packed, skip_damaged
        cache = native.FileCache()
        opened = []
        for shards in corpora:
            tokens = NativeCorpus(native, shards, cache)
            listed = shards.plans if packed else {}
            plans = {T: native.PackPlan(path, T, shards.n_tokens) for T, path in listed.items()}
            opened.append((tokens.inner, shards.eod_id, shards.eod_first, plans))
        sampler = native.Sampler(
            corpora=opened,
            schedule=native.Schedule(seed=seed, phases=curriculum.phases),
            dp_rank=share.dp_rank,
            dp_size=share.dp_size,
            micro_batch=share.micro_batch,
            packed=packed,
            document_masks=document_masks,
            skip_damaged=skip_damaged,
            widen=dtype == torch.int64,
        )
        allocate = lambda: Slot.allocate(self._phases, share, dtype.itemsize, document_masks, packed)  # noqa: E731
        first = allocate()
        step_bytes = sum(tensor.nbytes for tensor in vars(first).values())
        depth = min(max(RING_BYTES // step_bytes, FEWEST_STEPS), MOST_STEPS)
        self._slots = [first, *(allocate() for _ in range(depth - 1))]
        # Of each slot in each phase. Making tensors takes longer than filling them: those made are kept.
        self._views: dict[tuple[int, int], Step] = {}
        # Not a method, so that a loader that is dropped goes at once.
        self._masked = functools.lru_cache(maxsize=4096)(functools.partial(masked, self._views))
        arrays = [tuple(tensor.numpy() for tensor in vars(slot).values()) for slot in self._slots]
        self._ring = native.Prefetcher(sampler, consumed, arrays, THREADS)

    def _assemble(self) -> tuple[Step, int]:
        try:
            slot, phase, target_count, skipped, replaced_targets, documents = self._ring.next()
        except self._native.DamagedFile as error:
            raise DamagedFile(str(error)) from error
        if (slot, phase) not in self._views:  # without masks the count of targets is the same each time
            batches = self._slots[slot].batches(self._phases[phase], self._share, self._dtype)
            self._views[slot, phase] = Step(batches, target_count)
        step = self._views[slot, phase]
        if self._masks or self._skip:
            batches = [self._masked(slot, phase, i, n) for i, n in enumerate(documents)] or step.batches
            changed = replaced_targets if self._skip and self._packed else None
            step = Step(batches, target_count, skipped if self._skip else None, changed)
        return step, self._phases[phase].global_batch

    def close(self) -> None:
        self._ring.close()
