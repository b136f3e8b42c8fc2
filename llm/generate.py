"""Generates text from a trained model, with a key/value cache, on one process or over tensor-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llm.errors import require
from llm.model.build import Model, cache_of
from llm.sampling import SamplingConfig, sample
from llm.sinks import Say
from llm.trained import Trained


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: int,
    sampling: SamplingConfig,
    use_cache: bool = True,
    banned: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields one list per step: each row's new token, or None where it has none.

    prompts: token ids, of any lengths. All rows advance together from the shortest prompt's end; a row that is still
    inside its prompt takes its own next token, so that no padding enters the attention. A row ends at token `end`,
    after `max_new_tokens`, or at the model's longest sequence. No id in `banned` is drawn. Raises InputError for a
    prompt that cannot be continued.
    """
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; expected at least 1")
    device, longest = next(model.parameters()).device, model.config.max_seq_len
    lengths = [len(prompt) for prompt in prompts]
    require(min(lengths) > 0, "a prompt is empty; give at least one character to continue")
    found = f"a prompt has {max(lengths)} tokens; the model's longest sequence is {longest} (model.max_seq_len)"
    require(max(lengths) < longest, f"{found}, and at least one must be free")
    limits = [min(n + max_new_tokens, longest) for n in lengths]
    rows = torch.zeros(len(prompts), max(limits), dtype=torch.long, device=device)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = cache_of(model, max(limits)) if use_cache else None
    start, position = 0, min(lengths)
    while position < max(limits):
        logits = model.head(hidden(model, rows[:, start:position], start, cache)[:, -1])
        logits[:, list(banned)] = -torch.inf
        drawn = sample(logits, sampling, history=rows[:, :position], generator=generator).tolist()
        new: list[int | None] = [None] * len(prompts)
        for i, token in enumerate(drawn):
            if lengths[i] <= position < limits[i]:
                if token == end:
                    limits[i] = position
                else:
                    rows[i, position] = new[i] = token
        start, position = position if use_cache else 0, position + 1
        yield new


def hidden(model: Model, tokens: Tensor, start: int, cache: Any) -> Tensor:
    """The states [B, T, C] before the head, of `tokens` int64 [B, T], the first of which stands at position `start`.

    cache: of `cache_of` for this model, or None.
    """
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    samples = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    return model.states(tokens, positions, samples, None, cache)


def stream(
    trained: Trained,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig,
    say: Say = lambda note: None,
) -> Iterator[str]:
    """The prompts and what follows them, as text: one prompt piece by piece, several one after the other at the end.

    An empty prompt is the start of a document. `say` gets a note of each text that the model's longest sequence ended.
    """
    tokenizer, longest = trained.tokenizer, trained.model.config.max_seq_len
    texts = [as_text(prompt) for prompt in prompts]
    begun = [tokenizer.encode(text) for text in texts]
    ids = [tokens or [tokenizer.eod_id] for tokens in begun]  # which in training stands before the next document
    banned, end = tokenizer.unused(trained.config.model.vocab_size), tokenizer.eod_id
    steps = generate(trained.model, ids, max_new_tokens=max_new_tokens, end=end, sampling=sampling, banned=banned)
    streams, counts, alone = [tokenizer.stream(tokens) for tokens in begun], [0] * len(texts), len(texts) == 1
    for row in chain([[]], steps):  # before the first step there is the prompt to show
        for i, token in enumerate(row):
            if token is not None:
                counts[i] += 1
                texts[i] += streams[i].push(token)
        if alone:
            yield texts[0]
            texts[0] = ""
    for number, (text, pieces) in enumerate(zip(texts, streams, strict=True), 1):
        header = "" if alone else f"--- {number} of {len(texts)}\n"
        yield f"{header}{text}{pieces.finish()}\n"
    for number, (tokens, count) in enumerate(zip(ids, counts, strict=True), 1):
        if count < max_new_tokens and len(tokens) + count == longest:
            limit = f"at the model's longest sequence, {longest} tokens (model.max_seq_len)"
            say(f"note: text {number} ends {limit}, after {count} of {max_new_tokens} new tokens")


def as_text(prompt: str) -> str:
    """A prompt as UTF-8 can hold it: bytes that the locale could not read are read as UTF-8, what is none is U+FFFD."""
    halves = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", prompt)  # surrogates that stand for no byte
    return halves.encode(errors="surrogateescape").decode(errors="replace")
