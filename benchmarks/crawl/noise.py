"""Plants noise of known kinds: boilerplate, copies with edits, odd charsets, spam; writes it as WARC with the truth."""

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from html.parser import HTMLParser
from itertools import count, islice
from pathlib import Path

from benchmarks.crawl.pages import Page

EDITS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # shares of a copy's words that are replaced
COPIED, RECODED, TRUNCATED, SPAM = 0.04, 0.15, 0.01, 0.15  # shares of the pages: copied so with each edit, and so on
SITES = 40
BLOCKED = "www.blocked.example"  # a host that the demo's list refuses
PER_FILE = 200  # records
CHARSETS = {
    **dict.fromkeys(("de", "fr", "es", "it", "pt"), ("windows-1252", "iso-8859-1")),
    "en": ("windows-1252",), "pl": ("iso-8859-2", "windows-1250"), "ru": ("koi8-r", "windows-1251"),
    "ja": ("shift_jis", "euc-jp"), "zh": ("gb18030",), "ar": ("windows-1256",),
}  # fmt: skip
DECLARED = ("in a meta element", "in the header", "nowhere", "wrongly in the header")
WORDS = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+")  # a character each where no spaces part words
BOILERPLATE = (
    "We and our 317 partners store cookies on your device to personalise the advertisements that you see.",
    "Subscribe to our newsletter and never miss a weekly digest of our most popular stories again!",
    "You have read three of your five complimentary articles this month; sign in to continue.",
    "Copyright Example Media Holdings. All trademarks belong to their respective proprietors.",
    "Share this on Facebook, Twitter, Pinterest, LinkedIn or WhatsApp, or print it for later.",
    "Recommended for you: seven gadgets under twenty dollars that our editors cannot stop buying.",
    "Accept all cookies, reject optional cookies, or manage your preferences at any moment.",
    "Terms of service, privacy policy, advertise with us, careers, contact, accessibility statement.",
)
MENU = ("Home", "News", "Sports", "Weather", "Shopping", "Travel", "Horoscopes", "Podcasts", "Jobs", "Login", "Help")
LOREM = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore "
    "magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo. "
)


@dataclass(frozen=True)
class Planted:
    """What is known of a page."""

    url: str
    name: str
    kind: str
    """page, copy, charset, truncated or spam."""
    detail: str
    """The share of edits, the charset, the kind of spam."""
    language: str
    text: str
    """What should be extracted."""
    original: str = ""
    """The URL of what this is a copy of."""


@dataclass(frozen=True)
class Sent:
    """A page as a server has sent it."""

    planted: Planted
    content_type: str
    body: bytes


