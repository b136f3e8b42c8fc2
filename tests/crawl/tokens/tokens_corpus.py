"""A small corpus without duplicates: three parts of documents in several scripts, as the stage `dedup` leaves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm.crawl.documents import Document, write_documents
from llm.crawl.tasks import Task, run_task
from llm.crawl.tokens.settings import TokenizeConfig, TokenizerConfig
from llm.crawl.tokens.stage import TOKENIZER, Join, Tokenize, TrainTokenizer
from llm.data.tokenizer.cuts import LONGEST_PIECE

ROOT = Path(__file__).resolve().parents[3]
STRANGE = [
    "",
    "a text that says <|endoftext|> in the middle, and ends with <|endoftext|>",
    "Ελληνικά, русский текст, हिन्दी, 日本語の文章です。 naïve café e\u0301 🎉👩‍👩‍👧\r\n\tend  \n\n\n",
    "no space " + "inthis" * (LONGEST_PIECE // 5),
    " " * (LONGEST_PIECE + 7) + "12345678 ½ ٣٤",
]


def texts() -> list[str]:
    """115 documents."""
    pages = [(ROOT / f"docs/{name}.md").read_text() for name in ("data", "kernels", "reliability")]
    long = "".join(pages)
    return [*STRANGE, *(long[i : i + 1_000] for i in range(0, 110_000, 1_000))]


@dataclass(frozen=True)
class Corpus:
    """The folder of everything, and how its parts are tokenised."""

    out: Path
    parts: tuple[Path, ...]
    documents: list[Document]

    def tokenise(
        self,
        folder: str = "",
        order: Callable[[list[Task]], list[Task]] = list,
        tokenizer: TokenizerConfig = TokenizerConfig(vocab_size=512),  # noqa: B008 - frozen
        tokenize: TokenizeConfig = TokenizeConfig(validation_fraction=0.2),  # noqa: B008
    ) -> Path:
        """All three steps, the parts in some order; the folder of the shards."""
        out, work = self.out / folder, Tokenize(tokenizer, tokenize)
        for name in ("tokenizer", "tokenize", "tokens"):
            (out / name).mkdir(parents=True)
        run_task(TrainTokenizer(tokenizer, tokenize), Task(0, self.parts, out / "tokenizer"))
        path = out / f"tokenizer/00000{TOKENIZER}"
        tasks = [Task(i, (part, path), out / "tokenize") for i, part in enumerate(self.parts)]
        for task in order(tasks):
            run_task(work, task)
        reports = tuple(task.path(".json") for task in tasks)
        run_task(Join(tokenizer, tokenize), Task(0, (path, *reports), out / "tokens"))
        return out / "tokens"


def write_corpus(out: Path) -> Corpus:
    documents = [
        Document(i % 3 << 32 | i, text, f"https://example.org/{i}", f"part-{i % 3}.warc.gz", 100 * i)
        for i, text in enumerate(texts())
    ]
    (out / "dedup").mkdir()
    parts = tuple(out / f"dedup/{number:05d}.parquet" for number in range(3))
    for number, part in enumerate(parts):
        write_documents(part, (document for document in documents if document.id >> 32 == number))
    return Corpus(out, parts, sorted(documents, key=lambda document: document.id))
