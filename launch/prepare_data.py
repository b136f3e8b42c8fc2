"""Turns the text that a config names into token shards, once; training reads them.

usage: prepare_data.py [COMMAND] [--config FILE] [--key=VALUE ...]      exit code 2: wrong config, input or data

without a command   tokenise data.source, unless that is done; copy remote corpora, write packing plans
register            write a manifest for token files made elsewhere: --train=GLOB [--validation=GLOB] [--dtype=int32]
verify              read every file of the run's corpora and say which are damaged
show                where a sample of the run comes from, and its text: --sample=N
stats               tokens, documents and their lengths, padding and epochs of the run's corpora
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from llm.cluster.script import run_alone
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.errors import require

OPTIONS = {"prepare": [], "register": ["train", "validation", "dtype"], "verify": [], "show": ["sample"], "stats": []}


def run(command: str, options: dict[str, str], config: RunConfig) -> None:
    """Do what `command` says and print what came of it."""
    from llm.data.corpora import Corpora
    from llm.data.prepare.console import describe, prepare_all, progress_bar, summary
    from llm.data.prepare.damage import find_damage
    from llm.data.prepare.inspect import show, statistics
    from llm.data.prepare.register import register
    from llm.data.tokens.folder import data_folder

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


def main(argv: list[str]) -> None:
    require(bool(argv), "no config is given, such as --config launch/configs/tiny-cpu.yaml; --help lists all")
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "prepare"
    require(command in OPTIONS, f"unknown command {command!r}; expected one of {', '.join(OPTIONS)}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS[command]:
        parser.add_argument(f"--{option}")
    options, rest = parser.parse_known_args(argv)
    if {"--help", "-h"} & set(rest):
        print(__doc__)
    run(command, vars(options), parse_config(rest, prog="prepare_data.py"))


if __name__ == "__main__":
    run_alone(main)
