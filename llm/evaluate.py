"""Scores text with a trained model: likelihoods of continuations, and loss, perplexity and bits per byte of documents.

Shapes: N requests, R rows of a batch, T time, C model width, M tokens scored.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import chain, islice
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

from llm import __version__
from llm.errors import require
from llm.files import replace
from llm.generate import hidden
from llm.model.cache import KVCache
from llm.parallel.agreement import backend_device, together
from llm.parallel.mesh import Mesh
from llm.trained import Trained

Item = TypeVar("Item")
Batch: TypeAlias = list[list[int]]  # numbers of requests, grouped by the context that they share
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


def plan(requests: Sequence[Request], rows: int, share: bool) -> list[Batch]:
    """Every request once, in batches of at most `rows`, the longest first.

    share: requests with the same context stand together, beside others whose contexts are as long as theirs.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        same.setdefault(tuple(request.context) if share else (i,), []).append(i)

    def order(group: list[int]) -> tuple[int, int]:
        context, continuation = requests[group[0]]
        return len(context) if len(group) > 1 else 0, len(context) + len(continuation)

    found, last = list[Batch](), -1
    for group in sorted((part for all_ in same.values() for part in in_parts(all_, rows)), key=order, reverse=True):
        if order(group)[0] != last or sum(map(len, found[-1])) + len(group) > rows:
            found.append([])
        found[-1].append(group)
        last = order(group)[0]
    return found


class Scorer:
    """Scores requests in batches of at most `rows`, which are dealt over the data-parallel ranks of a mesh.

    The batches do not depend on the number of ranks. Tensor-parallel ranks call it alike. share: the keys and values of
    a context that several requests have are computed once.
    """

    def __init__(self, trained: Trained, mesh: Mesh, rows: int, share: bool = True) -> None:
        require(rows >= 1, f"the batch size is {rows}; expected at least 1")
        self.trained, self.model, self.mesh, self.rows, self.share = trained, trained.model, mesh, rows, share
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
        for batch in self.shown(plan(requests, self.rows, self.share)[self.mine], title):
            scores[list(chain(*batch))] = self.run([[requests[i] for i in group] for group in batch]).cpu()
        return scores

    @torch.inference_mode()
    def run(self, groups: Sequence[Sequence[Request]]) -> Tensor:
        """The scores [R, 2] of groups of requests. Those of a group, if it has several, share their context."""
        members = [request for group in groups for request in group]
        shared = len(members) > len(groups)
        rows = [[*([] if shared else request.context), *request.continuation[:-1]] for request in members]
        start, width = len(members[0].context) if shared else 0, max(map(len, rows))
        # Zeros on the right are seen by no token before them.
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long, device=self.device)
        counts = torch.tensor([len(request.continuation) for request in members], device=self.device)
        if shared:
            cache = KVCache(start + width)
            contexts = torch.tensor([group[0].context for group in groups], device=self.device)
            owner = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=self.device)
            x = hidden(self.model, contexts, 0, cache)[owner, -1:]
            if width:
                x = torch.cat([x, hidden(self.model, tokens, start, cache.select(owner))], 1)
        else:
            x = hidden(self.model, tokens, 0, None)
        # A row's last states, as many as its continuation has tokens, predict these.
        ends = torch.tensor([len(row) + shared for row in rows], device=self.device)
        row = torch.arange(len(rows), device=self.device).repeat_interleave(counts)
        place = torch.arange(len(row), device=self.device) + (ends - counts.cumsum(0))[row]
        targets = torch.tensor([*chain(*(request.continuation for request in members))], device=self.device)
        scores = torch.zeros(len(rows), 2, dtype=torch.float64, device=self.device)
        for part in torch.arange(len(row), device=self.device).split(LOGIT_ROWS):
            logits, wanted = self.model.head.logits(x[row[part], place[part]]), targets[part]
            likelihood = -F.cross_entropy(logits, wanted, reduction="none")
            scores.index_add_(0, row[part], torch.stack([likelihood, logits.argmax(-1) != wanted], 1).double())
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
    tokenizer, longest, counts = scorer.trained.tokenizer, scorer.model.config.max_seq_len, [0, 0, 0]
    seq_len = longest if seq_len is None else seq_len
    stride = max(1, seq_len // 2) if stride is None else stride
    require(1 <= seq_len <= longest, f"--seq-len is {seq_len}; expected 1 to {longest}, the model's max_seq_len")
    require(1 <= stride <= seq_len, f"--stride is {stride}; expected 1 to {seq_len}, the length of a window")

    def requests() -> Iterator[Request]:
        for texts in in_parts(documents, DOCUMENTS_AT_ONCE):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts)[0], strict=True):
                for i, count in enumerate((1, len(tokens), len(text.encode()))):
                    counts[i] += count
                yield from windows(tokens, tokenizer.eod_id, seq_len, stride)

    def nats() -> float:
        parts = in_parts(requests(), BATCHES_AT_ONCE * scorer.rows)
        return -sum(scorer.score(part)[:, 0].sum().item() for part in scorer.shown(parts, "scoring"))

    total = scorer.total(torch.tensor([together(nats)], dtype=torch.float64)).item()
    require(counts[1] > 0, f"{source} holds no token to score; expected text")
    loss, sizes = total / counts[1], dict(zip(("documents", "tokens", "bytes"), counts, strict=True))
    perplexity = math.inf if loss > 700 else math.exp(loss)  # exp(710) is beyond fp64
    bits = {"loss": loss, "perplexity": perplexity, "bits_per_byte": total / math.log(2) / counts[2]}
    return ready({"seq_len": seq_len, "stride": stride, **sizes, **bits})


def ready(record: Record) -> Record:
    """The record for JSON: a number that is not finite is the text "nan" or "inf"."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


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
        replace(path, json.dumps({**result, "versions": versions}, indent=1, default=float).encode())
