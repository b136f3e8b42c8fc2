"""The first stage: raw files in, documents out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import PurePath

from llm.crawl.counts import Counts
from llm.crawl.documents import Document
from llm.crawl.extract.files import kind_of, records
from llm.crawl.extract.records import Damaged, Record
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.tasks import Task
from llm.errors import require


class Extract:
    """Reads pages and texts, and takes their text."""

    name = "extract"
    version = 2

    def __init__(self, settings: ExtractConfig) -> None:
        """Raises InputError where a library that the settings need is not installed."""
        wanted = {"fastwarc": "crawl", "resiliparse": "crawl"}
        wanted |= {"ftfy": {"ftfy": "crawl"}}.get(settings.normalise, {})
        wanted |= {"trafilatura": {"trafilatura": "trafilatura"}}.get(settings.extractor, {})
        for library, extra in wanted.items():
            missing = find_spec(library) is None
            require(not missing, f"extract needs {library}, which is not installed; pip install 'ingot[{extra}]'")
        self.settings = settings

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        """The documents of a file that have text, in its order.

        Counted as removed: pages whose HTTP status, MIME type or lack of text leaves nothing for a corpus.
        """
        (path,) = task.inputs
        source = task.source or path.name
        if kind_of(path.name) is None:
            counts.count("files passed over", PurePath(source).suffix.lower())
        damaged: Damaged = partial(counts.damaged, source)
        for number, record in enumerate(islice(records(path, self.settings, damaged), task.limit)):
            counts.documents_in += 1
            counts.bytes_in = max(counts.bytes_in, record.end)
            document = Document(task.number << 32 | number, "", record.url, source, record.offset)
            reason = record.left_out or self._fill(document, record, damaged)
            if not reason:
                yield document
            elif reason != "damage":
                document.text = document.text or record.url
                counts.remove(f"extract.{reason}", document)
        counts.bytes_in = path.stat().st_size

    def _fill(self, document: Document, record: Record, damaged: Damaged) -> str:
        """Give the document its text; why it is left out, where it is."""
        from llm.crawl.extract.text import Unreadable, decode, normalise, to_text

        if isinstance(record.body, str):
            text, charset, valid = record.body, "", True
        else:
            text, charset, valid = decode(record.body, record.charset, record.is_html)
        if not valid:
            damaged(record.offset, f"some bytes are not valid in {charset}; U+FFFD stands for them")
        if record.is_html:
            try:
                text = to_text(text, self.settings)
            except Unreadable as error:
                damaged(record.offset, str(error))
                return "damage"
        document.text = normalise(text, self.settings.normalise)
        about = {"date": record.date, "charset": charset, "mime": "text/html" * record.is_html}
        document.metadata = {key: value for key, value in about.items() if value}
        return "" if text and not text.isspace() else "empty"
