"""Reads every byte of the corpora of a run, to say what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm.data.corpora import Corpora
from llm.data.prepare.register import TokenCounts, scan_file
from llm.data.prepare.tokenise import Progress
from llm.data.samples.packing import NumpyPackPlan
from llm.data.tokens.hashes import check_hash
from llm.data.tokens.headers import index_path
from llm.data.tokens.manifest import locate
from llm.data.tokens.shards import ShardList, check_file
from llm.errors import InputError


def find_damage(corpora: Corpora, progress: Progress = lambda stage, done, total: None) -> list[str]:
    """What is wrong with the files of the run's corpora, the validation split included: a message for each file.

    Of files that a manifest lists, sizes and hashes are compared with it; of others every id is looked at. Indexes
    are read whole, and headers of packing plans.
    """
    training = corpora.training.values()
    listed = {corpora.folder: corpora.manifest}
    listed |= {c.folder: c.manifest for c in training if c.folder is not None and c.manifest is not None}
    bare = [c.shards for c in training if c.manifest is None]
    checks = _Checks(progress)
    checks.total = sum(entry.bytes for known in listed.values() for entry in known.all_files().values())
    checks.total += sum(Path(path).stat().st_size for shards in bare for path in shards.paths)
    for folder, known in listed.items():
        for name, entry in known.all_files().items():
            path = locate(folder, name)
            checks.run(path, check_hash, path, entry, checks.count)
        for split in known.splits:
            shards = known.shard_list(folder, split)
            checks.structure(shards)
            for seq_len, plan in shards.plans.items():
                checks.run(plan, NumpyPackPlan, Path(plan), seq_len, shards.n_tokens)
    for shards in bare:
        checks.structure(shards)
        counts = TokenCounts(shards)
        for path in shards.paths:
            checks.run(path, scan_file, counts, path, checks.count)
    return list(checks.found.values())


class _Checks:
    """Runs checks and keeps what the first that failed said of each file."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self.total = progress, 0, 0
        self.found: dict[str, str] = {}

    def count(self, n: int) -> None:
        self._done += n
        self._progress("verifying", self._done, self.total)

    def run(self, path: str, check: Callable[..., object], *arguments: object) -> None:
        if path not in self.found:
            try:
                check(*arguments)
            except InputError as error:
                self.found[path] = str(error)

    def structure(self, shards: ShardList) -> None:
        """Headers and indexes; nothing more of a token file whose index is known to be damaged."""
        for path, tokens in zip(shards.paths, shards.tokens, strict=True):
            if index_path(path, shards.format) not in self.found:
                self.run(path, check_file, path, shards.format, shards.dtype, tokens)
