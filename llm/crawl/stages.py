"""The stages from raw pages to token shards, in their order, and what each reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm.crawl.settings import CorpusConfig
    from llm.crawl.tasks import Work


@dataclass(frozen=True)
class Link:
    """A stage, by the name that its folder has too, and the stages that it reads."""

    stage: str
    command: str
    each: str | None = None
    """A task of that stage is a task of this one; None: this one is one task."""
    whole: tuple[str, ...] = ()
    """Stages of which every task reads all output."""
    output: str = ".parquet"
    """What follows NNNNN in the name of a task's output; of a stage that is one task also a whole name."""


CHAIN = (
    Link("extract", "extract"),
    Link("filter", "filter", each="extract"),
    Link("signatures", "dedup", each="filter", output=".signatures"),
    Link("cluster", "dedup", whole=("signatures", "filter"), output="clusters.parquet"),
    Link("dedup", "dedup", each="filter", whole=("cluster",)),
    Link("tokenizer", "tokenizer", whole=("dedup",), output=".tokenizer.json"),
    Link("tokenize", "tokenize", each="dedup", whole=("tokenizer",), output=".json"),
    Link("tokens", "tokenize", whole=("tokenizer", "tokenize"), output="manifest.json"),
)


def work_of(config: CorpusConfig, stage: str) -> Work:
    """A stage by its name. Its libraries are imported here, in the process that needs them."""
    if stage == "extract":
        from llm.crawl.extract.stage import Extract

        return Extract(config.extract)
    if stage == "filter":
        from llm.crawl.filter.stage import Filter

        return Filter(config.filter)
    if stage in ("signatures", "cluster", "dedup"):
        from llm.crawl.dedup.stage import Cluster, Drop, Signatures

        return {"signatures": Signatures, "cluster": Cluster, "dedup": Drop}[stage](config.dedup)
    from llm.crawl.tokens.stage import Join, Tokenize, TrainTokenizer

    step = {"tokenizer": TrainTokenizer, "tokenize": Tokenize, "tokens": Join}[stage]
    return step(config.tokenizer, config.tokenize)
