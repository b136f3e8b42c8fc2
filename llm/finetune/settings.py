"""The config of a fine-tuning run: its model and tokenizer are those of train.init_from, unless they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.config import RunConfig
from llm.config.parse import parse_config, to_dict
from llm.errors import CheckpointError, InputError, require


def finetune_config(argv: Sequence[str]) -> RunConfig:
    """As parse_config, for launch/finetune.py. Raises InputError too unless train.init_from names what can be read."""
    config = parse_config(argv, prog="finetune.py", complete=from_source)
    require(config.finetune.task != "none", "finetune.task is none; set --finetune.task=continue, chat or classify")
    expected = "expected the run, the checkpoint or the Hugging Face folder to go on from"
    require(config.train.init_from is not None, f"train.init_from is not set; {expected}")
    return config


def from_source(mapping: dict[str, Any]) -> dict[str, Any]:
    """What a config file and overrides say, with the model and the tokenizer of train.init_from where they say none."""
    train, model, data = (mapping.get(section) or {} for section in ("train", "model", "data"))
    if not all(isinstance(section, dict) for section in (train, model, data)) or not train.get("init_from"):
        return mapping
    # Here, for they import torch: what is wrong with the arguments is said before.
    from llm.checkpoint.convert import open_hf
    from llm.checkpoint.reader import find_named, load_manifest, open_checkpoint, own_tokenizer
    from llm.train.resume import saved_config

    path = Path(str(train["init_from"])).absolute()
    try:
        if (path / "config.json").is_file():
            source = open_hf(path)
            found, tokenizer, end = to_dict(source.config), path / "tokenizer.json", source.end
        else:
            folder, _ = find_named(path.resolve(), check=load_manifest)  # `start` looks at every byte
            reader = open_checkpoint(folder)
            saved, tokenizer = to_dict(saved_config(reader.state)), own_tokenizer(reader)
            found, end = saved["model"], saved["data"].get("end_token")
    except (CheckpointError, InputError) as error:
        raise InputError(f"train.init_from: {error}") from error
    if tokenizer is not None and "tokenizer" not in data:
        data = {"tokenizer": str(tokenizer), "end_token": end} | data
    return mapping | {"model": found | model, "data": data}
