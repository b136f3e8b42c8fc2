"""Prints for prepare_data.py: the contents of a folder, the statistics of corpora."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llm.config import RunConfig
from llm.data.prepare.fetch import fetch_corpora
from llm.data.prepare.inspect import Statistics
from llm.data.prepare.plans import write_plans
from llm.data.prepare.tokenise import prepare
from llm.data.tokens.folder import data_folder
from llm.data.tokens.manifest import Manifest, TextCounts
from llm.progress import progress_bar

WIDEST_BAR = 40


def prepare_all(config: RunConfig, poll: Callable[[], object] = lambda: None) -> str:
    """Copy remote corpora, tokenise data.source, write packing plans, unless that is done; `summary` of data.path.

    poll: called all along; what it raises ends the work, which goes on, or begins anew, at the next call.
    """
    with progress_bar() as shown:

        def bar(stage: str, done: int, total: int) -> None:
            poll()
            shown(stage, done, total)

        fetch_corpora(config, bar)
        manifest = prepare(config, bar)
        write_plans(config, bar)
    return summary(data_folder(config), manifest, config.model.vocab_size)


def summary(folder: Path, manifest: Manifest, vocab_size: int) -> str:
    """What a folder of data holds, in a few lines; vocab_size: of the model."""
    padded = f", padded to {vocab_size} (model.vocab_size)" if vocab_size > manifest.vocab_size else ""
    lines = [f"{folder}: {manifest.source}, vocabulary {manifest.vocab_size}{padded}"]
    for name, split in manifest.splits.items():
        shards, size = split.shards, ""
        documents = f"{split.documents:,} documents" if split.documents else "documents not told apart"
        if split.bytes:
            size = f"  {split.bytes:,} bytes  {split.bytes / split.tokens:.3f} bytes per token"
        lines.append(
            f"  {name:10}  {split.tokens:,} tokens  {documents}{size}  "
            f"({len(shards.paths):,} x {shards.format} {shards.dtype})"
        )
    text, fraction = manifest.text or TextCounts(), manifest.validation_fraction or 0
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in Counter(text.others).most_common(5))
    notes = [
        text.inside and f"too few documents to choose from: the last {fraction:.3%} of each are for validation",
        text.empty and f"{text.empty:,} documents without text, passed over",
        text.others and f"{sum(text.others.values()):,} other files, passed over: {kinds}",
        text.cut_words and f"{text.cut_words:,} words too long for the tokenizer, cut",
    ]
    lines += [f"  {note}" for note in notes if note]
    loss = manifest.bigram_nats_per_token
    if loss is not None:
        lines.append(
            f"  interpolated bigram model on the validation samples of {manifest.bigram_seq_len}: "
            f"{loss:.4f} nats per token, {manifest.bits_per_byte(loss):.4f} bits per byte"
        )
    return "\n".join(lines)


def describe(found: Statistics) -> str:
    """The statistics of a corpus, in a few lines, and its documents by length."""
    shards, lengths = found.shards, found.lengths
    low, median, p95, high = (f"{lengths.quantile(share):,}" for share in (0, 0.5, 0.95, 1))
    lines = [
        f"{shards.name}: {shards.n_tokens:,} tokens  {lengths.documents:,} documents  "
        f"({len(shards.paths):,} x {shards.format} {shards.dtype})  {found.epochs:.3f} epochs in this run",
        f"  tokens of a document: min {low}  median {median}  mean {lengths.mean:,.1f}  p95 {p95}  max {high}",
    ]
    lines += [f"  padding of samples of {seq_len}: {share:.3%}" for seq_len, share in found.padding.items()]
    rows = lengths.histogram()
    largest = max(count for _, _, count in rows)
    edge, number = len(f"{rows[-1][1]:,}"), len(f"{largest:,}")
    for least, most, count in rows:
        bar = "#" * -(-WIDEST_BAR * count // largest)
        lines.append(f"  {least:>{edge},} to {most:<{edge},} {count:>{number},} {bar}".rstrip())
    return "\n".join(lines)
