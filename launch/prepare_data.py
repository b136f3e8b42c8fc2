"""Turns the text that a config names into token shards, once; training reads them.

usage: prepare_data.py [--config FILE] [--key=VALUE ...]      exit code 2: wrong config or input
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llm.config_cli import parse_config
from llm.data.folder import data_folder
from llm.data.manifest import Manifest
from llm.data.prepare import prepare
from llm.errors import InputError

REDRAW_BYTES = 1 << 18  # text between updates of the bar, so that drawing costs nothing


class Bar:
    """Shows the stages of prepare() as one progress bar on stderr."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None)
        self._stage, self._drawn = "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or abs(done - self._drawn) >= REDRAW_BYTES or done == total:
            self._progress.update(self._task, description=stage, completed=done, total=total or None)
            self._stage, self._drawn = stage, done


def summary(folder: Path, manifest: Manifest) -> str:
    """What was prepared, in a few lines."""
    lines = [f"{folder}: {manifest.source}, vocabulary {manifest.vocab_size}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name:10}  {split.tokens:,} tokens ({split.shards.dtype})  {split.documents:,} documents"
            + (f"  {split.bytes:,} bytes  {split.bytes / split.tokens:.3f} bytes per token" if split.bytes else "")
        )
    loss = manifest.bigram_nats_per_token
    if loss is not None:
        lines.append(
            f"  interpolated bigram model on the validation samples of {manifest.bigram_seq_len}: "
            f"{loss:.4f} nats per token, {manifest.bits_per_byte(loss):.4f} bits per byte"
        )
    return "\n".join(lines)


def main() -> int:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    try:
        config = parse_config(prog="prepare_data.py")
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            manifest = prepare(config, Bar(progress))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(data_folder(config), manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
