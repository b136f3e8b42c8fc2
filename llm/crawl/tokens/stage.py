"""Token shards are made in three steps: the tokenizer; the tokens of each part; the folder that a run trains on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llm.crawl.counts import Counts
from llm.crawl.tasks import Task
from llm.crawl.tokens.encode import Encoder
from llm.crawl.tokens.settings import TokenizeConfig, TokenizerConfig
from llm.crawl.tokens.shards import join, write_part
from llm.crawl.tokens.train import sample, train
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError
from llm.files import complete_file, sha256_of

TOKENIZER = ".tokenizer.json"  # ends the name of the first step's output


@dataclass(frozen=True)
class TokenizerSettings:
    """What the tokenizer depends on. Not tokenize.library: all give the same."""

    tokenizer: TokenizerConfig
    sha256: str | None
    """Of the file, where one is given."""
    validation_fraction: float


@dataclass(frozen=True)
class TokenSettings:
    """What the tokens depend on beside the tokenizer."""

    end_token: str | int | None
    validation_fraction: float


class TrainTokenizer:
    """A step of all parts at once: 00000.tokenizer.json. Its inputs: the parts without duplicates."""

    name, version = "tokenizer", 1

    def __init__(self, tokenizer: TokenizerConfig, tokenize: TokenizeConfig) -> None:
        """Raises InputError where tokenizer.path cannot be read."""
        try:
            sha256 = None if tokenizer.path is None else sha256_of(tokenizer.path)
        except OSError as error:
            raise InputError(f"tokenizer.path {tokenizer.path} cannot be read: {error}") from error
        self.settings = TokenizerSettings(tokenizer, sha256, tokenize.validation_fraction)
        self._library = tokenize.library

    def write(self, task: Task, counts: Counts) -> None:
        config = self.settings.tokenizer
        if config.path is None:
            texts = sample(task.inputs, config.max_bytes, self.settings.validation_fraction, counts)
            tokenizer = train(config, texts, self._library, task.folder)
        else:
            tokenizer = Tokenizer.load(Path(config.path), config.end_token)
        with complete_file(task.path(TOKENIZER)) as file:
            file.write(tokenizer.raw)


class Tokenize:
    """A step of a part: its token files. Its inputs: the part, and the tokenizer."""

    name, version = "tokenize", 1

    def __init__(self, tokenizer: TokenizerConfig, tokenize: TokenizeConfig) -> None:
        self.settings = TokenSettings(tokenizer.end_token, tokenize.validation_fraction)
        self._encoder = cache(
            lambda path: Encoder(Tokenizer.load(path, self.settings.end_token), tokenize.library)
        )  # which a process has for all its tasks

    def write(self, task: Task, counts: Counts) -> None:
        part, tokenizer = task.inputs
        write_part(task, part, self._encoder(tokenizer), self.settings.validation_fraction, counts)


class Join:
    """A step of all parts at once: the token files of both splits, manifest.json and provenance.json.

    Its inputs: the tokenizer, then the reports of Tokenize.
    """

    name, version = "tokens", 1

    def __init__(self, tokenizer: TokenizerConfig, tokenize: TokenizeConfig) -> None:
        self.settings = TokenSettings(tokenizer.end_token, tokenize.validation_fraction)
        self._origin = TrainTokenizer(tokenizer, tokenize).settings.sha256 or "train"

    def write(self, task: Task, counts: Counts) -> None:
        tokenizer = Tokenizer.load(task.inputs[0], self.settings.end_token)
        join(task, task.inputs[1:], tokenizer, self._origin, counts)