class _Visible(HTMLParser):
    """The text of HTML without scripts, styles and the signs that link to a heading."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts, self._hidden = list[str](), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style") or ("class", "headerlink") in attrs:
            self._hidden = tag

    def handle_endtag(self, tag: str) -> None:
        self._hidden = "" if tag == self._hidden else self._hidden

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def visible(html: str) -> str:
    return " ".join("".join(_Visible(html).parts).split())


def edited(html: str, share: float, rng: random.Random) -> str:
    """HTML with a share of its words replaced by others of its words."""
    parts = re.split(r"(<[^>]*>|&\w+;|\W+)", html)  # what stands between these is a word or empty
    words = [i for i in range(0, len(parts), 2) if parts[i]]
    drawn = rng.sample(words, int(share * len(words)))
    others = rng.choices([parts[i] for i in words], k=len(drawn))
    for i, other in zip(drawn, others, strict=True):
        parts[i] = other
    return "".join(parts)


def around(main: str, title: str, site: int, meta: str, rng: random.Random) -> str:
    """A page of a site: its own menu, and sentences that every site has, around the main part."""
    own = random.Random(site)  # noqa: S311 - the same menu on all its pages
    links = "".join(f'<li><a href="/{word}">{word}</a></li>' for word in own.sample(MENU, 9))
    banner, footer, *aside = rng.sample(BOILERPLATE, 4)
    tag = own.choice(("<main>", '<div id="content">', '<div class="post-body">', "<article>"))
    related = "".join(f'<li><a href="/{i}">{escape(sentence)}</a></li>' for i, sentence in enumerate(aside))
    return (
        f"<!DOCTYPE html>\n<html><head>{meta}<title>{escape(title)}</title><script>var site={site};track();</script>"
        f"<style>body {{ margin: 0 }}</style></head>\n<body><header><nav><ul>{links}</ul></nav></header>\n"
        f'<div class="cookie-banner">{banner}</div>\n<aside class="sidebar"><ul>{related}</ul></aside>\n'
        f"{tag}{main}</{tag[1:].split()[0].rstrip('>')}>\n<footer><p>{footer}</p></footer></body></html>\n"
    )


def spam(kind: str, rng: random.Random) -> str:
    """The main part of a page that no corpus should hold."""
    goods = rng.sample(("loans", "watches", "pills", "casino", "bonus", "replica", "cheap", "online", "buy", "free"), 4)
    if kind == "stuffing":
        return "<p>" + (" ".join(goods) + " ") * rng.randint(60, 200) + "</p>"
    if kind == "link farm":
        return "".join(f'<p><a href="/{i}">{" ".join(rng.sample(goods, 3))} {i}</a></p>' for i in range(150))
    if kind == "lorem ipsum":
        return f"<p>{LOREM * rng.randint(2, 6)}</p>"
    if kind == "no script":
        return f"<p>Please enable JavaScript in your browser to continue to {goods[0]}.</p>"
    if kind == "symbols":
        return "".join(f"<p>### {rng.choice(goods)} ... *** {rng.randint(0, 10**9)} ### ...</p>" for _ in range(80))
    if kind == "repeated paragraphs":
        return f"<p>Our {goods[0]} are the best that you can find, and we have sold them for many years.</p>" * 40
    return f"<p>Sorry, the page about {goods[0]} was not found.</p>"


SPAM_KINDS = ("stuffing", "link farm", "lorem ipsum", "no script", "symbols", "repeated paragraphs", "not found")


def plant(pages: Sequence[Page], seed: int) -> list[Sent]:
    """The pages on sites, and their copies, other charsets, truncated records and spam, in random order."""
    rng = random.Random(seed)  # noqa: S311
    sent = [send(page, "page", "", rng) for page in pages]
    english = [page for page in pages if page.language == "en"]
    for share in EDITS:
        for page in drawn(english, COPIED, rng):
            sent.append(send(page, "copy", f"{share:.0%}", rng, edited(page.main, share, rng)))
    for page in drawn([page for page in pages if page.language in CHARSETS], RECODED, rng):
        sent.append(recoded(page, rng))
    sent += [send(page, "truncated", "", rng, edited(page.main, 0.5, rng)) for page in drawn(pages, TRUNCATED, rng)]
    for page in drawn(english, TRUNCATED, rng):
        sent.append(send(page, "spam", "blocked site", rng, edited(page.main, 0.5, rng)))
    for i in range(max(len(SPAM_KINDS), int(SPAM * len(pages)))):
        kind = SPAM_KINDS[i % len(SPAM_KINDS)]
        sent.append(send(Page(f"spam/{i}", "en", spam(kind, rng)), "spam", kind, rng))
    rng.shuffle(sent)
    return sent


def inflated(pages: Sequence[Page], seed: int) -> Iterator[Sent]:
    """The pages again and again without end, in random order, with edits: one in ten stays a near-duplicate.

    What should be extracted of them is left out: to find it takes most of the time.
    """
    rng = random.Random(seed)  # noqa: S311
    for turn in count():
        for page in rng.sample(pages, len(pages)):
            share = 0.0 if turn == 0 else rng.choice((0.02, *(0.3,) * 9))
            again = Page(f"{page.name}-{turn}", page.language, edited(page.main, share, rng))
            yield send(again, "page", f"{share:.0%}", rng, text="")


def drawn(pages: Sequence[Page], share: float, rng: random.Random) -> list[Page]:
    return rng.sample(pages, min(len(pages), max(2, int(share * len(pages)))))


def send(
    page: Page, kind: str, detail: str, rng: random.Random, main: str | None = None, text: str | None = None
) -> Sent:
    """A page in UTF-8, as its header says. main: instead of the page's own; text: of what is visible in that."""
    main = page.main if main is None else main
    text = visible(main) if text is None else text
    site = rng.randrange(SITES)
    path = page.name if kind == "page" else f"{kind}/{detail.rstrip('%')}/{page.name}".replace(" ", "-")
    host = BLOCKED if detail == "blocked site" else ""
    original = "" if kind != "copy" else page.name
    planted = Planted(url(site, path, host), page.name, kind, detail, page.language, text, original)
    html = around(main, page.name, site, '<meta charset="utf-8">', rng)
    return Sent(planted, "text/html; charset=utf-8", html.encode())


def url(site: int, path: str, host: str = "") -> str:
    return f"https://{host or f'www.site-{site}.example'}/{path}.html"


def recoded(page: Page, rng: random.Random) -> Sent:
    """A page, with edits so that it is no copy, in another charset."""
    charset, declared = rng.choice(CHARSETS[page.language]), rng.choice(DECLARED)
    site, main = rng.randrange(SITES), page.main
    meta = f'<meta charset="{charset}">' if declared == DECLARED[0] else ""
    header = {DECLARED[1]: f"; charset={charset}", DECLARED[3]: "; charset=utf-8"}.get(declared, "")
    detail = f"{charset}, declared {declared}"
    planted = Planted(url(site, f"charset/{page.name}"), page.name, "charset", detail, page.language, visible(main))
    html = around(main, page.name, site, meta, rng)
    return Sent(planted, "text/html" + header, html.encode(charset, "xmlcharrefreplace"))


def write_warcs(sent: Iterable[Sent], folder: Path, name: str = "") -> Iterator[Planted]:
    """Write the pages as FOLDER/*.warc.gz, a gzip member for each record, and yield what is known of each."""
    folder.mkdir(parents=True, exist_ok=True)
    each, number = iter(sent), count()
    while some := list(islice(each, PER_FILE)):
        with (folder / f"{name}{(first := next(number)):05}.warc.gz").open("wb") as file:
            for i, page in enumerate(some):
                member = gzip.compress(record(page, first * PER_FILE + i), 6, mtime=0)
                file.write(member[: int(0.6 * len(member))] if page.planted.kind == "truncated" else member)
                yield page.planted


def record(sent: Sent, number: int) -> bytes:
    """A response record of WARC 1.1."""
    http = f"HTTP/1.1 200 OK\r\nContent-Type: {sent.content_type}\r\nContent-Length: {len(sent.body)}\r\n\r\n".encode()
    head = (
        f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:00000000-0000-4000-8000-{number:012}>\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Target-URI: {sent.planted.url}\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http) + len(sent.body)}\r\n\r\n"
    )
    return head.encode() + http + sent.body + b"\r\n\r\n"


def write_truth(planted: Iterable[Planted], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for each in planted:
            file.write(json.dumps(asdict(each), ensure_ascii=False) + "\n")


def read_truth(path: Path) -> list[Planted]:
    return [Planted(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
