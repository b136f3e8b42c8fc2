"""Says which label a text has, by a classifier that launch/finetune.py has trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm.finetune.classify import text_tokens
from llm.model.gpt import GPT
from llm.sinks import Say
from llm.trained import Trained

ROWS = 16  # texts that go through the model together


@torch.inference_mode()
def probabilities(trained: Trained, texts: Sequence[str], say: Say) -> Iterator[Tensor]:
    """Of each text in turn, the probability of each of trained.labels: fp32 [labels].

    A text longer than those of the training, data.seq_len, loses its end as there, and `say` is told. Raises InputError
    for a text without tokens.
    """
    model, T = trained.model, trained.config.data.seq_len
    assert isinstance(model, GPT)
    device = next(model.parameters()).device
    rows = [text_tokens(f"text {i}", text, trained.tokenizer) for i, text in enumerate(texts, 1)]
    for i, row in enumerate(rows, 1):
        if len(row) > T:
            say(f"text {i} has {len(row)} tokens, more than the training's data.seq_len, {T}: its end is not read")
    for first in range(0, len(rows), ROWS):
        some = [torch.tensor(row[:T], device=device) for row in rows[first : first + ROWS]]
        # What fills a row lies behind its text, which does not attend to it.
        tokens = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        numbers = torch.arange(len(some), device=device)
        last = torch.tensor([len(row) - 1 for row in some], device=device)
        states = model.states(tokens, torch.arange(tokens.shape[1], device=device), numbers, None, None)
        yield from model.head(states[numbers, last]).softmax(-1).cpu()
