"""The rules decide as datatrove's do, given the same words; with ours, on nearly all documents."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

import pytest

from llm.crawl.counts import Counts
from llm.crawl.documents import Document
from llm.crawl.filter.page import Tokenizer
from llm.crawl.filter.settings import FilterConfig
from llm.crawl.filter.stage import Filter

filters = pytest.importorskip("datatrove.pipeline.filters")
pytest.importorskip("spacy")  # its English tokenizer is what datatrove splits words with
data = pytest.importorskip("datatrove.data")
text_tools = pytest.importorskip("datatrove.utils.text")

RULES = {
    "gopher_repetition": filters.GopherRepetitionFilter(),
    "gopher_quality": filters.GopherQualityFilter(),
    "c4": filters.C4QualityFilter(filter_no_terminal_punct=False),
    "fineweb": filters.FineWebQualityFilter(),
}
SPACY = Tokenizer(text_tools.split_into_words, lambda line: len(text_tools.split_into_sentences(line)))


def documents() -> list[str]:
    """The language reference that Python carries along, whole, in parts, and spoilt in ways that the rules look for."""
    draw, texts = random.Random(0), [text[:2000] for text in topics.values()]
    texts += [text[start : start + 700] for text in texts for start in range(0, len(text) - 300, 700)]
    spoils = [
        lambda text: text + "\n" + text[: draw.randrange(len(text))],
        lambda text: "\n".join("- " + line for line in text.splitlines()),
        lambda text: text.replace(".", "..."),
        lambda text: text.replace("the ", "#"),
        lambda text: text.replace("\n\n", "\n"),
        lambda text: text.replace(" ", "\n" if draw.random() < 0.2 else " "),
        lambda text: text + "\n{ lorem ipsum: javascript }",
        lambda text: " ".join(text.split()),
    ]
    return texts + [draw.choice(spoils)(text) for text in texts]


@pytest.mark.slow
def test_decisions_equal_datatroves() -> None:
    texts = documents()
    equal = dict.fromkeys(("same words", "our words"), 0)
    for text in texts:
        theirs, page = "", data.Document(text=text, id="0")
        for name, rule in RULES.items():  # as a pipeline of theirs: the first that refuses; C4 rewrites the text
            if rule.filter(page) is not True:
                theirs = name
                break
        for words, tokenizer in (("same words", SPACY), ("our words", Tokenizer())):
            ours = Document(0, text, "", "", 0)
            refusal = Filter(FilterConfig(rules=tuple(RULES)), tokenizer).refusal(ours, Counts())
            same = bool(refusal) == bool(theirs) and (bool(theirs) or ours.text == page.text)
            equal[words] += same
            if words == "same words":
                assert refusal.partition(".")[0] == theirs, text
    assert len(texts) > 300
    assert equal["same words"] == len(texts)
    assert equal["our words"] >= 0.98 * len(texts), f"{equal} of {len(texts)}"
