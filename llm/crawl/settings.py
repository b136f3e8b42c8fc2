"""A corpus is one YAML file plus `--section.key=value` overrides, parsed once into these frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llm.config.sections import check_at_least
from llm.crawl.dedup.settings import DedupConfig
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.filter.settings import FilterConfig
from llm.crawl.tokens.settings import TokenizeConfig, TokenizerConfig


@dataclass(frozen=True)
class InputConfig:
    """The raw pages."""

    source: str = ""
    """A file, folder or glob, or a URL of these that fsspec opens, such as s3://bucket/crawl/*.warc.gz."""
    limit: int | None = None
    """Read this many records, spread over the first files, to try a chain; null: all."""

    def __post_init__(self) -> None:
        check_at_least(1, "input.", self, "limit")


@dataclass(frozen=True)
class EngineConfig:
    """What runs the tasks. The output does not depend on it."""

    kind: Literal["local", "mpi", "datatrove"] = "local"
    """Processes of this machine; the ranks of mpirun; or an executor of datatrove."""
    workers: int | None = None
    """Processes, or tasks at a time of a datatrove executor; null: the cores of this machine. mpi: its ranks."""
    schedule: Literal["dynamic", "striped"] = "dynamic"
    """mpi: rank 0 gives each other rank its next task, or each of n ranks takes every n-th task."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """datatrove: its executor."""
    options: dict[str, Any] = field(default_factory=dict)
    """datatrove: further arguments of the executor, such as {partition: cpu, time: '2:00:00'} for slurm."""

    def __post_init__(self) -> None:
        check_at_least(1, "engine.", self, "workers")


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus, whole."""

    out: str = ""
    """Folder of everything that is made: one folder per stage, and report.html."""
    input: InputConfig = field(default_factory=InputConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
