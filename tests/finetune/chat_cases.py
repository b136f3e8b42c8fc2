"""Conversations, a tokenizer and a config for the tests of fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm.config import DataConfig, RunConfig
from llm.config.finetune import FinetuneConfig
from llm.config.sections import CheckpointConfig, LoggingConfig
from llm.data.tokenizer import Tokenizer
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
    """A run of the plain engine on the folder's conversations, which saves and validates at each step."""
    data = DataConfig(
        source=str(folder / "chat.jsonl"), tokenizer=str(folder / "tokenizer.json"), seq_len=T, packing="best_fit",
        document_masks=True, validation_fraction=0.3,
    )  # fmt: skip
    made = plain(case(model=dict(vocab_size=V, max_seq_len=T), train=dict(global_batch_size=8, micro_batch_size=2)))
    made = replace(made, data=data, finetune=FinetuneConfig(task="chat"), checkpoint=CheckpointConfig(keep_last=1))
    made = replace(made, logging=LoggingConfig(tensorboard=False, sample_tokens=0))
    return replace(made, **{name: replace(getattr(made, name), **fields) for name, fields in sections.items()})
