"""Generates text from a trained model, with a key/value cache, on one process or over tensor-parallel ranks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.data.chat import Message
from llm.data.tokenizer import TextStream
from llm.errors import InputError, require
from llm.model.build import Cache, Model, cache_of
from llm.model.cache import KVCache
from llm.model.decode import Decoder, fits
from llm.sampling import SamplingConfig, sample
from llm.sinks import Say
from llm.trained import Trained

LOGIT_ROWS = 256  # logits fp32 [256, V] at a time


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
    ended: Container[int] = (),
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields one list per step: each row's new token, or None where it has none.

    prompts: token ids, of any lengths. All rows advance together from the shortest prompt's end; a row that is still
    inside its prompt takes its own next token, so that no padding enters the attention. A row ends at token `end`,
    after `max_new_tokens`, at the model's longest sequence, or when the caller has put its number into `ended`. No id
    in `banned` is drawn. Raises InputError for a prompt that cannot be continued.
    """
    lengths, limits = room(model, prompts, max_new_tokens)
    device, position = next(model.parameters()).device, min(lengths)
    rows = torch.zeros(len(prompts), max(limits), dtype=torch.long, device=device)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    begins, unused = (torch.tensor(numbers, dtype=torch.long, device=device) for numbers in (lengths, [*banned]))
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = cache_of(model, max(limits)) if use_cache else None
    logits, cache = begin(model, rows[:, :position], cache)
    decoder, fitting = None, model if fits(model) else None
    while True:
        logits.index_fill_(-1, unused, -torch.inf)
        history = rows[:, :position]
        drawn = sample(logits, sampling, history=history, begins=begins[:, None], generator=generator)
        rows[:, position] = torch.where(begins <= position, drawn, rows[:, position])
        new: list[int | None] = [None] * len(rows)
        for i, token in enumerate(drawn.tolist()):
            if lengths[i] <= position < limits[i]:
                if token == end:
                    limits[i] = position
                else:
                    new[i] = token
        yield new
        position += 1
        limits = [position if i in ended and position < limit else limit for i, limit in enumerate(limits)]
        if position >= max(limits):
            return
        if isinstance(cache, KVCache) and fitting is not None:
            decoder = decoder or Decoder(fitting, cache, len(rows))
            logits = decoder(rows[:, position - 1], position - 1)
        else:
            start = 0 if cache is None else position - 1
            logits = model.head(hidden(model, rows[:, start:position], start, cache)[:, -1])


