"""A guard against replicas that drift apart in silence: a failing GPU, a flipped bit, a nondeterministic kernel.

These ranks hold the same bits of a parameter, depending on whether TP splits it and how the engine spreads it:

                                replicated over DP (ZeRO 0-2)      partitioned over DP (ZeRO 3, FSDP)
    replicated over TP          all ranks                          those of one data-parallel rank
    split over TP               those of one tensor-parallel rank  none

Bits are compared, not values: NaN equals the same NaN, 0.0 differs from -0.0. The weights of the forward pass are
compared. Partitioned state, such as fp32 masters and moments under ZeRO, has no replica to be compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm.checkpoint.writer import last_good
from llm.parallel.agreement import backend_device
from llm.parallel.mesh import Mesh
from llm.train.engines.base import Engine


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as int64 words, modulo 2^64: int64 [] on its device.

    Any one flipped bit changes it, and so does any change within one word. Two changes are missed if they cancel: with
    probability 2^-64 if they are random, always if two words are exchanged.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # words begin at multiples of 8 bytes
    words, rest = data.split([len(data) // 8 * 8, len(data) % 8])
    total = words.view(torch.int64).sum()
    if len(rest):
        total = total + F.pad(rest, (0, 8 - len(rest))).view(torch.int64).squeeze(0)
    return total


class Finding(NamedTuple):
    """A parameter whose replicas differ: the ranks that hold its most common bits, and the others."""

    name: str
    right: list[int]
    wrong: list[int]

    def __str__(self) -> str:
        return f"{self.name} differs: ranks {self.wrong} from ranks {self.right}"


def odd_ranks(findings: Sequence[Finding]) -> set[int]:
    """The ranks that are proven wrong: they differ from more than half of the replicas, which agree."""
    return {rank for each in findings if len(each.right) > len(each.wrong) for rank in each.wrong}


def compare_replicas(engine: Engine, mesh: Mesh) -> list[Finding]:
    """What is found of each parameter whose replicas differ, the same on every rank. Collective.

    The majority is right; of equally many, those of the lowest rank.
    """
    grid = mesh.devices.mesh[0, :, 0, :]  # ranks [dp, tp]
    split = {name: getattr(p, "tensor_model_parallel", False) for name, p in engine.parameters.items()}
    groups_of = {name: equal_ranks(grid, each, engine.replicated) for name, each in split.items()}
    expected = {name: groups for name, groups in groups_of.items() if groups}
    if not expected:
        return []
    device = backend_device()
    local = torch.stack([checksum(engine.local_weight(name)).to(device) for name in expected])
    gathered = [torch.empty_like(local) for _ in range(mesh.world_size)]
    dist.all_gather(gathered, local)
    sums = torch.stack(gathered).t().tolist()  # [parameter][rank]
    return [
        Finding(name, right, wrong)
        for (name, groups), by_rank in zip(expected.items(), sums, strict=True)
        for ranks in groups
        for right, wrong in [majority(ranks, by_rank)]
        if wrong
    ]


def equal_ranks(grid: Tensor, split: bool, replicated: bool) -> list[list[int]]:
    """The groups of two ranks or more that hold the same bits of a parameter; grid: ranks [dp, tp]."""
    groups = {
        (False, True): grid.reshape(1, -1),
        (False, False): grid,
        (True, True): grid.t(),
        (True, False): grid.reshape(-1, 1),
    }[split, replicated]
    return groups.tolist() if groups.shape[1] > 1 else []


def majority(ranks: list[int], sums: list[int]) -> tuple[list[int], list[int]]:
    """The ranks that have the most common sum, and the others; sums: by rank."""
    (reference, _), *_ = Counter(sums[rank] for rank in ranks).most_common()
    return [r for r in ranks if sums[r] == reference], [r for r in ranks if sums[r] != reference]


def diverged(step: int, found: str, root: Path) -> FloatingPointError:
    """What a run that stops says of a number that is not finite; root: of its checkpoints."""
    advice = "lower optim.lr or optim.grad_clip, or look at the data, and start again"
    return FloatingPointError(f"step {step}: {found}; {last_good(root, step)}: {advice}")


def replica_message(step: int, findings: Sequence[Finding], root: Path) -> str:
    """What a run that stops says: the first finding, which checkpoint under `root` is good, and what to do."""
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return (
        f"step {step}: weights that ranks should share are no longer equal: {findings[0]}{more}; "
        f"{last_good(root, step)}: start again, and if it comes back on the same rank suspect its GPU or memory, "
        "if on others a kernel that is not deterministic (train.guard_action=warn goes on)"
    )
