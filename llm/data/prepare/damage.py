"""Reads every byte of the corpora of a run and says what is damaged."""

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
    total = sum(entry.bytes for manifest in listed.values() for entry in manifest.all_files().values())
    total += sum(Path(path).stat().st_size for shards in bare for path in shards.paths)
    found: dict[str, str] = {}
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("verifying", done, total)

    def run(path: str, check: Callable[..., object], *arguments: object) -> None:
        """Keep what the first check that a file fails says of it."""
        if path not in found:
            try:
                check(*arguments)
            except InputError as error:
                found[path] = str(error)

    def check_structure(shards: ShardList) -> None:
        """Headers and indexes; nothing more of a token file whose index is known to be damaged."""
        for path, tokens in zip(shards.paths, shards.tokens, strict=True):
            if index_path(path, shards.format) not in found:
                run(path, check_file, path, shards.format, shards.dtype, tokens)

    for folder, manifest in listed.items():
        for name, entry in manifest.all_files().items():
            path = locate(folder, name)
            run(path, check_hash, path, entry, count)
        for split in manifest.splits:
            shards = manifest.shard_list(folder, split)
            check_structure(shards)
            for seq_len, plan in shards.plans.items():
                run(plan, NumpyPackPlan, Path(plan), seq_len, shards.n_tokens)
    for shards in bare:
        check_structure(shards)
        counts = TokenCounts(shards)
        for path in shards.paths:
            run(path, scan_file, counts, path, count)
    return list(found.values())
