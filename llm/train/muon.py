"""Muon (Jordan et al. 2024): the matrices of the blocks move along their mean gradient, made orthogonal.

    m = momentum m + (1 - momentum) g                          g: the gradient, clipped
    o = orthogonalised(momentum m + (1 - momentum) g)          Nesterov's look ahead
    w = w - lr decay w - lr 0.2 sqrt(max(rows, columns)) o

With this factor an update is as large as AdamW's (Liu et al. 2025, section 2.2), so that both take the same learning
rates. All other parameters are AdamW's.

A matrix is orthogonalised whole, though a rank may hold only a part of it. m stays where the weights are. In each step
the ranks send their parts of the mean gradient to the one rank that owns the matrix, and get their parts of o back.
Both travel in the precision in which o is computed, so no layout changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm.config import RunConfig
from llm.config.matrices import fused, is_hidden
from llm.model.build import Model
from llm.parallel.collectives import all_gather, all_to_all
from llm.parallel.mesh import Mesh
from llm.slices import Slice, slice_of
from llm.train.engines.base import Fragment
from llm.train.optim import adamw

ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
RMS = 0.2  # of AdamW's updates, by learning rate 1


class Part(NamedTuple):
    """Elements start:start + numel of a flattened slice of a weight."""

    name: str
    slice: Slice
    start: int
    numel: int


Transfers: TypeAlias = list[list[list[Part]]]
"""[from][to]: what a rank sends to another, in this order."""


class Plan(NamedTuple):
    """What ranks send in a step."""

    local: dict[str, Fragment]
    """This rank's parts of the weights."""
    gathered: Transfers
    """To the owners."""
    returned: Transfers
    """From the owners."""
    nothing: Tensor
    """[0], of the dtype and on the device of what is sent."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """U S V^T -> about U V^T, [rows, columns], in the matrix's dtype: by Newton-Schulz iterations of degree 5.

    With these coefficients singular values end between 0.7 and 1.2, but for those below 0.003 of the matrix's 2-norm,
    which grow 485 fold.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


def orthogonalise_(weight: Tensor, sizes: Sequence[int]) -> None:
    """Orthogonalise each of the matrices whose rows, so many of each in turn, make up `weight` [rows, columns]."""
    for matrix in weight.view(-1, sum(sizes), weight.shape[1]).split(list(sizes), dim=1):
        matrix.copy_(orthogonalised(matrix.flatten(0, 1).contiguous()).view_as(matrix))


