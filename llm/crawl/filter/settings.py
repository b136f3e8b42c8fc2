"""The section `filter` of a corpus's config: each rule with its published thresholds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from llm.config.sections import check_at_least
from llm.errors import require

RULES = (
    "length", "url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "lines", "contamination",
    "quality", "pii",
)  # fmt: skip


def _check_fractions(section: Any, rule: str) -> None:
    """Refuse floats outside [0, 1], and integers below 0."""
    for name in (one.name for one in fields(section)):
        value = getattr(section, name)
        inside = type(value) is not float or 0 <= value <= 1
        require(inside, f"filter.{rule}.{name} is {value}; expected between 0 and 1")
    check_at_least(0, f"filter.{rule}.", section, *(f.name for f in fields(section) if f.type == "int"))


@dataclass(frozen=True)
class LengthRule:
    """Keeps documents that no rule should have to read in whole out of the way. Ours."""

    max_characters: int = 2_000_000
    """At most. Gopher's 100,000 words of at most 10 letters stay well below it."""


@dataclass(frozen=True)
class UrlRule:
    """RefinedWeb (Penedo et al. 2023, arXiv 2306.01116, section 3.1 and G.1), as FineWeb has it.

    Each list is a text file of the user's with one entry a line, # begins a comment; "": none. None is shipped.
    Documents without a URL stay.
    """

    domains: str = ""
    """Hosts and registrable domains that are refused: example.co.uk refuses www.example.co.uk too."""
    urls: str = ""
    """Whole URLs that are refused."""
    words: str = ""
    """Words of which none may stand in a URL: what letters and digits spell between other characters."""
    parts: str = ""
    """Strings that occur nowhere in a URL once all but its letters and digits is left out."""
    soft_words: str = ""
    """Words that a URL may have one of."""
    max_soft_words: int = 1
    """Different soft words in a URL, at most: a second one refuses it (RefinedWeb)."""


@dataclass(frozen=True)
class LanguageRule:
    """Language identification by fastText's model lid.176.ftz."""

    languages: tuple[str, ...] = ("en",)
    """ISO 639 codes of the languages that stay; none: all."""
    min_score: float = 0.65
    """The most likely language's score is above it. FineWeb: 0.65, with the larger model lid.176.bin."""
    characters: int = 1024
    """What is read of a text: the beginning. More is slower, and hardly surer (docs/corpus.md)."""


@dataclass(frozen=True)
class GopherRepetition:
    """Gopher (Rae et al. 2021, arXiv 2112.11446), table A1: shares of a text that repeat, at most."""

    lines: float = 0.3
    """Of the lines, those that have come before."""
    paragraphs: float = 0.3
    """Of the paragraphs, likewise."""
    line_characters: float = 0.2
    """Of the characters, those in lines that have come before."""
    paragraph_characters: float = 0.2
    """Of the characters, those in paragraphs that have come before."""
    top_2_grams: float = 0.2
    """Of the characters, those in the most frequent run of two words."""
    top_3_grams: float = 0.18
    """Likewise of three."""
    top_4_grams: float = 0.16
    """Likewise of four."""
    duplicate_5_grams: float = 0.15
    """Of the characters, those in runs of five words that have come before, none counted twice."""
    duplicate_6_grams: float = 0.14
    """Likewise of six."""
    duplicate_7_grams: float = 0.13
    """Likewise of seven."""
    duplicate_8_grams: float = 0.12
    """Likewise of eight."""
    duplicate_9_grams: float = 0.11
    """Likewise of nine."""
    duplicate_10_grams: float = 0.1
    """Likewise of ten."""


