"""Packing plans of the corpora of a run: written ahead of training, beside the tokens, and listed in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llm.config import RunConfig
from llm.data.corpora import open_corpora
from llm.data.prepare.tokenise import Progress
from llm.data.samples.packing import write_plan
from llm.data.samples.schedule import blend_of
from llm.data.tokens.folder import lock
from llm.data.tokens.manifest import Manifest, file_entry, plan_name, read_manifest
from llm.errors import InputError


def write_plans(
    config: RunConfig, manifest: Manifest, progress: Progress = lambda stage, done, total: None
) -> list[Path]:
    """Write the packing plans that the run needs and does not have; returns their paths.

    Of every corpus for each sequence length that it is drawn in; none unless data.packing is best_fit. Validation
    has no plans: its samples are chunks. Raises InputError for a corpus without a manifest to list them.
    """
    return [_add_plan(folder, seq_len, progress) for folder, seq_len in _missing(config, manifest)]


def _missing(config: RunConfig, manifest: Manifest) -> Iterator[tuple[Path, int]]:
    """(folder, seq_len) of the plans to be written."""
    if config.data.packing != "best_fit":
        return
    corpora = open_corpora(config, manifest)
    wanted = {}
    for phase in config.phases:
        for name in blend_of(config, phase):
            corpus = corpora[name]
            if corpus.folder is None or corpus.manifest is None:
                raise InputError(
                    f"{name} has no manifest that could list its packing plans; register the files with prepare_data.py"
                )
            wanted[corpus.folder, phase.seq_len] = corpus.manifest
    for (folder, seq_len), listed in wanted.items():
        if plan_name("train", seq_len) not in listed.files:
            yield folder, seq_len


def _add_plan(folder: Path, seq_len: int, progress: Progress) -> Path:
    path = folder / plan_name("train", seq_len)
    with lock(folder):
        manifest = read_manifest(folder)  # again: another process may have added plans meanwhile
        if path.name not in manifest.files:
            shards = manifest.shard_list(folder, "train")
            write_plan(shards, seq_len, path, progress)
            dataclasses.replace(manifest, files=manifest.files | {path.name: file_entry(path)}).save(folder)
    return path
