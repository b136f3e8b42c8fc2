"""Answers of unequal lengths, spread over ranks and micro-batches by any layout, are learnt as by one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_cases import chat_config, metric, sums, turn, write

from chosen import slow_but
from llm.config import RunConfig
from llm.config.parse import to_yaml
from llm.finetune.chat import Conversations
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, build_model
from llm.train.engines.base import Engine, micro_batch
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from trained_run import write_run

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAYOUTS = {
    "data-parallel": {},
    "zero2": dict(train=dict(engine="deepspeed"), parallel=dict(zero_stage=2)),
    "fsdp": dict(train=dict(engine="fsdp"), parallel=dict(zero_stage=3)),
    "tensor-parallel": dict(train=dict(engine="deepspeed"), parallel=dict(tensor_parallel=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write(path, [{"messages": messages} for messages in sums()])
    return path


def learnt(engine: Engine, config: RunConfig, rank: int, size: int) -> dict[str, Any]:
    """The losses of two steps, the gradients of the second, its micro-batches, and the validation loss after it."""
    source, found = Conversations(config), {"losses": []}
    loader = source.loader(dp_rank=rank, dp_size=size, consumed=0, widen=True)
    engine.set_lr(config.optim.lr)
    for _ in range(2):
        step = loader.next_step()
        loss = engine.forward_backward([micro_batch(batch, CPU) for batch in step.batches], step.target_count)
        found["losses"].append(float(loss))
        found["gradients"] = {name: engine.gradient(name).clone().numpy() for name in engine.parameters}
        found["counts"] = [int(batch.counted.sum()) for batch in step.batches if batch.counted is not None]
        engine.step()
    batches = source.validation_batches(dp_rank=rank, dp_size=size)
    return found | source.evaluate(engine, (micro_batch(batch, CPU, rows) for batch, rows in batches))


def on_ranks(config: RunConfig) -> dict[str, Any]:
    """`learnt` on this rank of a pool. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    found = learnt(engine, config, mesh.dp_rank, mesh.dp_size)
    engine.close()
    return found


@pytest.mark.parametrize("name", slow_but(["data-parallel", "zero2"], LAYOUTS))
def test_a_layout_learns_what_one_process_does(name: str, two_ranks: RankPool, folder: Path) -> None:
    whole = chat_config(folder, train=dict(micro_batch_size=8))
    expected = learnt(PlainEngine(whole, build_model(whole, None), None, CPU), whole, 0, 1)
    ranks = two_ranks.run(on_ranks, chat_config(folder, **LAYOUTS[name]))
    counts = [count for found in ranks for count in found["counts"]]
    assert len(counts) > 2 and len(set(counts)) > 2  # else a mean of means would do
    for found in ranks:
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        for parameter, gradient in expected["gradients"].items():
            np.testing.assert_allclose(
                found["gradients"][parameter], gradient, rtol=1e-3, atol=1e-6, err_msg=f"{name} {parameter}"
            )


@pytest.mark.slow
def test_two_processes_under_zero_report_the_losses_of_one(folder: Path, tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", chat_config(folder))
    shutil.copy(folder / "tokenizer.json", base / "tokenizer.json")
    config = chat_config(folder, train=dict(max_steps=4, eval_interval=2, init_from=str(base)))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": turn("a", "b")[:1]}))
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def finetune(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *torchrun, f"{ROOT}/launch/finetune.py", "--config", "c.yaml", *words]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)

    zero = ["--train.engine=deepspeed", "--parallel.zero_stage=2"]
    refused = finetune(2, *zero, "--data.source=bad.jsonl", "--name=bad")
    assert refused.returncode and "line 1: the last message is of the user" in refused.stderr
    for ours in ("llm", "launch"):  # torchrun's own traceback, of .venv, follows every rank that fails
        assert f'File "{ROOT / ours}' not in refused.stderr
    assert not (tmp_path / "runs").exists()
    for done in (finetune(2, *zero, "--name=two"), finetune(1, "--name=one", "--train.micro_batch_size=8")):
        assert done.returncode == 0, done.stderr
    for key, steps in (("loss", [1, 2, 3, 4]), ("val_loss", [0, 2, 4])):
        one, two = (metric(tmp_path / "runs" / name, key) for name in ("one", "two"))
        assert [step for step, _ in one] == [step for step, _ in two] == steps
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
