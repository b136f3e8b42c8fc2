"""The learning rate of each step, a pure function of the config."""

from __future__ import annotations

import math

from llm.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Rises linearly, reaching `lr` with update `warmup_steps - 1`. Then `cosine` falls along half a
    cosine (Loshchilov & Hutter 2017), and `wsd` stays at `lr` and falls linearly over the last
    `decay_fraction` of the run (Hu et al. 2024); both reach `min_lr` with the last update and stay
    there. A warm-up longer than the run is cut off by its end.
    """
    done = step + 1  # updates, this one included
    if done <= config.warmup_steps:
        return config.lr * done / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, max_steps - round(config.decay_fraction * max_steps))
    progress = (done - start) / max(1, max_steps - start)
    if progress <= 0:
        return config.lr
    if progress >= 1:
        return config.min_lr
    share = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
