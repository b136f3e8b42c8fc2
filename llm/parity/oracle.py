"""The oracle: the plain PyTorch engine on rank 0, without parallelism, and the comparison with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llm.config import ParallelConfig, RunConfig
from llm.parity.batches import micro_batches, target_count
from llm.parity.compare import (
    LOW_PRECISION,
    ORTHOGONALISED,
    Check,
    Scalar,
    distance,
    gradient_check,
    norm_check,
    scalar_checks,
    size,
    state_check,
)
from llm.parity.layout import Gathered, State, StepRecord
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine
from llm.train.engines.shared import global_norm


def oracle_config(config: RunConfig, *, exact: bool) -> RunConfig:
    """The same run for one process, without recomputation; exact: in fp32."""
    train = replace(config.train, engine="plain", activation_checkpointing="none", checkpoint_every=1)
    if exact:
        train = replace(train, precision="fp32", fp8="none")
    return replace(config, train=train, parallel=ParallelConfig(), deepspeed={})


class Oracle:
    """Makes the layout's steps on rank 0's device and collects the checks."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.precision = config.train.precision if config.train.fp8 == "none" else "fp8"
        self.own = self._engine(exact=False)
        self.exact = self.own if self.precision == "fp32" else self._engine(exact=True)
        self.engines = (self.own,) if self.own is self.exact else (self.own, self.exact)
        self.checks: list[Check] = []
        self.scalars: list[Scalar] = []

    def _engine(self, *, exact: bool) -> PlainEngine:
        config = oracle_config(self.config, exact=exact)
        engine = PlainEngine(config, build_model(config, None), None, self.device)
        engine.set_lr(config.optim.lr)
        return engine

    def check_start(self, state: State) -> None:
        """The layout's weights before the first step are the initial ones, bit for bit."""
        self._check_state(0, state, self.exact, same=True)

    def check_step(self, record: StepRecord) -> None:
        """Compare gradients at equal weights, then weights and moments after equal gradients."""
        self._load(record.before, record.scalars_before)
        batches, count = micro_batches(self.config, record.number, self.device), target_count(self.config)
        losses = [float(engine.forward_backward(batches, count)) for engine in self.engines]
        if not record.skipped:  # what overflowed cannot be compared
            self._check_gradients(record, losses)
        self.exact.optimizer.zero_grad()
        for engine in self.engines if self.config.optim.name == "muon" else (self.own,):
            for name, gradient in record.gradients.items():
                engine.masters[name].grad = gradient.clone()  # which the step clips
            engine.step()
        more = self._orthogonalised(record.before)
        self._check_state(record.number, record.after, self.own, same=record.skipped, more=more)

    def check_validation(self, number: int, state: State, found: float) -> None:
        """Compare the validation loss at the layout's weights."""
        self._load(state, {"optimizer_step": 0, "loss_scale": None})
        batches = micro_batches(self.config, number, self.device)
        totals = [engine.evaluate(batches) for engine in self.engines]
        own, exact = (total / count for total, count in (totals[0], totals[-1]))
        self.scalars.append(Scalar("validation loss", number, found, own, exact))

    def verdicts(self) -> list[Check]:
        """Every check, after the last step."""
        return self.checks + scalar_checks(self.scalars, self.precision, target_count(self.config))

    def _load(self, state: State, scalars: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.load_scalar_state(scalars)
            engine.load_pieces(Gathered(state), scalars["optimizer_step"])

    def _check_gradients(self, record: StepRecord, losses: list[float]) -> None:
        number, names, fp8 = record.number, record.gradients, self.precision == "fp8"
        all_gradients = math.hypot(*(size(self.exact.gradient(name)) for name in names))
        for name, gradient in record.gradients.items():
            own, exact = self.own.gradient(name), self.exact.gradient(name)
            self.checks.append(gradient_check(name, number, gradient, own, exact, all_gradients, fp8=fp8))
        self.checks.append(norm_check(number, record.grad_norm, record.gradients.values()))
        norms = [float(global_norm(list(engine.masters.values()), None)) for engine in self.engines]
        self.scalars.append(Scalar("loss", number, record.loss, losses[0], losses[-1]))
        self.scalars.append(Scalar("gradient norm", number, record.grad_norm, norms[0], norms[-1]))

    def _orthogonalised(self, before: State) -> dict[str, float]:
        """By how much more Muon's matrices may differ after the step that was just made."""
        more = {}
        for name in (name for name, kinds in self.own.moments.items() if len(kinds) == 1):
            weight, exact = self.own.masters[name].detach(), self.exact.masters[name].detach()
            if self.config.train.precision == "fp32":
                more[name] = ORTHOGONALISED * distance(weight, before[name, "master"].to(weight.device))
            else:
                more[name] = LOW_PRECISION * distance(weight, exact)
        return more

    def _check_state(
        self, number: int, state: State, expected: PlainEngine, *, same: bool, more: Mapping[str, float] | None = None
    ) -> None:
        """`same`: no bit may differ. more: of a weight's bound, by name."""
        for piece in expected.state_pieces():
            found = state.get((piece.name, piece.kind))
            if found is not None:  # else the layout has a problem of its own
                tensor = piece.data.cpu().view(piece.slice.global_shape)
                unchanged = same or piece.name not in expected.trained
                extra = (more or {}).get(piece.name, 0.0) if piece.kind == "master" else 0.0
                self.checks.append(
                    state_check(piece.kind, piece.name, number, found, tensor, same=unchanged, more=extra)
                )
