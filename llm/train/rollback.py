"""Takes a run back to its last checkpoint when steps are bad one after the other, and on behind their samples."""

from __future__ import annotations

from typing import Any, NamedTuple

from llm.checkpoint.reader import open_agreed
from llm.config.phases import consumed_samples
from llm.parallel.agreement import together
from llm.train.start import Run


class Setbacks(NamedTuple):
    """What went wrong in a run; checkpoints keep it in state.json."""

    in_a_row: int = 0
    """Bad steps since the last good one, or since the run went back."""
    patience: int | None = None
    """How many are too many, if the run went back and no step was good since; None: train.spike_patience."""
    passed_samples: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of samples that no weight has learnt from, since the run went back: in rising order."""
    recent: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Losses and gradient norms of the last good steps (Spikes)."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> Setbacks:
        """What a state.json says of them: nothing in one of version 0.1.0."""
        saved = state.get("setbacks", {})
        return cls(**saved | {"passed_samples": tuple(tuple(each) for each in saved.get("passed_samples", ()))})


def roll_back(run: Run, step: int, skipped_locally: int | None) -> int | None:
    """Give the engine the weights and moments of the newest checkpoint, and the feed the samples after `step`.

    The run goes on as after `step` steps. So a step has its own samples and its own learning rate whatever came
    before, and the steps after the checkpoint up to `step` are left out. Returns the step of the checkpoint, None where
    there is none: then nothing has changed. skipped_locally: that of the feed after `step`. Collective.
    """
    checkpoint, _ = open_agreed(run.folder.checkpoints)
    if checkpoint is None:
        return None
    mesh, phases, steps = run.mesh, run.config.phases, run.config.train.max_steps - step
    ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size, "widen": run.device.type == "cpu"}
    loader = together(lambda: run.source.loader(**ranks, consumed=consumed_samples(phases, step)))
    run.feed.restart(loader, steps, skipped_locally)
    run.engine.load_scalar_state(checkpoint.state["engine"])
    run.engine.load_pieces(checkpoint, checkpoint.state["engine"]["optimizer_step"])
    run.step = step
    return checkpoint.state["step"]
