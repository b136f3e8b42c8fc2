"""Opens the corpora of a run, checks that they fit together, and says what tells their contents apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llm.config import RunConfig
from llm.data.samples.blend import BlendTable
from llm.data.samples.packing import read_header
from llm.data.samples.schedule import Curriculum, corpus_names
from llm.data.tokens.folder import copy_folder, data_folder, is_url, load_manifest, open_folder
from llm.data.tokens.hashes import CHECKED_FILES, HashCheck, sampled_hash
from llm.data.tokens.manifest import FILE_NAME, FileEntry, Manifest, locate, plan_name
from llm.data.tokens.shards import Say, ShardList, has_documents, inspect_files
from llm.errors import InputError, require


@dataclass(frozen=True)
class Corpus:
    """A training corpus as it lies on this machine."""

    shards: ShardList
    folder: Path | None
    """Of its manifest; None: token files without one."""
    manifest: Manifest | None

    @cached_property
    def digest(self) -> str:
        """Tells its contents apart: by the manifest's hashes, or by a part of files without one (`sampled_hash`)."""
        if self.manifest is None:
            return self._digest("sampled ", [sampled_hash(self.shards.paths)])
        return self._digest("", self.manifest.splits["train"].shards.sha256)

    def check_sample(self) -> None:
        """Read a part of the first files; InputError if it is not what it was when the manifest was written."""
        known = self.manifest and self.manifest.splits["train"].shards.sampled
        if known and sampled_hash(self.shards.paths[:CHECKED_FILES]) != known:
            raise InputError(f"the token files of {self.shards.name} changed under their manifest; restore them")

    def is_known_as(self, digest: str) -> bool:
        """Whether a checkpoint says `digest` of these contents. 0.1.0 said sizes alone of files without a manifest."""
        return digest == (self._digest("sizes ", self.shards.tokens) if digest.startswith("sizes ") else self.digest)

    def _digest(self, kind: str, items: Sequence[object]) -> str:
        told = [self.shards.format, self.shards.dtype, self.shards.eod_id, *items]
        return kind + hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()


class Known(NamedTuple):
    """What a checkpoint keeps of a corpus."""

    name: str
    """In the checkpoint's config."""
    digest: str
    plans: dict[str, str]
    """Packing plan -> SHA-256."""


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
    first_names: dict[str, str]
    """What the run called each corpus at first: their order, wherever they lie now."""

    @classmethod
    def open(cls, config: RunConfig, say: Say = lambda line: None) -> Corpora:
        """Read the manifest of each corpus and, of token files without one, the headers and what `sampled_hash` reads.

        `say` gets what the user should know. Raises InputError for a corpus that is not there, not of the same tokens
        as data.path, or without the documents that data.document_masks asks for.
        """
        folder, own = data_folder(config), load_manifest(config)
        training = {name: _open_corpus(config, name, folder, own, say) for name in corpus_names(blends_of(config))}
        if config.data.document_masks:
            _check_documents(training, own)
        corpora = cls(config, folder, own, training, {name: name for name in training})
        corpora.identity()  # reads what tells files without a manifest apart, now and not in the middle of a run
        return corpora

    @cached_property
    def blends(self) -> tuple[dict[str, float], ...]:
        """The weight of each corpus, phase by phase, in the order of first names."""
        first_name = lambda item: self.first_names[item[0]]  # noqa: E731
        return tuple(dict(sorted(blend.items(), key=first_name)) for blend in blends_of(self.config))

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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run's data: the tokenizer's hash, and a Known of each corpus by first name."""
        corpora = {self.first_names[name]: self.known(name)._asdict() for name in self.training}
        return {"tokenizer": self.manifest.tokenizer_sha256, "corpora": corpora}

    def known(self, name: str, phases: int | None = None) -> Known:
        """What there is to know of a corpus, and of its packing plans for the first `phases` phases (default: all)."""
        corpus = self.training[name]
        files = {} if corpus.manifest is None else corpus.manifest.files
        plans = dict.fromkeys(plan_name("train", phase.seq_len) for phase in self.config.phases[:phases])
        packed = self.config.data.packing == "best_fit"
        return Known(name, corpus.digest, {plan: files[plan].sha256 for plan in plans if packed and plan in files})

    def hashed_files(self) -> dict[str, FileEntry]:
        """Path, size and hash of the token files and packing plans of training; InputError without a manifest."""
        found = {}
        for name, corpus in self.training.items():
            if corpus.manifest is None or corpus.folder is None:
                raise InputError(
                    f"the files of {name} have no manifest, so their hashes are not known; "
                    "register them with prepare_data.py, or set data.verify=blocks"
                )
            trained = {*corpus.manifest.splits["train"].shards.paths, *self.known(name).plans}
            entries = corpus.manifest.all_files()
            found |= {locate(corpus.folder, path): entry for path, entry in entries.items() if path in trained}
        return found

    def hash_check(self, dp_rank: int, dp_size: int) -> HashCheck | None:
        """The thread that compares this rank's share of `hashed_files` with their hashes, where data.verify asks so."""
        wanted = self.config.data.verify == "background"
        return HashCheck(self.hashed_files(), dp_rank, dp_size) if wanted else None


