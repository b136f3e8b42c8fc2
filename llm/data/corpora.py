"""Opens the corpora of a run, checks that they fit together, and identifies them by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm.config import RunConfig
from llm.data.samples.blend import BlendTable
from llm.data.samples.packing import read_header
from llm.data.samples.schedule import Curriculum, corpus_names
from llm.data.tokens.folder import copy_folder, data_folder, is_url, load_manifest
from llm.data.tokens.hashes import HashCheck
from llm.data.tokens.manifest import FILE_NAME, FileEntry, Manifest, locate, plan_name, read_manifest
from llm.data.tokens.shards import ShardList, inspect_files
from llm.errors import InputError, require


@dataclass(frozen=True)
class Corpus:
    """A training corpus as it lies on this machine."""

    shards: ShardList
    folder: Path | None
    """Of its manifest; None: token files without one."""
    manifest: Manifest | None


@dataclass(frozen=True)
class Corpora:
    """The data of a run, opened once in each process: every manifest is read once and passed on from here."""

    config: RunConfig
    folder: Path
    """Of data.path."""
    manifest: Manifest
    """Of `folder`: its tokenizer and validation split are the run's, whatever else is blended in."""
    training: dict[str, Corpus]
    """Every corpus that a phase trains on, by its name in the config and in the order of its number."""

    @classmethod
    def open(cls, config: RunConfig) -> Corpora:
        """Read the manifest of each corpus and, of token files without one, the headers.

        Raises InputError for a corpus that is not there, or not of the same tokens as data.path.
        """
        folder, own = data_folder(config), load_manifest(config)
        training = {name: _open_corpus(config, name, folder, own) for name in corpus_names(blends_of(config))}
        return cls(config, folder, own, training)

    @cached_property
    def blends(self) -> tuple[dict[str, float], ...]:
        """The weight of each corpus, phase by phase."""
        return blends_of(self.config)

    def curriculum(self, table: Callable[[Sequence[int]], BlendTable] = BlendTable) -> Curriculum:
        """What the run draws from its corpora, phase by phase; `table`: the form of BlendTable that is used.

        Raises InputError for a corpus without a sample of a phase's length, or without a packing plan for it.
        """
        return Curriculum(self.config.phases, self.blends, self._sample_count, table)

    def _sample_count(self, name: str, seq_len: int) -> int:
        """Samples in an epoch of a corpus: chunks, or the rows of its packing plan."""
        shards = self.training[name].shards
        if self.config.data.packing == "best_fit":
            return read_header(Path(shards.plan(seq_len))).rows
        return (shards.n_tokens - 1) // seq_len

    def identity(self, phases: int | None = None) -> dict[str, str]:
        """What tells apart the data that the first `phases` phases (default: all) train on.

        Keys are `tokenizer`, the corpora's names (`train` for data.path's own split, so that its folder may move) and
        `<name> <packing plan>`: a phase that is added later adds keys and changes none. Values are digests of the
        manifests' hashes. Of files without a manifest there are only the sizes to tell, and the value says so.
        """
        found = {"tokenizer": self.manifest.tokenizer_sha256}
        for name in corpus_names(self.blends[:phases]):
            corpus = self.training[name]
            key = "train" if corpus.folder == self.folder else name
            kind = [corpus.shards.format, corpus.shards.dtype, corpus.shards.eod_id]
            if corpus.manifest is None:
                found[key] = "sizes " + _digest([*kind, *corpus.shards.tokens])
                continue
            found[key] = _digest([*kind, *corpus.manifest.splits["train"].shards.sha256])
            for plan in self._plans(corpus.manifest, phases):
                found[f"{key} {plan}"] = corpus.manifest.files[plan].sha256
        return found

    def hashed_files(self) -> dict[str, FileEntry]:
        """Path, size and hash of the token files and packing plans of training; InputError without a manifest."""
        found = {}
        for name, corpus in self.training.items():
            if corpus.manifest is None or corpus.folder is None:
                raise InputError(
                    f"the files of {name} have no manifest, so their hashes are not known; "
                    "register them with prepare_data.py, or set data.verify=none"
                )
            trained = {*corpus.manifest.splits["train"].shards.paths, *self._plans(corpus.manifest)}
            entries = corpus.manifest.all_files()
            found |= {locate(corpus.folder, path): entry for path, entry in entries.items() if path in trained}
        return found

    def hash_check(self, dp_rank: int, dp_size: int) -> HashCheck | None:
        """The thread that compares this rank's share of `hashed_files` with their hashes, where data.verify asks so."""
        return None if self.config.data.verify == "none" else HashCheck(self.hashed_files(), dp_rank, dp_size)

    def _plans(self, manifest: Manifest, phases: int | None = None) -> list[str]:
        """The names of a corpus's packing plans that the first `phases` phases may read."""
        if self.config.data.packing != "best_fit":
            return []
        names = dict.fromkeys(plan_name("train", phase.seq_len) for phase in self.config.phases[:phases])
        return [name for name in names if name in manifest.files]


def blends_of(config: RunConfig) -> tuple[dict[str, float], ...]:
    """The corpora of each phase with their weights, in the order of their names: that of a mapping means nothing."""
    own = {config.data.path or str(data_folder(config)): 1.0}
    return tuple(dict(sorted((phase.blend or own).items())) for phase in config.phases)


def _open_corpus(config: RunConfig, name: str, own_folder: Path, own: Manifest) -> Corpus:
    """The corpus `name` of a run whose data.path is `own_folder`, with the manifest `own`."""
    folder = copy_folder(config, name) if is_url(name) else Path(name)
    if folder == own_folder:
        return Corpus(own.shard_list(folder, "train", name), folder, own)
    if (folder / FILE_NAME).exists():
        manifest = read_manifest(folder)
        for key in ("vocab_size", "eod_id", "tokenizer_sha256"):
            found, expected = getattr(manifest, key), getattr(own, key)
            require(
                found == expected,
                f"{name} and {own_folder} were tokenised differently: {key} {found} and {expected}; "
                "prepare them with the same data.tokenizer",
            )
        return Corpus(manifest.shard_list(folder, "train", name), folder, manifest)
    require(
        not is_url(name),
        f"{config.data.cache} holds no copy of {name}; run python launch/prepare_data.py --config <the same config>",
    )
    return Corpus(inspect_files(name, name, vocab_size=own.vocab_size, eod_id=own.eod_id), None, None)


def _digest(items: list) -> str:
    return hashlib.sha256("\n".join(map(str, items)).encode()).hexdigest()
