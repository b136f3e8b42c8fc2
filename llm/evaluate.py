"""Scores text with a trained model: likelihoods of continuations, and loss, perplexity and bits per byte of documents.

Shapes: N requests, R of them in a batch.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm import __version__
from llm.errors import require
from llm.files import write_json
from llm.generate import hidden
from llm.model.build import cache_of
from llm.model.layers import IGNORED_TARGET
from llm.parallel.agreement import backend_device, together
from llm.parallel.mesh import Mesh
from llm.trained import Trained

Item = TypeVar("Item")
Record: TypeAlias = dict[str, str | int | float]
LOGIT_ROWS = 1024  # logits fp32 [1024, V] at a time
BATCHES_AT_ONCE = 32  # sorted by length together, so that the rows of a batch need little padding
DOCUMENTS_AT_ONCE = 64  # encoded together, on all cores


class Request(NamedTuple):
    """Tokens to score after others: log p(continuation | context). Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def plan(requests: Sequence[Request], rows: int) -> list[tuple[int, list[int]]]:
    """Every request once, in batches of at most `rows`: (length of what is shared, numbers of the requests).

    A context up to its last token is shared if several requests have it; they stand together, beside others as long.
    The longest come first, so that the rows of a batch need little padding.
    """
    prefixes = [tuple(request.context[:-1]) for request in requests]
    times = Counter(prefixes)
    shared = [len(prefix) if times[prefix] > 1 else 0 for prefix in prefixes]

    def order(i: int) -> tuple[int, tuple[int, ...], int]:
        return shared[i], prefixes[i][: shared[i]], sum(map(len, requests[i]))

    alike = groupby(sorted(range(len(requests)), key=order, reverse=True), shared.__getitem__)
    return [(start, batch) for start, numbers in alike for batch in in_parts(numbers, rows)]


