"""Draws the next token from a model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.errors import require

FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Penalties and no_repeat_ngram come first, then temperature, top_k, top_p and min_p."""

    repetition_penalty: float = 1.0
    """Above 1: tokens seen before become less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens; null: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability (Holtzman et al. 2020, nucleus)."""
    seed: int = 1234
    """Of the generator."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the tokens that have been drawn."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it has been drawn."""
    no_repeat_ngram: int | None = None
    """No such number of tokens in a row comes twice, the prompt's among them (Paulus et al. 2017, section 2.5)."""

    def __post_init__(self) -> None:
        penalty, temperature = self.repetition_penalty, self.temperature
        require(0 < penalty < float("inf"), f"repetition_penalty is {penalty}; expected above 0 (1: none)")
        expected = "expected at least 0 (0: the likeliest token)"
        require(0 <= temperature < float("inf"), f"temperature is {temperature}; {expected}")
        require(self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}; expected at least 1, or null for all")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1: all)")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; expected 0 <= min_p <= 1 (0: all)")
        for name in ("presence_penalty", "frequency_penalty"):
            found = getattr(self, name)
            require(-100 <= found <= 100, f"{name} is {found}; expected -100 to 100 (0: none)")
        n = self.no_repeat_ngram
        require(n is None or n >= 1, f"no_repeat_ngram is {n}; expected at least 1, or null for none")
        require(-(2**63) <= self.seed < 2**64, f"seed is {self.seed}; expected a number of 64 bits")


def sample(
    logits: Tensor,
    config: SamplingConfig,
    *,
    history: Tensor | None = None,
    begins: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row, int64 [B], from `logits`, fp32 [B, V]: -inf where a token cannot be.

    `history`, int64 [B, S], has the tokens so far, for the penalties and no_repeat_ngram; those of a row from `begins`
    on, int64 [B, 1], have been drawn (None: all). `generator` is on the device of `logits`.
    """
    logits = logits.float()
    if history is not None:
        logits = discourage(logits, config, history, begins)
    if config.temperature < FP32.tiny:
        return logits.argmax(-1)
    # The largest becomes 0, which no temperature turns into inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / min(config.temperature, FP32.max)
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = keep_min_p(logits, config.min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def discourage(logits: Tensor, config: SamplingConfig, history: Tensor, begins: Tensor | None) -> Tensor:
    """The logits [B, V] after what depends on the tokens so far; the arguments are those of `sample`."""
    if config.repetition_penalty != 1:
        logits = penalise(logits, history, config.repetition_penalty)
    if config.presence_penalty or config.frequency_penalty:
        positions = torch.arange(history.shape[1], device=history.device)
        drawn = torch.ones_like(history, dtype=torch.bool) if begins is None else positions >= begins
        counts = torch.zeros_like(logits).scatter_add(-1, history, drawn.to(logits.dtype))
        logits = logits - counts.sign() * config.presence_penalty - counts * config.frequency_penalty
    if config.no_repeat_ngram is not None and config.no_repeat_ngram <= history.shape[1]:
        logits = ban_repeats(logits, history, config.no_repeat_ngram)
    return logits


def ban_repeats(logits: Tensor, history: Tensor, n: int) -> Tensor:
    """-inf for the ids that would end n tokens in a row that are in history [B, S] already; S is at least n.

    Nothing is banned of a row that would have no token left.
    """
    runs = history.unfold(1, n, 1)  # [B, S - n + 1, n]
    last = history[:, history.shape[1] - n + 1 :]
    rows, starts = (runs[:, :, :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
    banned = logits.clone()
    banned[rows, runs[rows, starts, -1]] = -torch.inf
    return torch.where((banned == -torch.inf).all(-1, keepdim=True), logits, banned)


def penalise(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits [B, V] of the ids in history [B, S].

    The paper divides all of them, which would make a negative logit likelier.
    """
    seen, penalty = logits.gather(-1, history), min(max(penalty, FP32.tiny), FP32.max)
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.scatter(-1, history, penalised.clamp(FP32.min, FP32.max))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest of each row; of equal ones, those that `topk` returns."""
    values, ids = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the smallest set of likeliest tokens whose probability is at least p."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
    kept = before < p
    kept[..., 0] = True  # rounding must not leave a row empty
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values.masked_fill(~kept, -torch.inf))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all tokens less likely than p times the likeliest of their row."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)
