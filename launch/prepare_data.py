"""Turns the text that a config names into token shards, once; training reads them.

usage: prepare_data.py [COMMAND] [--config FILE] [--key=VALUE ...]      exit code 2: wrong config, input or data

without a command   tokenise data.source, unless that is done; copy remote corpora, write packing plans
register            write a manifest for token files made elsewhere: --train=GLOB [--validation=GLOB] [--dtype=int32]
verify              read every file of the run's corpora and say which are damaged
show                where a sample of the run comes from, and its text: --sample=N
stats               tokens, documents and their lengths, padding and epochs of the run's corpora

With a corpus's config (`prepare_data.py all --help`), from raw pages on; finished work is not repeated:

extract             read archives, HTML, JSON lines, tables or text, and keep the pages' text
filter              leave out documents by the rules of the config
dedup               leave out all but the first of documents that are equal or nearly so
tokenizer           learn the merges, or take the tokenizer that is given
tokenize            write the folder that pretrain.py data.path=OUT/tokens trains on
all                 all of these, each unless it is done; --limit=N reads N records, to try it
report              write OUT/report.html: what is left after each stage, what went and why
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from llm.cluster.script import run_alone
from llm.errors import require

OPTIONS = {"prepare": [], "register": ["train", "validation", "dtype"], "verify": [], "show": ["sample"], "stats": []}
CORPUS_COMMANDS = ("extract", "filter", "dedup", "tokenizer", "tokenize", "all", "report")


def main(argv: list[str]) -> None:
    require(bool(argv), "no config is given, such as --config launch/configs/tiny-cpu.yaml; --help lists all")
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "prepare"
    if command in CORPUS_COMMANDS:
        from llm.crawl.chain import main as run_corpus

        run_corpus(command, argv)
        return
    commands = ", ".join((*OPTIONS, *CORPUS_COMMANDS))
    require(command in OPTIONS, f"unknown command {command!r}; expected one of {commands}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS[command]:
        parser.add_argument(f"--{option}")
    options, rest = parser.parse_known_args(argv)
    if {"--help", "-h"} & set(rest):
        print(__doc__)
    from llm.config.parse import parse_config

    config = parse_config(rest, prog="prepare_data.py")
    from llm.data.prepare.commands import run

    run(command, vars(options), config)


if __name__ == "__main__":
    run_alone(main)
