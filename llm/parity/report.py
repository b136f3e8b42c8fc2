"""Reports a comparison: a table by groups of parameters, and all numbers as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from llm.config import ModelConfig, RunConfig
from llm.parity.compare import SCALARS, Check, worst

GROUPS = ("embedding", "position table", "norms", "qkv", "attention output", "up", "down", "input", "recurrent", "head")
# A fault of this code itself is on both sides, and is for the tests to find.
ORACLE = "train.engine=plain in one process, of the same code"
# Lines of failures on the console.
SHOWN = 20
TENSORS = ("gradient", "weight", "exp_avg", "exp_avg_sq")


def group_of(name: str) -> str:
    """The row of the table that a parameter belongs to: `blocks.0.norm_1.weight` -> `norms`."""
    owner = name.split(".")[-2].replace("_", " ")
    return "norms" if owner.startswith("norm") else owner


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison. On ranks other than 0 there are no checks."""

    config: RunConfig
    """Of what was verified: a shrunk model, where `requested` is given."""
    world_size: int
    steps: int
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    """What is wrong beyond numbers: parameters, elements or replicas, by name."""
    passed: bool
    requested: ModelConfig | None = None
    """The model of the config, if it was too large for one process."""

    @property
    def failures(self) -> list[str]:
        """A line for each problem, and for the worst failed check of each quantity of each parameter."""
        failed: dict[tuple[str, str], list[Check]] = {}
        for check in self.checks:
            if not check.passed:
                failed.setdefault((check.name, check.quantity), []).append(check)
        return [*self.problems, *(str(worst(checks)) for checks in failed.values())]

    def layout(self) -> dict[str, Any]:
        """What was verified, in the config's words."""
        train, parallel = self.config.train, self.config.parallel
        dp = self.world_size // parallel.tensor_parallel
        return {
            "engine": train.engine,
            "zero_stage": parallel.zero_stage,
            "offload": parallel.offload,
            "tensor_parallel": parallel.tensor_parallel,
            "sequence_parallel": parallel.sequence_parallel,
            "data_parallel": dp,
            "precision": train.precision,
            "fp8": train.fp8,
            "gradient_accumulation": train.global_batch_size // (dp * train.micro_batch_size),
            "activation_checkpointing": train.activation_checkpointing,
            "compile": train.compile,
        }

    def of(self, quantity: str, group: str | None = None) -> list[Check]:
        """The checks of a quantity, of one group of parameters or of all."""
        return [c for c in self.checks if c.quantity == quantity and (group is None or group_of(c.name) == group)]


def table(report: Report) -> Table:
    """One row per group of parameters, then one per scalar and one for the replicas.

    A cell is the error nearest to its bound over all steps: relative to what was expected, and as a share of its bound.
    """
    result = Table(caption="largest error relative to the oracle's value (as a share of its bound)")
    for column in ("", *TENSORS, "worst", ""):
        result.add_column(column)
    for group in GROUPS:
        by_quantity = [report.of(quantity, group) for quantity in TENSORS]
        checks = [check for checks in by_quantity for check in checks]
        if (most := worst(checks)) is not None:
            result.add_row(group, *map(_cell, by_quantity), f"{most.name} {most.quantity}", _verdict(checks))
    for quantity in SCALARS:
        checks = report.of(quantity)
        result.add_row(quantity, _cell(checks), "", "", "", "", _verdict(checks))
    problems = len(report.problems)
    found = f"{problems} problems" if problems else ""
    result.add_row("names, pieces, replicas", found, "", "", "", "", "fail" if problems else "pass")
    return result


def _cell(checks: Sequence[Check]) -> str:
    most = worst(checks)
    return "" if most is None else f"{most.relative:.1e} ({most.share:.2g})"


def _verdict(checks: Sequence[Check]) -> str:
    return "pass" if checks and all(check.passed for check in checks) else "fail"


def to_json(report: Report) -> dict[str, Any]:
    """The report for `llm.files.write_json`."""
    names = dict.fromkeys(check.name for check in report.checks if check.name)
    parameters = {name: {q: _numbers([c for c in report.of(q) if c.name == name]) for q in TENSORS} for name in names}
    groups = {group: {q: _numbers(report.of(q, group)) for q in TENSORS} for group in GROUPS}
    return {
        "passed": report.passed,
        "compared_with": ORACLE,
        "layout": report.layout(),
        "steps": report.steps,
        "model": dataclasses.asdict(report.config.model),
        "requested_model": None if report.requested is None else dataclasses.asdict(report.requested),
        "scalars": {quantity: _numbers(report.of(quantity)) for quantity in SCALARS},
        "groups": {group: found for group, found in groups.items() if any(found.values())},
        "parameters": parameters,
        "problems": list(report.problems),
        "failures": report.failures,
    }


def _numbers(checks: Sequence[Check]) -> dict[str, Any] | None:
    """The check nearest to its bound, or None where nothing was compared."""
    if (most := worst(checks)) is None:
        return None
    return {
        **({"parameter": most.name} if most.name else {}), "step": most.step, "error": most.error,
        "bound": most.bound, "expected": most.size, "relative": most.relative, "share": most.share,
        "passed": all(check.passed for check in checks),
    }  # fmt: skip


def show(report: Report, terminal: Console) -> None:
    """Print the report for people: the layout, how the model was shrunk, the table, failures, last the verdict."""
    lines = ["verify: " + ", ".join(f"{key} {value}" for key, value in report.layout().items())]
    lines.append(f"compared with {ORACLE}: a fault that both share does not show")
    if report.requested is not None:
        before, after = (dataclasses.asdict(model) for model in (report.requested, report.config.model))
        changed = (f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key])
        lines.append("the model is too large for one process; a shrunk one was verified: " + ", ".join(changed))
    terminal.print("\n".join(lines), markup=False, highlight=False)
    terminal.print(table(report))
    failures = report.failures
    for failure in failures[:SHOWN]:
        terminal.print(f"  {failure}", markup=False, highlight=False)
    if len(failures) > SHOWN:
        terminal.print(f"  and {len(failures) - SHOWN} more failures: see the JSON")
    terminal.print("PASS" if report.passed else "FAIL")