def room(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[list[int], list[int]]:
    """How long each prompt is, and its text can become. Raises InputError where that is no more."""
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; expected at least 1")
    longest, lengths = model.config.max_seq_len, [len(prompt) for prompt in prompts]
    require(min(lengths) > 0, "a prompt is empty; give at least one character to continue")
    found = f"a prompt has {max(lengths)} tokens; the model's longest sequence is {longest} (model.max_seq_len)"
    require(max(lengths) < longest, f"{found}, and at least one must be free")
    return lengths, [min(n + max_new_tokens, longest) for n in lengths]


def begin(model: Model, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
    """Logits fp32 [B, V] after `tokens` int64 [B, T], and their cache. Rows that are alike are computed once."""
    distinct, owner = tokens.unique(dim=0, return_inverse=True)
    if len(distinct) == len(tokens):
        return model.head(hidden(model, tokens, 0, cache)[:, -1]), cache
    logits = model.head(hidden(model, distinct, 0, cache)[:, -1])
    return logits[owner], cache and cache.select(owner)


@torch.inference_mode()
def log_probabilities(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The model's log p of each of `tokens`, in nats, after `prompt` and those before it: before cuts and penalties."""
    ids = torch.tensor([*prompt, *tokens], device=next(model.parameters()).device)
    states, targets = hidden(model, ids[None, :-1], 0, None)[0, len(prompt) - 1 :], ids[len(prompt) :]
    pairs = zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return [x for s, t in pairs for x in (-F.cross_entropy(model.head(s), t, reduction="none")).tolist()]


def hidden(model: Model, tokens: Tensor, start: int, cache: Any) -> Tensor:
    """The states [B, T, C] before the head, of `tokens` int64 [B, T], the first of which stands at position `start`.

    cache: of `cache_of` for this model, or None.
    """
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    samples = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    return model.states(tokens, positions, samples, None, cache)


class Growing:
    """A text that grows by a token at a time, up to the first of some strings, which is no part of it."""

    def __init__(self, pieces: TextStream, stops: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.stopped = False
        self._pieces, self._held = pieces, ""

    def push(self, token: int) -> str:
        """The text that this token makes certain: what may be the beginning of a stop is held back."""
        self.tokens.append(token)
        return self._certain(self._pieces.push(token))

    def finish(self) -> str:
        """What is left of the text."""
        last, held = self._certain(self._pieces.finish()), self._held
        self._held = ""
        return last + held

    def _certain(self, new: str) -> str:
        text, self._held = "" if self.stopped else self._held + new, ""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


class Speed:
    """Times the steps of `generate`: the first one reads what all prompts have."""

    def __init__(self) -> None:
        self.first = self.others = 0.0
        self.steps = self.tokens = 0

    def timed(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        """The steps, while they are timed."""
        while True:
            start = perf_counter()
            step = next(steps, None)
            seconds = perf_counter() - start
            if step is None:
                return
            if self.steps:
                self.others += seconds
                self.tokens += sum(token is not None for token in step)
            else:
                self.first = seconds
            self.steps += 1
            yield step

    def note(self, read: int) -> str:
        """In words; read: the tokens of the first step."""
        rates = [("prefill", read, self.first), ("decode", self.tokens, self.others)]
        found = [f"{what} {n:,} tokens in {s:.3f} s, {n / s:,.0f} tokens/s" for what, n, s in rates if n and s]
        return f"speed: {'; '.join(found)}"


def stream(
    trained: Trained,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    say: Say = lambda note: None,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
    log_probs: bool = False,
    speed: bool = False,
) -> Iterator[str]:
    """The prompts and what follows them, as text: one prompt piece by piece, several one after the other at the end.

    An empty prompt is the start of a document; one of token ids is not shown. `say` gets a note of each text that the
    model's longest sequence ended and, with `speed`, of the tokens per second. samples: texts of each prompt. stop:
    strings before which a text ends. log_probs: at the end a line of JSON for each text, with the ids of its new tokens
    and their log-probabilities.
    """
    require(samples >= 1, f"samples is {samples}; expected at least 1")
    tokenizer, model, clock = trained.tokenizer, trained.model, Speed()
    typed = [as_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts for _ in range(samples)]
    begun = [tokenizer.encode(prompt) if isinstance(prompt, str) else [*prompt] for prompt in typed]
    texts = [prompt if isinstance(prompt, str) else "" for prompt in typed]
    ids = [tokens or [tokenizer.eod_id] for tokens in begun]  # which in training stands before the next document
    room(model, ids, max_new_tokens)  # what cannot be is refused before the prompt is shown
    rows, ended, alone = [Growing(tokenizer.stream(tokens), stop) for tokens in begun], set[int](), len(texts) == 1
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end": tokenizer.eod_id, "sampling": sampling}
    options |= {"banned": tokenizer.unused(trained.config.model.vocab_size), "ended": ended}
    for step in chain([[]], clock.timed(generate(model, ids, **options))):  # first there is the prompt to show
        for i, token in enumerate(step):
            if token is not None:
                texts[i] += rows[i].push(token)
                if rows[i].stopped:
                    ended.add(i)
        if alone:
            yield texts[0]
            texts[0] = ""
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        header = "" if alone else f"--- {number} of {len(texts)}\n"
        yield f"{header}{text}{row.finish()}\n"
    for number, (tokens, row) in enumerate(zip(ids, rows, strict=True), 1):
        if log_probs:
            found = [round(x, 4) for x in log_probabilities(model, tokens, row.tokens)] if row.tokens else []
            yield json.dumps({"text": number, "tokens": row.tokens, "log_probs": found}) + "\n"
        count, longest = len(row.tokens), model.config.max_seq_len
        if count < max_new_tokens and len(tokens) + count == longest and not row.stopped:
            limit = f"at the model's longest sequence, {longest} tokens (model.max_seq_len)"
            say(f"note: text {number} ends {limit}, after {count} of {max_new_tokens} new tokens")
    if speed:
        say(clock.note(len(ids) * min(map(len, ids))))


def chat(trained: Trained, lines: Iterable[str], max_new_tokens: int, **options: Any) -> Iterator[str]:
    """The answers to the lines of a user, piece by piece. Each is made of all turns so far; options: those of `stream`.

    Raises InputError where the conversation has outgrown the model's longest sequence.
    """
    messages: list[Message] = []
    for line in lines:
        messages.append({"role": "user", "content": as_text(line.rstrip("\n"))})
        said = ""
        for piece in stream(trained, [trained.chat.prompt(messages)], max_new_tokens, **options):
            said += piece
            yield piece
        messages.append({"role": "assistant", "content": said.removesuffix("\n")})


def read_text(path: str) -> str:
    """The text of a file, as it is; of stdin for "-". Raises InputError where it cannot be read."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be read: {error.strerror}") from error
    return raw.decode(errors="surrogateescape")


def as_text(prompt: str) -> str:
    """A prompt as UTF-8 can hold it: bytes that the locale could not read are read as UTF-8, what is none is U+FFFD."""
    halves = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", prompt)  # surrogates that stand for no byte
    return halves.encode(errors="surrogateescape").decode(errors="replace")
