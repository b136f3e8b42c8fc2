"""A run of random, but not tiny, weights, for tests of what reads a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from states import state_of
from thread_ranks import ranks_in_threads

from llm.checkpoint.writer import write_checkpoint
from llm.config import RunConfig
from llm.config.parse import to_dict
from llm.data.tokenizer import Tokenizer
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine

TEXTS = ["def f(x):\n    return x\n", "import os\nprint(os.name)\n", "class A:\n    pass\n"]


def write_run(folder: Path, config: RunConfig) -> Path:
    """`folder`, with a checkpoint of step 5 and a tokenizer of 261 tokens, the last of which ends a document."""
    folder.mkdir()
    Tokenizer.train(TEXTS * 50, 261).save(folder / "tokenizer.json")
    model = build_model(config, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    pieces = PlainEngine(config, model, None, torch.device("cpu")).state_pieces()
    with ranks_in_threads(1):
        write_checkpoint(folder / "checkpoints", 5, pieces, state_of(5, config=to_dict(config)), keep_last=1)
    return folder
