"""Each rule refuses what it is there for and keeps ordinary prose; thresholds are what the config says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.crawl.counts import Counts
from llm.crawl.documents import Document, write_documents
from llm.crawl.filter.settings import (
    RULES,
    C4Rule,
    ContaminationRule,
    FilterConfig,
    GopherQuality,
    LengthRule,
    LinesRule,
    QualityRule,
    UrlRule,
)
from llm.crawl.filter.stage import Filter
from llm.crawl.tasks import Task
from llm.errors import InputError

PROSE = """\
The harbour of the old town had been built by people who knew what storms could do to it in a single night.
They laid the first stones in spring, and by the time that autumn came the wall stood as high as a house.
Nobody alive remembers their names, but every child can tell you which of the stones came from the far island!
When the great flood came, the wall held; the bridge did not, and it took the town nine years to pay for another.
Since then the council meets each March, walks along the wall, and argues about what has to be mended first.
It is said that the argument is older than the wall. Would you believe that?"""


def document(text: str, url: str = "") -> Document:
    return Document(id=0, text=text, url=url, source="a.warc.gz", offset=0)


def asked(rule: str, text: str, url: str = "", **values: object) -> tuple[str, Document, Counts]:
    """The refusal of one rule with settings of its own, the document as it left it, and the counts."""
    config = replace(FilterConfig(), rules=())
    section = replace(getattr(config, rule), **values)
    found, counts = document(text, url), Counts()
    refusal = Filter(replace(config, **{rule: section}, rules=(rule,))).refusal(found, counts)
    assert counts.removed == ({refusal: 1} if refusal else {})
    return refusal.removeprefix(f"{rule}."), found, counts


@pytest.mark.parametrize("rule", ["length", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii"])
def test_prose_stays_as_it_is(rule: str) -> None:
    refusal, found, _ = asked(rule, PROSE)
    assert refusal == ""
    assert found.text == PROSE


LINES = PROSE.splitlines()


@pytest.mark.parametrize(
    ("rule", "reason", "text"),
    [
        ("length", "too_long", "a" * 2_000_001),
        ("gopher_repetition", "empty", ""),
        ("gopher_repetition", "paragraphs", "a.\n\nb.\n\na.\n\na.\n\n" + PROSE),
        ("gopher_repetition", "paragraph_characters", "\n\n".join([PROSE, PROSE, *LINES[:3], "x y", "z"])),
        ("gopher_repetition", "lines", "\n".join([PROSE, *["a b"] * 6])),
        ("gopher_repetition", "line_characters", "\n".join([*LINES, *LINES[:2]])),
        ("gopher_repetition", "top_2_grams", "new phone cases and new phone screens for a new phone or no new phone"),
        ("gopher_repetition", "duplicate_5_grams", " ".join(f"{LINES[0][:60]} {line}" for line in LINES)),
        ("gopher_quality", "few_words", "The end of it."),
        ("gopher_quality", "many_words", "the and " * 50_001),
        ("gopher_quality", "short_words", "a to " * 40),
        ("gopher_quality", "long_words", "internationalisation of the " + "mischaracterisation " * 60),
        ("gopher_quality", "hashes", PROSE + " # " * 40),
        ("gopher_quality", "ellipses", PROSE.replace(" the ", "... ").replace(" to ", "... ") + "..." * 20),
        ("gopher_quality", "bullet_lines", "\n".join("- " + line for line in LINES)),
        ("gopher_quality", "ellipsis_lines", "\n".join(line + "..." for line in LINES)),
        ("gopher_quality", "letter_words", PROSE + " 2024 1999 1848" * 30),
        ("gopher_quality", "stop_words", "der Hafen der alten Stadt wurde von Leuten gebaut " * 10),
        ("c4", "lorem_ipsum", PROSE + "\nLorem ipsum dolor sit amet."),
        ("c4", "curly_bracket", PROSE + "\nif (a) { b = c; }"),
        ("c4", "few_sentences", "One sentence is here. Another one is here. This is all that there is."),
        ("fineweb", "empty", " \n "),
        ("fineweb", "ended_lines", "\n".join(f"a line of the menu that has no mark at all {i}" for i in range(9))),
        ("fineweb", "short_lines", "\n".join([PROSE, *(f"Point {i}." for i in range(20))])),
        ("fineweb", "repeated_characters", "\n".join([PROSE, LINES[0]])),
        ("fineweb", "newlines", "\n".join(f"Internationalisation mischaracterised{i}." for i in range(40))),
    ],
)  # fmt: skip
def test_what_a_rule_refuses(rule: str, reason: str, text: str) -> None:
    assert asked(rule, text)[0] == reason


def test_thresholds_come_from_the_config() -> None:
    words = len(PROSE.split())
    assert asked("gopher_quality", PROSE, min_words=words + 100)[0] == "few_words"
    assert asked("gopher_quality", "The end of nothing and everything.", min_words=1)[0] == ""
    assert asked("gopher_quality", PROSE, stop_words=("zebra",), min_stop_words=1)[0] == "stop_words"
    assert asked("fineweb", PROSE, short_line=1000)[0] == "short_lines"


def test_c4_leaves_lines_out() -> None:
    text = (
        f"Menu\n{PROSE}\nPlease enable JavaScript to see this.\nRead our Privacy Policy for more.\nSee note [12] here."
    )
    refusal, found, _ = asked("c4", text)
    assert refusal == ""
    assert found.text == f"{PROSE}\nSee note  here."
    assert asked("c4", PROSE + "\nno mark at its end", end_marks=True)[1].text == PROSE
    assert asked("c4", PROSE + "\na " + "b" * 1001 + " c d.")[1].text == PROSE


def test_rules_see_what_earlier_ones_left_of_a_text() -> None:
    found = document(PROSE + "\nThe menu" * 20)
    assert Filter(FilterConfig(rules=("gopher_quality", "fineweb"))).refusal(document(found.text), Counts())
    assert not Filter(FilterConfig(rules=("gopher_quality", "c4", "fineweb"))).refusal(found, Counts())
    assert found.text == PROSE


@pytest.mark.parametrize(
    ("text", "reason", "language"),
    [
        (PROSE, "", "en"),
        ("Der Hafen der alten Stadt wurde von Leuten gebaut, die wussten, was Stürme anrichten.", "de", "de"),
        ("", "unsure", "en"),
        ("\n\n", "unsure", "en"),
    ],
)
def test_language(text: str, reason: str, language: str) -> None:
    refusal, found, counts = asked("language", text)
    assert (refusal, found.language) == (reason, language)
    assert counts.histograms["language"] == {language: 1}


def test_a_language_that_is_not_sure_is_refused() -> None:
    mixed = "tanto Hafen maison harbour 12 xkcd"
    assert asked("language", mixed, languages=())[0] == "unsure"
    assert asked("language", mixed, languages=(), min_score=0.0)[0] == ""


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", ""),
        ("https://good.org/a", ""),
        ("https://www.bad.co.uk/a", "domain"),
        ("https://bad.co.uk:8080", "domain"),
        ("https://co.uk/bad", ""),
        ("http://sub.host.org/x", "host"),
        ("http://other.host.org/x", ""),
        ("http://a.org/exact?q=1", "url"),
        ("http://a.org/Casino-online", "word"),
        ("http://a.org/casinos", ""),
        ("http://a.org/cheap/a", ""),
        ("http://a.org/cheap/loan", "soft_words"),
        ("http://a.org/xx-xpill.s", "part"),
        ("http://[::1/casino", "word"),
        ("not a url", ""),
    ],
)
def test_urls(tmp_path: Path, url: str, reason: str) -> None:
    lists = {
        "domains": "# comment\nbad.co.uk\nsub.host.org\n", "urls": "http://a.org/exact?q=1", "words": "casino",
        "soft_words": "cheap\nloan", "parts": "xpills",
    }  # fmt: skip
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
    assert asked("url", PROSE, url, **{name: str(tmp_path / name) for name in lists})[0] == reason


def test_pii_is_masked() -> None:
    text = (
        "Write to jane.o'neill+x@mail.example.co.uk or root@localhost, from 8.8.8.8 or 192.168.0.1, v1.2.3.4, "
        "1.2.3.4.5, 999.1.1.1, 2606:4700::1111 or fe80::1, at 10:30:45 (a::b)."
    )
    _, found, counts = asked("pii", text)
    assert found.text == text.replace("jane.o'neill+x@mail.example.co.uk", "someone@example.com").replace(
        "8.8.8.8", "192.0.2.1"
    ).replace("2606:4700::1111", "2001:db8::1")
    assert counts.histograms["masked"] == {"email": 1, "ipv4": 1, "ipv6": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a" * 500_000 + "@",
        "@" * 500_000,
        "a@" + "b." * 250_000,
        "1." * 250_000,
        "a." * 100_000 + "@ x@y.org",
        "2001:" * 100_000,
    ],
)
def test_pii_takes_a_moment_on_any_text(text: str) -> None:
    assert asked("pii", text)[0] == ""


def test_lines_of_a_task_come_once(tmp_path: Path) -> None:
    texts = [
        PROSE,
        "Accept all cookies of this site now.\n" + LINES[0],
        LINES[1],
        "ok\nAccept all cookies of this site now.\nok",
    ]
    for part in range(2):
        write_documents(tmp_path / f"{part}.parquet", [document(text) for text in texts])
    stage = Filter(replace(FilterConfig(), rules=("lines",), lines=LinesRule(min_characters=20)))
    for part in range(2):  # a task knows nothing of another
        counts = Counts()
        task = Task(number=part, inputs=(tmp_path / f"{part}.parquet",), folder=tmp_path)
        kept = [one.text for one in stage.run(task, counts)]
        assert kept == [PROSE, "Accept all cookies of this site now.", "ok\nok"]
        assert counts.removed == {"lines.empty": 1}
        assert (counts.documents_in, counts.bytes_in) == (4, sum(len(text) for text in texts))
        assert counts.histograms["length"] == {"1024": 1, "64": 1, "8": 1}


def test_contamination(tmp_path: Path) -> None:
    (tmp_path / "quiz.txt").write_text("What did they lay in spring, and by the time that autumn came?")
    (tmp_path / "other.jsonl").write_text('{"text": "One two three four five six."}\n')
    files = (str(tmp_path / "other.jsonl"), str(tmp_path / "quiz.txt"))
    shared = "IN SPRING -- and by the time that autumn came"
    assert asked("contamination", f"So {shared} again.", files=files, words=6)[0] == "quiz"
    assert asked("contamination", "two three four five six", files=files, words=6)[0] == ""
    assert asked("contamination", "", files=files, words=6)[0] == ""
    with pytest.raises(InputError, match=r"other.jsonl has no text of 13 words"):
        asked("contamination", "", files=files)


def test_quality_learns_the_users_examples(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("\n".join(LINES[:4]))
    bad = "buy cheap pills online now, click here for the best price"
    rows = [f'{{"text": "{bad} {i}"}}' for i in range(4)]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    files = {"good": str(tmp_path / "good.txt"), "bad": str(tmp_path / "bad.jsonl")}
    assert asked("quality", LINES[4] + " the wall of the town", **files)[0] == ""
    assert asked("quality", "click here to buy pills at the best price", **files)[0] == "low_score"
    assert asked("quality", "", min_score=0.0, **files)[0] == ""


PLAIN_RULES = tuple(rule for rule in RULES if rule not in ("contamination", "quality"))
EACH = [Filter(FilterConfig(rules=(rule,))) for rule in PLAIN_RULES]
ODD = st.lists(st.sampled_from([*PROSE.split(), *"\n{@[1]….", "\x00", "\x85", "İ"])).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=60), ODD))
def test_no_text_breaks_a_rule(text: str) -> None:
    for stage in EACH:
        found, counts = document(text), Counts()
        refusal = stage.refusal(found, counts)
        assert sum(counts.removed.values()) == bool(refusal)
        assert found.text == text or stage.settings.config.rules[0] in ("c4", "lines", "pii")


def test_the_identity_covers_the_files_of_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "domains"
    path.write_text("bad.org")
    config = FilterConfig(rules=("url",), url=UrlRule(domains=str(path)))
    first = Filter(config).settings
    path.write_text("worse.org")
    assert Filter(config).settings != first
    assert Filter(replace(config, rules=())).settings.files == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FilterConfig(rules=("gopher",)), r"filter.rules has 'gopher'; expected some of length, url"),
        (lambda: FilterConfig(rules=("c4", "c4")), r"names a rule twice"),
        (lambda: FilterConfig(gopher_quality=GopherQuality(hashes=1.5)), r"filter.gopher_quality.hashes is 1.5"),
        (lambda: FilterConfig(c4=C4Rule(min_sentences=-1)), r"filter.c4.min_sentences is -1; expected at least 0"),
        (lambda: FilterConfig(length=LengthRule(-1)), r"filter.length.max_characters"),
        (lambda: FilterConfig(rules=("contamination",)), r"give filter.contamination.files"),
        (lambda: FilterConfig(rules=("quality",), quality=QualityRule(good="a")), r"give filter.quality.good and bad"),
        (lambda: FilterConfig(quality=QualityRule(bits=40)), r"filter.quality.bits is 40"),
        (lambda: FilterConfig(contamination=ContaminationRule(words=0)), r"filter.contamination.words"),
        (lambda: Filter(FilterConfig(rules=("url",), url=UrlRule(domains="/none"))), r"/none"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
