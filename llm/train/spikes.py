"""Tells, on every rank alike, of a step that must not change the weights: not finite, or a spike.

A step is bad if its loss or its gradient norm is not finite, or lies more than `train.spike_sigmas` standard deviations
above the mean of the last `train.spike_window` good steps of the phase (before there are as many, none is a spike).
A bad step is left out. When `train.spike_patience` of them follow one another, all later ones are left out too, until
the training loop has read the results: it goes back to the last checkpoint and passes over the samples in between, as
PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1). Bad steps that go on after that are left out as well,
up to `train.spike_window` of them. Then the numbers are taken for what they are now, and a new window begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llm.config import TrainConfig
from llm.parallel.agreement import backend_device

# Of the mean: numbers that hardly vary, such as those of a text learnt by heart, have no spikes below it.
LEAST_DEVIATION = 1e-3


class Spikes:
    """The losses and gradient norms of the last good steps. Nothing here waits for the device but `state`."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        saved: Sequence[Sequence[float]] = ((), ()),
        in_a_row: int = 0,
        patience: int | None = None,
    ) -> None:
        """saved: what `state` gave, oldest first; in_a_row: bad steps since the last good one.

        patience: how many are too many; None: as the config has it.
        """
        self.sigmas, self.size, self.device = config.spike_sigmas, config.spike_window, device
        self.usual_patience, self.fp16 = config.spike_patience, config.precision == "fp16"
        self.patience = torch.full((), patience or config.spike_patience, device=device)
        self.in_a_row = torch.full((), in_a_row, device=device)
        """Both int64 []."""
        self.recent = torch.zeros(2, self.size, dtype=torch.float64, device=device)
        """Losses and norms [2, size]; good step number n of the phase is in column n % size."""
        kept = torch.tensor(saved, dtype=torch.float64)[:, -self.size :]
        self.recent[:, : kept.shape[1]] = kept.to(device)
        self.good = torch.full((), kept.shape[1], device=device)
        """Good steps of the phase, int64 []."""

    def forget(self) -> None:
        """Begin the window anew: the data or the batch are others from here on."""
        self.good.zero_()

    def resume(self, patience: int) -> None:
        """Go on after too many bad steps, and suffer `patience` more if they follow at once."""
        self.in_a_row.zero_()
        self.patience.fill_(patience)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is bad, bool [] on the device, the same on every rank; a good one joins the window.

        loss: fp64 []; norm: [], of all gradients, before clipping. Collective.
        """
        found = torch.stack([loss.double(), norm.to(loss.device).double()])
        mean, deviation = self.recent.mean(1), self.recent.std(1)
        bound = mean + self.sigmas * torch.maximum(deviation, LEAST_DEVIATION * mean.abs())
        watched = (self.good >= self.size) & (self.sigmas > 0)
        over = self.in_a_row >= self.patience
        bad = over | found.isfinite().all().logical_not() | watched & (found > bound).any()
        if dist.is_initialized() and dist.get_world_size() > 1:  # else rounding could divide them
            vote = bad.to(backend_device(), torch.int32)
            dist.all_reduce(vote, dist.ReduceOp.MAX)
            bad = vote.to(self.device) > 0
        column = (torch.arange(self.size, device=self.device) == self.good % self.size) & bad.logical_not()
        self.recent = torch.where(column, found[:, None], self.recent)
        self.good += bad.logical_not()
        # A norm that overflows in fp16 is the loss scale's to mend, however often.
        counts = bad & (found[0].isfinite().logical_not() | found[1].isfinite()) if self.fp16 else bad
        self.in_a_row = torch.where(over, self.in_a_row, torch.where(bad, self.in_a_row + counts, 0))
        self.patience = torch.where(bad, self.patience, self.usual_patience)
        return bad

    def usual(self) -> str:
        """The means of the window, for people; "" where it is empty. Waits for the device."""
        means = torch.tensor(self.state()).double().mean(1).tolist()
        return f" (of late {means[0]:.4g} and {means[1]:.4g})" if self.good > 0 else ""

    def state(self) -> list[list[float]]:
        """The window, oldest first, JSON-ready: losses and norms. Waits for the device."""
        good = int(self.good)
        if good < self.size:
            return self.recent[:, :good].tolist()
        return self.recent.roll(-(good % self.size), 1).tolist()
