"""The commands of prepare_data.py on a run's corpora."""

from __future__ import annotations

from llm.config import RunConfig
from llm.data.corpora import Corpora
from llm.data.prepare.console import describe, prepare_all, summary
from llm.data.prepare.damage import find_damage
from llm.data.prepare.inspect import show, statistics
from llm.data.prepare.register import register
from llm.data.tokens.folder import data_folder
from llm.errors import require
from llm.progress import progress_bar


def run(command: str, options: dict[str, str], config: RunConfig) -> None:
    """Do what `command` says and print what came of it. Raises InputError."""
    if command == "prepare":
        print(prepare_all(config))
    elif command == "register":
        require("train" in options, "register needs --train=GLOB")
        notes, dtype = list[str](), options.pop("dtype", None)
        with progress_bar() as bar:
            manifest = register(config, options, bar, notes.append, raw_dtype=dtype)
        print("\n".join([summary(data_folder(config), manifest, config.model.vocab_size), *notes]))
    elif command == "verify":
        with progress_bar() as bar:
            damage = find_damage(Corpora.open(config), bar)
        require(not damage, "\n".join(damage))
        print("no file is damaged")
    elif command == "show":
        require(options.get("sample", "").isdecimal(), "show needs --sample=N, the number of a sample from 0 on")
        print(show(Corpora.open(config), int(options["sample"])))
    else:
        print("\n\n".join(map(describe, statistics(Corpora.open(config)))))