class Scorer:
    """Scores requests in batches of at most `rows`, which are dealt over the data-parallel ranks of a mesh.

    The batches do not depend on the number of ranks. Tensor-parallel ranks call it alike.
    """

    def __init__(self, trained: Trained, mesh: Mesh, rows: int) -> None:
        require(rows >= 1, f"the batch size is {rows}; expected at least 1")
        self.trained, self.model, self.mesh, self.rows = trained, trained.model, mesh, rows
        self.device, self.mine = next(self.model.parameters()).device, slice(mesh.dp_rank, None, mesh.dp_size)

    def shown(self, items: Iterable[Item], title: str) -> Iterable[Item]:
        """The items, with a bar on rank 0's stderr if there is a title."""
        silent = self.mesh.rank > 0 or not title
        return track(items, title, console=Console(stderr=True), transient=True, disable=silent)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the data-parallel ranks, on the CPU. Collective."""
        x = x.to(backend_device(self.mesh.dp_group))
        dist.all_reduce(x, group=self.mesh.dp_group)
        return x.cpu()

    def score(self, requests: Sequence[Request], title: str = "") -> Tensor:
        """fp64 [N, 2]: log p(continuation | context) in nats, and how many of its tokens are not the likeliest.

        Zero for requests of other data-parallel ranks: `total` joins them.
        """
        scores = torch.zeros(len(requests), 2, dtype=torch.float64)
        for start, batch in self.shown(plan(requests, self.rows)[self.mine], title):
            scores[batch] = self.run(start, [requests[i] for i in batch]).cpu()
        return scores

    @torch.inference_mode()
    def run(self, start: int, requests: Sequence[Request]) -> Tensor:
        """The scores [R, 2] of requests; the first `start` tokens go through the model once for all that share them."""
        rows = [torch.tensor([*r.context[start:], *r.continuation[:-1]]) for r in requests]
        wanted = [torch.tensor([IGNORED_TARGET] * (len(r.context) - start - 1) + [*r.continuation]) for r in requests]
        # What pads a row on the right is seen by no token before it.
        tokens = pad_sequence(rows, batch_first=True).to(self.device)
        targets = pad_sequence(wanted, batch_first=True, padding_value=IGNORED_TARGET).to(self.device)
        cache = None
        if start:
            prefixes: dict[tuple[int, ...], int] = {}
            owner = [prefixes.setdefault(tuple(r.context[:start]), len(prefixes)) for r in requests]
            cache = cache_of(self.model, start + tokens.shape[1])
            hidden(self.model, torch.tensor([*prefixes], device=self.device), 0, cache)
            cache = cache.select(torch.tensor(owner, device=self.device))
        counted = targets != IGNORED_TARGET
        states, targets = hidden(self.model, tokens, start, cache)[counted], targets[counted]
        scores = torch.zeros(len(requests), 2, dtype=torch.float64, device=self.device)
        parts = (x.split(LOGIT_ROWS) for x in (states, targets, counted.nonzero()[:, 0]))
        for state, target, row in zip(*parts, strict=True):
            logits = self.model.head(state)
            likelihood = -F.cross_entropy(logits, target, reduction="none")
            scores.index_add_(0, row, torch.stack([likelihood, logits.argmax(-1) != target], 1).double())
        return scores


def windows(tokens: Sequence[int], begin: int, seq_len: int, stride: int) -> Iterator[Request]:
    """Requests that score each of a document's `tokens` once (Baevski & Auli 2019, section 6), `seq_len` inputs each.

    The token `begin` stands before the first, so that it is scored too. The first window scores `seq_len` tokens, each
    later one the next `stride`, of which the first has seq_len - stride + 1 tokens before it.
    """
    text, done = [begin, *tokens], 0
    while done < len(tokens):
        end = min(done + (stride if done else seq_len), len(tokens))
        yield Request(text[max(0, end - seq_len) : done + 1], text[done + 1 : end + 1])
        done = end


def score_text(
    scorer: Scorer, source: str, documents: Iterator[str], seq_len: int | None, stride: int | None
) -> Record:
    """Loss (nats per token), perplexity and bits per UTF-8 byte of documents, each after the end-of-document token.

    None: windows as long as the model allows, which advance by half of their length. Collective. Raises InputError if
    there is no token, or the lengths do not fit the model or each other.
    """
    tokenizer, longest, sizes = scorer.trained.tokenizer, scorer.model.config.max_seq_len, Counter[str]()
    seq_len = longest if seq_len is None else seq_len
    stride = max(1, seq_len // 2) if stride is None else stride
    require(1 <= seq_len <= longest, f"--seq-len is {seq_len}; expected 1 to {longest}, the model's max_seq_len")
    require(1 <= stride <= seq_len, f"--stride is {stride}; expected 1 to {seq_len}, the length of a window")

    def requests() -> Iterator[Request]:
        for texts in in_parts(documents, DOCUMENTS_AT_ONCE):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts)[0], strict=True):
                sizes.update(documents=1, tokens=len(tokens), bytes=len(text.encode()))
                yield from windows(tokens, tokenizer.eod_id, seq_len, stride)

    parts = in_parts(requests(), BATCHES_AT_ONCE * scorer.rows)
    agreed = iter(lambda: together(lambda: next(parts, [])), [])  # no rank scores what another cannot read
    likelihoods = (scorer.score(part)[:, 0].sum().item() for part in scorer.shown(agreed, "scoring"))
    total = -scorer.total(torch.tensor(sum(likelihoods), dtype=torch.float64))
    require(sizes["tokens"] > 0, f"{source} holds no token to score; expected text")
    loss, bits = total / sizes["tokens"], total / math.log(2) / sizes["bytes"]
    measures = {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits}
    return {"seq_len": seq_len, "stride": stride, **sizes, **{name: x.item() for name, x in measures.items()}}


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print the records of texts and tasks, by name, and write them to `path` with the versions of what made them."""
    table = Table("", "measure", "value", "standard error")
    for name, record in {**result["text"], **result["tasks"]}.items():
        for measure, value in record.items():
            if "_stderr" not in measure:
                both = value, record.get(measure.replace(",", "_stderr,"), "") if "," in measure else ""
                table.add_row(escape(name), measure, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in both))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if path is not None:
        packages = ["torch", "tokenizers", *(["lm_eval"] if result["tasks"] else [])]
        versions = {"ingot": __version__, **{package: version(package) for package in packages}}
        write_json(path, {**result, "versions": versions})