def blends_of(config: RunConfig) -> tuple[dict[str, float], ...]:
    """The corpora of each phase with their weights, in the order of their names: that of a mapping means nothing."""
    own = {config.data.path or str(data_folder(config)): 1.0}
    return tuple(dict(sorted((phase.blend or own).items())) for phase in config.phases)


def unprepared(config: RunConfig) -> list[Path]:
    """The files that prepare_data.py has still to write for the run: manifests, then packing plans."""
    blends = blends_of(config)
    remote = [copy_folder(config, name) for name in corpus_names(blends) if is_url(name)]
    missing = [path for folder in (data_folder(config), *remote) if not (path := folder / FILE_NAME).exists()]
    packed = zip(config.phases, blends, strict=True) if config.data.packing == "best_fit" else ()
    for phase, blend in packed:
        folders = [_folder(config, name) for name in blend]
        plans = [folder / plan_name("train", phase.seq_len) for folder in folders if (folder / FILE_NAME).exists()]
        missing += [plan for plan in plans if not plan.exists()]
    return missing


def require_prepared(config: RunConfig, command: str) -> None:
    """Raise InputError, which tells of `command`, unless the data is prepared."""
    missing = unprepared(config)
    found = f"the data is not prepared: there is no {missing[0].absolute()}" if missing else ""
    require(not missing, f"{found}; add --prepare to this command, or run {command}")


def _folder(config: RunConfig, name: str) -> Path:
    """Where the corpus `name` of a config lies."""
    return copy_folder(config, name) if is_url(name) else Path(name)


def _open_corpus(config: RunConfig, name: str, own_folder: Path, own: Manifest, say: Say) -> Corpus:
    """The corpus `name` of a run whose data.path is `own_folder`, with the manifest `own`."""
    folder, sums = _folder(config, name), config.data.verify != "none"
    if folder == own_folder:
        return Corpus(own.shard_list(folder, "train", name, sums=sums), folder, own)
    if (folder / FILE_NAME).exists():
        manifest = open_folder(folder)
        for key in ("vocab_size", "eod_id", "tokenizer_sha256"):
            found, expected = getattr(manifest, key), getattr(own, key)
            require(
                found == expected,
                f"{name} and {own_folder} were tokenised differently: {key} {found} and {expected}; "
                "prepare them with the same data.tokenizer",
            )
        return Corpus(manifest.shard_list(folder, "train", name, sums=sums), folder, manifest)
    require(
        not is_url(name),
        f"{config.data.cache} holds no copy of {name}; run python launch/prepare_data.py --config <the same config>",
    )
    return Corpus(inspect_files(name, name, vocab_size=own.vocab_size, eod_id=own.eod_id, say=say), None, None)


def _check_documents(training: dict[str, Corpus], own: Manifest) -> None:
    """Refuse corpora, and a validation split, in which no token tells where documents end."""
    told = {"the validation split": own.splits["validation"].documents}
    for name, corpus in training.items():
        told[name] = corpus.manifest.splits["train"].documents if corpus.manifest else has_documents(corpus.shards)
    require(
        all(told.values()),
        f"documents of {', '.join(name for name in told if not told[name])} cannot be told apart: no token ends them "
        "(of files that are not registered, the first million is looked at); set data.document_masks=false and "
        "data.packing=chunk, or tokenise with an end-of-document token",
    )
