"""Opens the data of a fine-tuning task."""

from __future__ import annotations

from llm.config import RunConfig
from llm.errors import InputError
from llm.finetune.chat import Conversations
from llm.finetune.classify import Classification
from llm.train.source import Pretraining, Say, Source


def open_task(config: RunConfig, say: Say) -> Source:
    """What finetune.task asks for. Raises InputError for data that cannot be used."""
    if config.finetune.task == "continue":
        return Pretraining.open(config, say)
    if config.finetune.task == "chat":
        return Conversations.open(config, say)
    if config.finetune.task == "classify":
        return Classification.open(config, say)
    raise InputError(f"finetune.task is {config.finetune.task}; expected continue, chat or classify")
