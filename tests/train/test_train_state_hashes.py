"""Checksums of tensors that only steps may change: what each comparison finds, without an engine."""

from __future__ import annotations

from typing import Any

import torch

from llm.train.state_hashes import StateHashes


class Held:
    """An engine's tensors, and how often they were asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked, self.tensors = 0, {f"weights of {name}": torch.ones(3) for name in "ab"}

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        self.asked += 1
        return dict(self.tensors)


def watched() -> tuple[Held, StateHashes]:
    """After a step whose state is to be compared."""
    held: Any = Held()
    hashes = StateHashes(held)
    hashes.after_step(due=True)
    return held, hashes


def test_what_changed_is_named_until_it_is_forgotten() -> None:
    for name in "ab":
        held, hashes = watched()
        hashes.compare()
        assert hashes.found() == []
        held.tensors[f"weights of {name}"][1] += 1
        hashes.compare()
        for _ in range(2):  # later comparisons find no more, and what was found stays
            hashes.after_step(due=True)
            hashes.compare()
            assert hashes.found() == [f"weights of {name}"]
        hashes.forget()
        assert hashes.found() == []


def test_a_state_that_is_read_from_a_checkpoint_is_no_change() -> None:
    held, hashes = watched()
    held.tensors["weights of a"].zero_()
    hashes.forget()
    hashes.compare()
    assert hashes.found() == []


def test_a_step_that_is_not_due_costs_nothing_and_may_change_all() -> None:
    held, hashes = watched()
    for tensor in held.tensors.values():
        tensor.zero_()
    hashes.after_step(due=False)
    hashes.compare()
    assert hashes.found() == [] and held.asked == 1


def test_tensors_that_a_step_adds_or_replaces_are_watched() -> None:
    """The first step adds moments, and some optimizers hold other tensors after a step than before."""
    held, hashes = watched()
    held.tensors |= {"exp_avg of a": torch.ones(3), "weights of a": torch.zeros(3)}
    hashes.after_step(due=True)
    hashes.compare()
    assert hashes.found() == []
    held.tensors["exp_avg of a"][0] += 1
    held.tensors["weights of a"][0] += 1
    hashes.compare()
    assert hashes.found() == ["weights of a", "exp_avg of a"]
