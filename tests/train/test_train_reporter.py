"""What a run reports of its waits for other ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from chosen import slow_but
from llm.config import RunConfig
from llm.train.engines.deepspeed import DeepSpeedEngine
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from test_train_loop import config, steps, trained

LATE_SECONDS, VALIDATION_SECONDS = 0.3, 1.5
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": dict(train=dict(engine="plain", eval_interval=2)),
    "tp": dict(train=dict(eval_interval=2), parallel=dict(tensor_parallel=2)),
    "tp, sequence parallel": dict(
        train=dict(eval_interval=2), parallel=dict(tensor_parallel=2, sequence_parallel=True)
    ),
}


def with_a_late_rank(config: RunConfig, root: Path) -> None:
    """Train where rank 1 comes late to each step, and later to validations. Collective."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (PlainEngine, DeepSpeedEngine):
            for name, seconds in (("forward_backward", LATE_SECONDS), ("evaluate", VALIDATION_SECONDS)):
                healthy = getattr(kind, name)

                def late(*arguments: Any, healthy: Any = healthy, seconds: float = seconds) -> Any:
                    time.sleep(seconds * dist.get_rank())
                    return healthy(*arguments)

                patch.setattr(kind, name, late)
        trained(config, root)


@pytest.mark.parametrize("name", slow_but(["dp"], LAYOUTS))
def test_waits_in_collectives_are_of_steps_and_by_group(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(with_a_late_rank, config(**LAYOUTS[name]), tmp_path)
    group = name.partition(",")[0]
    lines = steps(tmp_path)
    assert all(line["exposed_collective_seconds"].keys() == {group} for line in lines)
    # A validation is no part of a step, nor is the wait for it.
    assert all(0 <= line["exposed_collective_seconds"][group] <= line["step_seconds"] for line in lines)
    # Rank 0 waits for the late one, unless the machine lets it come late itself.
    assert max(line["exposed_collective_seconds"][group] for line in lines) > LATE_SECONDS / 2
