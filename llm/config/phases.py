"""The phases of a run: sequence length, batch size and blend may change after a number of consumed samples.

A phase begins exactly at its number of samples, which must be whole steps of the phase before. So the samples of a
phase never depend on how a run was split, and the number of steps follows from that of samples and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm.config.sections import DataConfig
from llm.errors import require


@dataclass(frozen=True)
class Phase:
    """A part of the run in which nothing changes."""

    first_sample: int
    first_step: int
    seq_len: int
    global_batch_size: int
    blend: dict[str, float] | None


def phases_of(data: DataConfig, global_batch_size: int) -> tuple[Phase, ...]:
    """The phases of a run, in order, the first from sample 0; InputError if out of order, or one begins in a step."""
    found = [Phase(0, 0, data.seq_len, global_batch_size, data.blend)]
    for change in data.phases:
        last = found[-1]
        length = change.samples - last.first_sample
        require(
            length > 0,
            f"data.phases: a phase begins at {change.samples} samples, the one before it at {last.first_sample}; "
            "expected rising numbers",
        )
        batch = last.global_batch_size
        require(
            length % batch == 0,
            f"data.phases: a phase begins at {change.samples} samples, within a step of {batch}; "
            f"use {last.first_sample + max(1, round(length / batch)) * batch}",
        )
        step, seq_len = last.first_step + length // batch, change.seq_len or last.seq_len
        blend = change.blend or last.blend
        found.append(Phase(change.samples, step, seq_len, change.global_batch_size or batch, blend))
    return tuple(found)


def consumed_samples(phases: tuple[Phase, ...], step: int) -> int:
    """Samples that `step` steps have taken."""
    return sum(steps * phase.global_batch_size for phase, steps in steps_by_phase(phases, 0, step))


def consumed_tokens(phases: tuple[Phase, ...], step: int) -> int:
    """Target positions that `step` steps have taken."""
    return sum(steps * phase.global_batch_size * phase.seq_len for phase, steps in steps_by_phase(phases, 0, step))


def steps_by_phase(phases: Sequence[Phase], first: int, last: int) -> Iterator[tuple[Phase, int]]:
    """Each phase, and how many of the steps after step `first`, up to step `last`, it has."""
    for phase, end in zip(phases, [*(later.first_step for later in phases[1:]), last], strict=True):
        yield phase, max(0, min(end, last) - max(first, phase.first_step))
