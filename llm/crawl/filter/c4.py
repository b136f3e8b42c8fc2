"""The rules of C4 (Raffel et al. 2020, JMLR 21/140, section 2.2), and of its code, which says more."""

from __future__ import annotations

import re

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import C4Rule

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)]")  # Wikipedia's
MARKS = (".", "?", "!", '"', "'")


def clean(page: Page, config: C4Rule) -> str:
    """Leave lines out of a text; or say why all of it goes: "" if it stays."""
    lower = page.text.lower()
    lorem, unwanted = "lorem ipsum" in lower, [part for part in (*config.policies, "javascript") if part in lower]
    citations, curly = "[" in page.text, config.curly_bracket and "{" in page.text
    kept, sentences, longest = list[str](), 0, config.max_word_length
    for line in map(str.strip, page.text.splitlines()):
        words = line.split()
        if len(words) < config.min_line_words or (len(line) > longest and max(map(len, words)) > longest):
            continue
        if citations and "[" in line:
            line = CITATION.sub("", line)
        if config.end_marks and (not line.endswith(MARKS) or line.endswith("...")):
            continue
        if lorem and "lorem ipsum" in line.lower():
            return "lorem_ipsum"
        if curly and "{" in line and not (unwanted and "javascript" in line.lower()):
            return "curly_bracket"
        if unwanted and any(part in line.lower() for part in unwanted):
            continue
        if sentences < config.min_sentences:
            sentences += page.tokenizer.sentences(line)
        kept.append(line)
    if sentences < config.min_sentences:
        return "few_sentences"
    page.change("\n".join(kept).strip())
    return ""
