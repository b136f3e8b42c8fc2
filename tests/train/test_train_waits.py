"""No step waits for the device: on tensors without values, where every read of one raises, a run trains to its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from chosen import slow_but
from llm.config import OptimConfig, RunConfig
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, build_model
from llm.train.engines.fsdp import FSDPEngine
from llm.train.engines.plain import PlainEngine
from llm.train.feed import Feed
from llm.train.loop import Trainer, train
from llm.train.optim import adamw
from llm.train.run_folder import RunFolder
from llm.train.watch import Watch
from pool import RankPool
from test_train_loop import MadeUp, MadeUpRun, MadeUpSource, config
from tiny_run import batches, case, plain, target_count

META = torch.device("meta")
PRECISIONS = ["fp32", "bf16", "fp16"]


def allow_meta(patch: pytest.MonkeyPatch) -> None:
    """Let torch's fused AdamW take tensors without values, whose device it refuses; give their device a size."""
    from torch.optim import optimizer

    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))

    honest = optimizer._get_fused_kernels_supported_devices
    patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*honest(), "meta"])


def made(precision: str, **sections: Any) -> RunConfig:
    train = dict(engine="plain", precision=precision, impl="torch", micro_batch_size=4)
    return case(train=train, **sections)


def without_values(run: RunConfig) -> PlainEngine:
    with META:
        model = build_model(plain(run), None)
    return PlainEngine(run, model, None, META)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_the_plain_engine_reads_nothing(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_meta(monkeypatch)
    run = made(precision)
    engine = without_values(run)
    for step in range(3):
        data = [type(b)(*(x if x is None else x.to(META) for x in b)) for b in batches(run, step, 0, 1, False)]
        loss = engine.forward_backward(data, target_count(False))
        result = engine.step()
        assert {loss.device, result.grad_norm.device, result.skipped.device} == {META}
    with pytest.raises(RuntimeError, match="meta"):
        float(loss)


def synchronised(stage: int) -> int:
    """How often DeepSpeed waits for all of the device's work in 4 steps of 4 micro-batches. Collective."""
    from deepspeed.accelerator import get_accelerator

    config, calls = case(parallel=dict(zero_stage=stage)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "synchronize", lambda *device: calls.append(device))
        engine = build_engine(config, Mesh.create(config.parallel, "cpu"), torch.device("cpu"))
        before = len(calls)
        for step in range(4):
            engine.forward_backward(batches(config, step, 0, 1, False), target_count(False))
            engine.step()
        found = len(calls) - before
        engine.close()
    return found


@pytest.mark.parametrize("stage", slow_but([1], range(4)))
def test_deepspeed_does_not_wait_for_all_of_a_gpu(stage: int, one_rank: RankPool) -> None:
    """As its timers would: what else its source shows that it reads is in docs/parallelism.md."""
    assert one_rank.run(synchronised, stage) == [0]


def reads(interval: int, root: Path) -> list[int]:
    """Train on this rank with values nowhere; the steps after which the trainer would have read."""
    found, made = [], config(train=dict(engine="plain", impl="torch"))
    made = replace(made, logging=LoggingConfig(interval=interval, tensorboard=False))
    made = replace(made, checkpoint=CheckpointConfig(interval=4))
    mesh, folder = Mesh.create(made.parallel, "cpu"), RunFolder(root, made.name)
    folder.create()

    def read(trainer: Trainer) -> tuple[float, float]:
        found.append(trainer.run.step)
        assert len(trainer.unread) == trainer.run.step - sum(found[-2:-1])
        trainer.unread = []
        return 0.0, 0.0

    with pytest.MonkeyPatch.context() as patch:
        allow_meta(patch)
        patch.setattr(Trainer, "read", read)
        patch.setattr(Trainer, "validate", lambda trainer: True)
        patch.setattr(Watch, "replicas", lambda watch: None)
        patch.setattr(Feed, "record", lambda feed: {})  # reads how many samples were replaced
        patch.setattr(Trainer, "save", lambda trainer, **_: None)
        patch.setattr(PlainEngine, "updates", property(lambda engine: 0))
        engine = without_values(made)
        feed = Feed(MadeUp(made, mesh, 0), META, made.train.max_steps, mesh.dp_group)
        train(MadeUpRun(made, folder, MadeUpSource(made, mesh), mesh, META, 0, feed, engine))
    return found


def test_a_run_reads_where_it_logs_or_saves_alone(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(reads, 3, tmp_path) == [[3, 4, 6]]


class NoCopyOut(TorchDispatchMode):
    """Raises where a tensor leaves the GPU: fake ones allow it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = [x.device.type for x in args if isinstance(x, Tensor)]
        out = isinstance(result, Tensor) and result.device.type == "cpu" and "cuda" in before
        assert not out, f"{func} copies from the GPU"
        return result


@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_of_shards_on_a_gpu_reads_nothing(scaled: bool) -> None:
    """The masters of FSDP, as fake CUDA tensors: their engine needs a GPU's streams, its update does not."""
    from llm.train.engines.shared import DynamicLossScale

    with FakeTensorMode(), NoCopyOut():
        masters = {str(i): torch.randn(n, device="cuda") for i, n in enumerate((5, 0, 64))}
        for master in masters.values():
            master.grad = torch.randn_like(master)
        engine: Any = FSDPEngine.__new__(FSDPEngine)
        engine.masters, engine.split, engine.grad_clip = masters, {"0": True, "1": False, "2": False}, 1.0
        engine.device, engine.mesh = torch.device("cuda", 0), SimpleNamespace(dp_group=None, tp_group=None)
        engine.optimizer = adamw([{"params": [*masters.values()]}], OptimConfig())
        engine.scale, engine.model = DynamicLossScale() if scaled else None, torch.nn.Module()
        for _ in range(2):
            for master in masters.values():
                master.grad = torch.randn_like(master)
            result = engine.step()
        assert result.grad_norm.device.type == result.skipped.device.type == "cuda"
        with pytest.raises(Exception, match="local_scalar_dense"):
            bool(result.skipped)
        with pytest.raises(AssertionError, match="copies from the GPU"):
            result.grad_norm.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ["plain", "fsdp"])
def test_steps_on_a_gpu_do_not_synchronise(engine: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.parity.batches import micro_batches
    from llm.train.build import build_engine
    from pool import free_port

    gpu, stage = torch.device("cuda"), 3 if engine == "fsdp" else 0
    run = made(precision, parallel=dict(zero_stage=stage))
    run = replace(run, train=replace(run.train, engine=engine))
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{free_port()}", world_size=1, rank=0)
    try:
        built = build_engine(run, Mesh.create(run.parallel, "cuda"), gpu)
        data = [micro_batches(run, step, gpu, ragged=False) for step in range(4)]
        step = lambda number: (built.forward_backward(data[number], target_count(False)), built.step())  # noqa: E731
        step(0)
        torch.cuda.synchronize()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("synchronised"))
        torch.cuda.set_sync_debug_mode("error")
        results = [step(number) for number in (1, 2, 3)]
        torch.cuda.set_sync_debug_mode("default")
        assert all(float(loss) > 0 for loss, _ in results)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
