"""How many tokens a model is trained on, beside how many are compute-optimal for it."""

from __future__ import annotations

from llm.config import ModelConfig, RunConfig
from llm.config.phases import consumed_tokens
from llm.plan.flops import flops_of_steps
from llm.plan.memory import parameters

# Per parameter, about (Hoffmann et al. 2022, Training Compute-Optimal Large Language Models).
OPTIMAL_TOKENS = 20
# So many times more, or fewer, are far off. By their fit, L = E + A / N^0.34 + B / D^0.28, another size of model would
# end about 6 % closer to E for the same compute.
FAR = 10
# FLOPs of a run that is no more than a trial: under an hour on one GPU.
TRIAL = 1e18


def optimal_tokens(model: ModelConfig) -> int:
    """Compute-optimal for the size of this model."""
    return OPTIMAL_TOKENS * parameters(model)


def tokens_per_parameter(config: RunConfig) -> float:
    return consumed_tokens(config.phases, config.train.max_steps) / parameters(config.model)


def far_off(config: RunConfig) -> str | None:
    """What to say of a run whose tokens are far from compute-optimal; None where they are not.

    Nor of a trial, or of a run that begins with weights. Too few are a warning. Too many are none: models that are much
    used are trained so on purpose.
    """
    ratio = tokens_per_parameter(config)
    found = f"the run trains on {ratio:,.3g} tokens per parameter; about {OPTIMAL_TOKENS} are compute-optimal"
    if config.train.init_from is not None or flops_of_steps(config, 0, config.train.max_steps) < TRIAL:
        return None
    if ratio < OPTIMAL_TOKENS / FAR:
        return f"warning: {found}: a smaller model, or more train.max_steps, would use its compute better"
    if ratio > OPTIMAL_TOKENS * FAR:
        return f"note: {found}: a larger model would reach this loss with less compute, but costs more in use"
    return None