def shapes_of(weight: tuple[int, ...], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices in a weight of this shape."""
    return [(weight[0] // sum(sizes) * size, weight[1]) for size in sizes]


def factor(weight: tuple[int, ...], sizes: Sequence[int]) -> float:
    """0.2 sqrt(max(rows, columns)), which is the same for all matrices of a weight.

    Under grouped-query attention k and v have fewer rows than q, but q is square and they have as many columns.
    """
    (found,) = {max(shape) for shape in shapes_of(weight, sizes)}
    return RMS * math.sqrt(found)


def cost(weight: tuple[int, ...], sizes: Sequence[int]) -> int:
    """Half the multiplications of an iteration: n^2 (2 m + n) for each matrix n x m, n <= m."""
    return sum(min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes_of(weight, sizes))


def owners(costs: Mapping[str, int], load: list[int]) -> dict[str, int]:
    """Each weight's rank, the most costly first: that with the least of `load` [rank], which grows by the cost."""
    owner = dict[str, int]()
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner[name] = min(range(len(load)), key=load.__getitem__)
        load[owner[name]] += costs[name]
    return owner


def transfers(held: Mapping[str, Mapping[int, Part]], owner: Mapping[str, int], world: int) -> list[Transfers]:
    """To the owners and back; held: by weight, the part of each rank that has one.

    What several ranks hold the nearest of them sends, the owner itself if it can. All get it back.
    """
    gathered, returned = ([[[] for _ in range(world)] for _ in range(world)] for _ in range(2))
    for name, parts in held.items():
        to = owner[name]
        holders: dict[Part, list[int]] = {}
        for rank, part in parts.items():
            holders.setdefault(part, []).append(rank)
            returned[to][rank].append(part)
        for part, ranks in holders.items():
            gathered[min(ranks, key=lambda rank, to=to: abs(rank - to))][to].append(part)
    return [gathered, returned]


class Muon(torch.optim.Optimizer):
    """Muon for the groups that are `hidden`, AdamW for the others, with one state and one list of groups.

    `step` is collective: ranks call it for the same weights in the same order, of which ZeRO 3 may take some at a time.
    It changes nothing where the attribute `found_inf` is 1 (skip_where).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: RunConfig,
        impl: str,
        slices: Mapping[str, Slice],
        fragments: Callable[[], dict[str, Fragment]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """slices: this rank's, of the hidden weights. fragments: its parts of weights, asked for in the first step.

        impl: AdamW's form. group: of all ranks that hold parts; None if this one holds all.
        """
        self.rest = adamw([each for each in groups if not each.get("hidden")], config.optim, impl)
        super().__init__(groups, {"lr": config.optim.lr})
        self.momentum, self.layers, self.slices = config.optim.momentum, fused(config.model), dict(slices)
        self.dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        self.fragments, self.group = fragments, group
        self.rank, self.world = (group.rank(), group.size()) if group is not None else (0, 1)
        self.plans, self.load = dict[tuple[Tensor, ...], Plan](), [0] * self.world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "a closure would need the loss again: call step()"
        self.rest.param_groups = [each for each in self.param_groups if not each.get("hidden")]
        self.rest.state = self.state
        self.rest.found_inf = getattr(self, "found_inf", None)  # pyright: ignore[reportAttributeAccessIssue]
        self.rest.step()
        for each in self.param_groups:
            if each.get("hidden") and each["params"]:
                self._update(each)

    def _update(self, group: dict[str, Any]) -> None:
        """Move the weights of a hidden group."""
        flats: tuple[Tensor, ...] = tuple(group["params"])
        if flats not in self.plans:
            self.plans[flats] = self._plan(flats)
        plan = self.plans[flats]
        skip = getattr(self, "found_inf", torch.zeros((), device=flats[0].device)) > 0
        keep = skip.logical_not()
        for flat in flats:
            if not self.state[flat]:
                self.state[flat]["step"] = torch.zeros((), device=flat.device)
                self.state[flat]["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            state, gradient = self.state[flat], flat.grad
            assert gradient is not None, "a weight without a gradient: call forward_backward first"
            gradient.masked_fill_(skip, 0)  # it may hold NaN, which times 0 is NaN
            state["step"] += keep
            state["exp_avg"].lerp_(gradient, (1 - self.momentum) * keep)
            flat.mul_(torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"]))
        for part, update in self._orthogonalised(plan):
            each, rate = plan.local[part.name], group["lr"] * factor(part.slice.global_shape, self._sizes(part.name))
            each.of(each.flat).add_(update.masked_fill(skip, 0), alpha=-rate)

    def _orthogonalised(self, plan: Plan) -> list[tuple[Part, Tensor]]:
        """This rank's parts of the orthogonal matrices, of which it computes those that it owns."""

        def mean(part: Part) -> Tensor:
            each = plan.local[part.name]
            gradient, momentum = cast("Tensor", each.flat.grad), self.state[each.flat]["exp_avg"]
            return each.of(gradient).lerp(each.of(momentum), self.momentum).to(self.dtype)

        flat: dict[str, dict[Slice, Tensor]] = {}
        for part, data in self._exchange(plan, plan.gathered, mean):
            whole = flat.setdefault(part.name, {}).setdefault(part.slice, data.new_empty(part.slice.numel))
            whole[part.start : part.start + part.numel] = data
        for name, slices in flat.items():
            matrix = plan.nothing.new_empty(self.slices[name].global_shape)
            for cut, data in slices.items():
                cut.take(matrix).copy_(data.view(cut.shape))
            orthogonalise_(matrix, self._sizes(name))
            for cut, data in slices.items():
                data.view(cut.shape).copy_(cut.take(matrix))
        return self._exchange(plan, plan.returned, lambda p: flat[p.name][p.slice].narrow(0, p.start, p.numel))

    def _exchange(self, plan: Plan, transfers: Transfers, data: Callable[[Part], Tensor]) -> list[tuple[Part, Tensor]]:
        """Send each rank its parts, of which `data` gives [numel] in `dtype`, and get those for this one."""
        sent, received = transfers[self.rank], [row[self.rank] for row in transfers]
        if self.group is None:
            return [(part, data(part)) for part in sent[0]]
        flat = torch.cat([plan.nothing, *(data(part) for parts in sent for part in parts)])
        gets, gives = ([sum(part.numel for part in parts) for parts in way] for way in (received, sent))
        parts = [part for parts in received for part in parts]
        pieces = all_to_all(flat, gets, gives, self.group.group_name).split([part.numel for part in parts])
        return list(zip(parts, pieces, strict=True))

    def _plan(self, flats: Sequence[Tensor]) -> Plan:
        """Ask all ranks what they hold of the weights in `flats`."""
        local = {
            name: each
            for name, each in self.fragments().items()
            if name in self.slices and each.numel and any(each.flat is flat for flat in flats)
        }
        rows = torch.zeros(self.world, len(self.slices), 5, dtype=torch.int64, device=flats[0].device)
        for row, (name, cut) in zip(rows[self.rank], self.slices.items(), strict=True):
            if (each := local.get(name)) is not None:
                row.copy_(torch.tensor([cut.dim, cut.start, cut.stop, each.start, each.numel]))
        if self.group is not None:
            rows = all_gather(rows[self.rank], self.world, self.group.group_name)
        held: dict[str, dict[int, Part]] = {}
        for rank, table in enumerate(rows.tolist()):
            for (name, cut), (dim, start, stop, offset, numel) in zip(self.slices.items(), table, strict=True):
                if numel:
                    part = Part(name, Slice(cut.global_shape, dim, start, stop), offset, numel)
                    held.setdefault(name, {})[rank] = part
        owner = owners({n: cost(self.slices[n].global_shape, self._sizes(n)) for n in held}, self.load)
        gathered, returned = transfers(held, owner, self.world)
        return Plan(local, gathered, returned, flats[0].new_empty(0, dtype=self.dtype))

    def _sizes(self, name: str) -> tuple[int, ...]:
        """Rows in turn of each matrix that a weight holds (llm.config.matrices)."""
        return self.layers.get(name.split(".")[-2], (1,))


def optimizer_of(
    config: RunConfig,
    model: Model,
    groups: list[dict[str, Any]],
    weights: Mapping[str, Tensor],
    fragments: Callable[[], dict[str, Fragment]],
    mesh: Mesh | None,
) -> torch.optim.Optimizer:
    """The optimizer of optim.name over the groups of `parameter_groups`.

    weights: what it updates, by the parameter's name. fragments: as Muon takes them.
    """
    if config.optim.name == "adamw":
        return adamw(groups, config.optim, model.forms.adamw)
    slices = {name: slice_of(parameter) for name, parameter in model.named_parameters() if is_hidden(name)}
    hidden = [weights[name] for name in slices]
    known = {id(weight) for weight in hidden}
    rest = [each | {"params": [p for p in each["params"] if id(p) not in known]} for each in groups]
    groups = [{"params": hidden, "weight_decay": config.optim.weight_decay, "hidden": True}, *rest]
    group = dist.group.WORLD if mesh is not None and mesh.world_size > 1 else None
    return Muon([each for each in groups if each["params"]], config, model.forms.adamw, slices, fragments, group)
