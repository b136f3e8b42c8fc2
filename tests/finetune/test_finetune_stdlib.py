"""What is mined from the standard library, and that it fits the samples of the documented example."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import yaml

from llm.data.chat import Chat
from llm.data.corpus import stdlib_files
from llm.data.tokenizer import Tokenizer
from llm.finetune.chat import checked
from llm.finetune.stdlib import docstrings, labelled, mine

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
def add(a, b):
    """Return the
    sum.

    More.
    """
    return a + b

def bare(a):
    return a

class A:
    async def wait(self):
        "Wait."
        await self.ready
    def only_a_docstring(self):
        "Nothing."
    def long(self):
        "Too long."
        return [LONG]
'''.replace("LONG", ", ".join("word" * 40))


def test_a_function_is_answered_by_its_docstring_alone() -> None:
    asked = "def add(a, b):\n    return a + b", "async def wait(self):\n    await self.ready"
    found = [[message["content"] for message in messages] for messages in docstrings(SOURCE)]
    assert sorted(found) == sorted([[asked[0], "Return the sum."], [asked[1], "Wait."]])
    assert not list(docstrings("def f(: pass"))


def test_a_text_is_labelled_with_its_package() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    found = list(labelled(library / "json/made.py", SOURCE))
    assert [record["label"] for record in found] == ["json", "json"]
    assert found[0]["text"].startswith("def add(a, b):") and found[1]["text"].startswith("class A:")
    assert not list(labelled(library / "abc.py", SOURCE))


@pytest.mark.slow
def test_the_documented_example_reads_all_that_is_mined(tmp_path: Path) -> None:
    """With a tokenizer as that of the first run."""
    said = mine(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/docstrings.jsonl").read_text().splitlines()]
    assert f"docstrings.jsonl: {len(lines):,} lines" in said and len(lines) > 1000
    size, seq_len = (
        yaml.safe_load((ROOT / "launch/configs" / name).read_text())[section][key]
        for name, section, key in (("tiny-cpu.yaml", "model", "vocab_size"), ("finetune/chat.yaml", "data", "seq_len"))
    )
    chat = Chat(Tokenizer.train((path.read_text(errors="replace") for path in stdlib_files()[::5]), size))
    assert max(len(chat.prompt(checked(line, "a line")[:1])) for line in lines) < seq_len
