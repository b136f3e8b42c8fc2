"""The folder of prepared data that a config asks for."""

from __future__ import annotations

from pathlib import Path

from llm.config import RunConfig
from llm.data.corpus import source_name
from llm.data.manifest import FILE_NAME, Manifest, read_manifest
from llm.errors import require


def data_folder(config: RunConfig) -> Path:
    """The folder of the token shards: data.path, or data/<name of the source>-<vocab_size>."""
    if config.data.path is not None:
        return Path(config.data.path)
    return Path("data") / f"{source_name(config.data.source)}-{config.model.vocab_size}"


def load_manifest(config: RunConfig) -> Manifest:
    """The manifest of the data that `config` asks for; InputError says what does not fit."""
    folder = data_folder(config)
    require(
        (folder / FILE_NAME).exists(),
        f"{folder} holds no prepared data; run python launch/prepare_data.py --config <the same config>",
    )
    manifest = read_manifest(folder)
    check_vocabulary(config, manifest)
    return manifest


def check_vocabulary(config: RunConfig, manifest: Manifest) -> None:
    """Token ids of the data must be rows of the model's embedding."""
    require(
        manifest.vocab_size == config.model.vocab_size,
        f"the data in {data_folder(config)} has a vocabulary of {manifest.vocab_size}, "
        f"model.vocab_size is {config.model.vocab_size}; set the same or prepare other data",
    )
