"""A step of a tiny engine in this process under the profiler, as llm/train/profiling.py takes it, without ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from llm.config import RunConfig
from llm.profile.ranges import Ranges, mark_range
from llm.profile.trace import Event
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine
from tiny_run import G, T, batches, case, plain

CPU = torch.device("cpu")


class Taken(NamedTuple):
    events: list[Event]
    wall_ms: float
    engine: PlainEngine


class Data:
    """What stands for the feed."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def next_step(self, step: int) -> Any:
        return batches(self.config, step, 0, 1, ragged=False)


def config(**sections: Any) -> RunConfig:
    """Large enough that operations take more time than the ranges around them."""
    model = dict(n_layer=2, d_model=64, vocab_size=300) | sections.pop("model", {})
    train = sections.pop("train", {})
    return plain(case(model=model, **sections), **train)


def new_engine(config: RunConfig) -> PlainEngine:
    return PlainEngine(config, build_model(config, None), None, CPU)


def step(engine: PlainEngine, data: Data, number: int) -> float:
    """One step; its loss."""
    engine.set_lr(1e-3)
    loss = engine.forward_backward(data.next_step(number), G * T)
    engine.step()
    return loss.item()


def ranges(engine: PlainEngine, data: Data) -> Ranges:
    methods = [
        ("data", data, "next_step"),
        ("forward_backward", engine, "forward_backward"),
        ("update", engine, "step"),
    ]
    return Ranges(engine.model, methods, nvtx=False)


def taken(config: RunConfig, folder: Path, **options: Any) -> Taken:
    """The third step of an engine; options: of torch.profiler."""
    engine, data = new_engine(config), Data(config)
    for number in range(2):
        step(engine, data, number)
    with profile(activities=[ProfilerActivity.CPU], **options) as recording, ranges(engine, data):
        start = time.perf_counter()
        with mark_range("step 3"):
            step(engine, data, 2)
        wall_ms = (time.perf_counter() - start) * 1e3
    recording.export_chrome_trace(str(folder / "trace.json"))
    return Taken(json.loads((folder / "trace.json").read_text())["traceEvents"], wall_ms, engine)