@dataclass(frozen=True)
class GopherQuality:
    """Gopher (Rae et al. 2021, arXiv 2112.11446), section A.1.1. Signs count as words, as in datatrove."""

    min_words: int = 50
    """Words other than signs, at least."""
    max_words: int = 100_000
    """Likewise at most."""
    min_word_length: int = 3
    """Mean characters of these words, at least."""
    max_word_length: int = 10
    """Likewise at most."""
    hashes: float = 0.1
    """# signs per word, at most."""
    ellipses: float = 0.1
    """Ellipses per word, at most."""
    bullet_lines: float = 0.9
    """Of the lines, those that begin with a bullet or a hyphen, at most."""
    ellipsis_lines: float = 0.3
    """Of the lines, those that end with an ellipsis, at most."""
    letter_words: float = 0.8
    """Of the words, those with a letter, at least."""
    min_stop_words: int = 2
    """Different words out of `stop_words`, at least."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """The published ones, for English: another language needs its own."""


@dataclass(frozen=True)
class C4Rule:
    """C4 (Raffel et al. 2020, JMLR 21/140, section 2.2, and its code). Lines are left out of a text, or the text is."""

    end_marks: bool = False
    """Keep only lines that end in . ! ? or a quotation mark. C4: true; FineWeb: false, since it loses too much."""
    min_line_words: int = 3
    """Words of a line, between spaces, at least."""
    max_word_length: int = 1000
    """Characters of each word of a line, at most."""
    min_sentences: int = 5
    """Sentences in the lines that stay, at least."""
    curly_bracket: bool = True
    """Remove texts with an opening curly bracket, a sign of code."""
    policies: tuple[str, ...] = (
        "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    )  # fmt: skip
    """Lines with one of these, in whichever case, are left out; so are those with `javascript`."""


@dataclass(frozen=True)
class FineWebRule:
    """FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6), with the thresholds of its code."""

    ended_lines: float = 0.12
    """Of the lines that are not blank, those that end with a mark such as a full stop, at least."""
    short_lines: float = 0.67
    """Likewise those of at most `short_line` characters, at most."""
    short_line: int = 30
    """Characters."""
    repeated_characters: float = 0.01
    """Of the characters, those in lines that have come before, at most."""
    newlines: float = 0.3
    """Line feeds per word, at most."""


@dataclass(frozen=True)
class LinesRule:
    """Leaves out lines that have come before in the same task (one input file), as CCNet does (arXiv 1911.00359)."""

    min_characters: int = 30
    """Shorter lines stay, since headings and lines of dialogue repeat by right. CCNet: 0."""


@dataclass(frozen=True)
class ContaminationRule:
    """Removes texts that share a run of words with evaluation data (GPT-3, arXiv 2005.14165, appendix C)."""

    files: tuple[str, ...] = ()
    """Text, JSON lines or Parquet, as data.source takes them: each a set of evaluation data."""
    text_key: str = "text"
    """The field that holds the text."""
    words: int = 13
    """Length of the run; capitals and signs make no difference. GPT-3: 13. Examples that are shorter find nothing."""


@dataclass(frozen=True)
class QualityRule:
    """A logistic regression of hashed words and pairs of words, trained on the user's examples when a stage starts.

    fastText's classifier without hidden layer (Joulin et al. 2016, arXiv 1607.01759), as DCLM uses one.
    """

    good: str = ""
    """Examples of what is wanted: text, JSON lines or Parquet, as data.source takes them."""
    bad: str = ""
    """Examples of what is not."""
    text_key: str = "text"
    """The field that holds the text."""
    min_score: float = 0.5
    """Probability of a good text, at least."""
    bits: int = 18
    """log2 of the number of weights."""
    passes: int = 3
    """Times that the training goes through all examples."""
    examples: int = 20_000
    """That are read of each kind, at most."""


@dataclass(frozen=True)
class PiiRule:
    """Puts other words in place of e-mail addresses and public IP addresses."""

    email: str = "someone@example.com"
    """Instead of an e-mail address. example.com is nobody's (RFC 2606)."""
    ipv4: str = "192.0.2.1"
    """Instead of an address that is routed in the internet. 192.0.2.0/24 is nobody's (RFC 5737)."""
    ipv6: str = "2001:db8::1"
    """Likewise (RFC 3849)."""


@dataclass(frozen=True)
class FilterConfig:
    """Which documents stay."""

    rules: tuple[str, ...] = (
        "length", "url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii",
    )  # fmt: skip
    """Which rules are asked, in this order; the first that refuses a document counts. FineWeb's order."""
    length: LengthRule = field(default_factory=LengthRule)
    url: UrlRule = field(default_factory=UrlRule)
    language: LanguageRule = field(default_factory=LanguageRule)
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4Rule = field(default_factory=C4Rule)
    fineweb: FineWebRule = field(default_factory=FineWebRule)
    lines: LinesRule = field(default_factory=LinesRule)
    contamination: ContaminationRule = field(default_factory=ContaminationRule)
    quality: QualityRule = field(default_factory=QualityRule)
    pii: PiiRule = field(default_factory=PiiRule)

    def __post_init__(self) -> None:
        for rule in self.rules:
            require(rule in RULES, f"filter.rules has {rule!r}; expected some of {', '.join(RULES)}")
        require(len(set(self.rules)) == len(self.rules), f"filter.rules names a rule twice: {', '.join(self.rules)}")
        for rule in RULES:
            _check_fractions(getattr(self, rule), rule)
        check_at_least(1, "filter.language.", self.language, "characters")
        check_at_least(1, "filter.contamination.", self.contamination, "words")
        require(1 <= self.quality.bits <= 28, f"filter.quality.bits is {self.quality.bits}; expected 1 to 28")
        given = {
            "contamination": bool(self.contamination.files),
            "quality": bool(self.quality.good and self.quality.bad),
        }
        for rule, ready in given.items():
            keys = "files" if rule == "contamination" else "good and bad"
            require(ready or rule not in self.rules, f"filter.rules has {rule!r}; give filter.{rule}.{keys}")
