"""The training corpora of a run: where their files lie, that they fit together, and what tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.config import RunConfig
from llm.data.samples.blend import BlendTable
from llm.data.samples.packing import read_header
from llm.data.samples.schedule import Curriculum, Table, corpus_names
from llm.data.tokens.folder import copy_folder, data_folder, is_url
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


def open_corpora(config: RunConfig, manifest: Manifest) -> dict[str, Corpus]:
    """Every corpus that a phase of the run trains on, by its name in the config and in the order of its number.

    `manifest` is that of data_folder(config). Reads the manifests of the other corpora and, of token files without
    one, the headers.

    Raises:
        InputError: a corpus that is not there, or not of the same tokens as data.path.
    """
    corpora = {}
    for name in corpus_names(config):
        found = _open(config, manifest, name)
        if found.manifest is not None:
            _check_same_tokens(name, found.manifest, data_folder(config), manifest)
        corpora[name] = found
    return corpora


def training_corpora(config: RunConfig, manifest: Manifest) -> dict[str, ShardList]:
    """The token files of every corpus that a phase of the run trains on; otherwise as `open_corpora`."""
    return {name: corpus.shards for name, corpus in open_corpora(config, manifest).items()}


def _open(config: RunConfig, manifest: Manifest, name: str) -> Corpus:
    folder = copy_folder(config, name) if is_url(name) else Path(name)
    if folder == data_folder(config):
        return Corpus(manifest.shard_list(folder, "train", name), folder, manifest)
    if (folder / FILE_NAME).exists():
        own = read_manifest(folder)
        return Corpus(own.shard_list(folder, "train", name), folder, own)
    require(
        not is_url(name),
        f"{config.data.cache} holds no copy of {name}; run python launch/prepare_data.py --config <the same config>",
    )
    return Corpus(inspect_files(name, name, vocab_size=manifest.vocab_size, eod_id=manifest.eod_id), None, None)


def _check_same_tokens(name: str, found: Manifest, folder: Path, expected: Manifest) -> None:
    for key in ("vocab_size", "eod_id", "tokenizer_sha256"):
        one, other = getattr(found, key), getattr(expected, key)
        require(
            one == other,
            f"{name} and {folder} were tokenised differently: {key} {one} and {other}; "
            "prepare them with the same data.tokenizer",
        )


def packing_plan(shards: ShardList, seq_len: int) -> str:
    """The path of the corpus's packing plan for this length; InputError when there is none."""
    if seq_len not in shards.plans:
        raise InputError(
            f"{shards.name} has no packing plan for samples of {seq_len} tokens; "
            "run python launch/prepare_data.py --config <the same config>"
        )
    return shards.plans[seq_len]


def curriculum_of(
    config: RunConfig, corpora: Mapping[str, ShardList], table: Callable[[Sequence[int]], Table] = BlendTable
) -> Curriculum:
    """What the run draws from its corpora, phase by phase; `table`: the form of BlendTable that is used.

    Raises:
        InputError: a corpus without a sample of a phase's length, or without a packing plan for it.
    """
    return Curriculum(config, lambda name, seq_len: _sample_count(config, corpora[name], seq_len), table)


def _sample_count(config: RunConfig, shards: ShardList, seq_len: int) -> int:
    """Samples in an epoch of a corpus: chunks, or the rows of its packing plan."""
    if config.data.packing == "best_fit":
        return read_header(Path(packing_plan(shards, seq_len))).rows
    return (shards.n_tokens - 1) // seq_len


def hashed_files(config: RunConfig, manifest: Manifest) -> dict[str, FileEntry]:
    """Path, size and hash of every token file and packing plan that the run trains on.

    Raises:
        InputError: a corpus without a manifest, of which no hash is known.
    """
    found = {}
    for name, corpus in open_corpora(config, manifest).items():
        if corpus.manifest is None or corpus.folder is None:
            raise InputError(
                f"the files of {name} have no manifest, so their hashes are not known; "
                "register them with prepare_data.py, or set data.verify=none"
            )
        used = {*corpus.manifest.splits["train"].shards.paths, *_plans(config, corpus.manifest)}
        entries = corpus.manifest.all_files()
        found |= {locate(corpus.folder, path): entry for path, entry in entries.items() if path in used}
    return found


def _plans(config: RunConfig, manifest: Manifest) -> list[str]:
    """The names of a corpus's packing plans that the run may read."""
    if config.data.packing != "best_fit":
        return []
    names = dict.fromkeys(plan_name("train", phase.seq_len) for phase in config.phases)
    return [name for name in names if name in manifest.files]


def data_identity(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """What tells training data apart, of each corpus and of the tokenizer that gives the ids meaning.

    Keys are `tokenizer`, the corpora's names (`train` for data.path's own split, so that its folder may move) and
    `<name> <packing plan>`: a phase that is added later adds keys and changes none. Values are digests of the
    manifests' hashes. Of files without a manifest there are only the sizes to tell, and the value says so.
    """
    found = {"tokenizer": manifest.tokenizer_sha256}
    for name, corpus in open_corpora(config, manifest).items():
        key = "train" if corpus.folder == data_folder(config) else name
        shards = corpus.shards
        kind = [shards.format, shards.dtype, shards.eod_id]
        if corpus.manifest is None:
            found[key] = "sizes " + _digest([*kind, *shards.tokens])
            continue
        found[key] = _digest([*kind, *corpus.manifest.splits["train"].shards.sha256])
        for plan in _plans(config, corpus.manifest):
            found[f"{key} {plan}"] = corpus.manifest.files[plan].sha256
    return found


def _digest(items: list) -> str:
    return hashlib.sha256("\n".join(map(str, items)).encode()).hexdigest()
