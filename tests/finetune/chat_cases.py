"""Conversations, a tokenizer and a config for the tests of fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm.config import DataConfig, RunConfig
from llm.config.finetune import FinetuneConfig
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.data.tokenizer import Tokenizer
from llm.finetune.tasks import open_task
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.source import Pretraining
from llm.train.start import start
from tiny_run import case, plain

T, V = 48, 272
Messages = list[dict[str, str]]


def turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sums(count: int = 60) -> list[Messages]:
    """Questions whose answers are of very different lengths."""
    return [turn(f"{i}+{i}", f"{2 * i} " * (1 + i % 7)) for i in range(count)]


def write(folder: Path, records: list[Any]) -> Path:
    """A tokenizer of the bytes and 15 merges, and the records, one a line."""
    Tokenizer.train(["### user\n1+1\n### assistant\n2 "] * 9, V).save(folder / "tokenizer.json")
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_config(folder: Path, **sections: Any) -> RunConfig:
    """A run of the plain engine on the folder's conversations, of a model that Hugging Face has a form of."""
    data = DataConfig(
        source=str(folder / "chat.jsonl"), tokenizer=str(folder / "tokenizer.json"), seq_len=T, packing="best_fit",
        document_masks=True, validation_fraction=0.3,
    )  # fmt: skip
    llama = dict(norm="rmsnorm", activation="swiglu", bias=False)
    model = dict(vocab_size=V, max_seq_len=T, **llama)
    made = plain(case(model=model, train=dict(global_batch_size=8, micro_batch_size=2)))
    made = replace(made, data=data, finetune=FinetuneConfig(task="chat"), checkpoint=CheckpointConfig(keep_last=1))
    made = replace(made, logging=LoggingConfig(tensorboard=False, sample_tokens=0))
    return replace(made, **{name: replace(getattr(made, name), **fields) for name, fields in sections.items()})


def metric(run: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a run's metrics that has the key."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in found if key in line]


def tuned(config: RunConfig) -> int | None:
    """Start, on the one rank of a pool, and train; the step at which the start ends, None if there is nothing to do."""
    lock = RunFolder(RUNS, config.name).claim()
    opened = Pretraining.open if config.finetune.task == "none" else open_task
    run = start(config, torch.device("cpu"), lambda line: None, open_source=opened)
    if run is not None:
        train(run)
        run.engine.close()
    lock.release()
    return None if run is None else run.step
