"""Builds the site of these pages: `make docs`, or `python docs/build_site.py`, which needs docs/requirements.txt.

build/site/src is written from docs/ and from the source (docs/site_reference.py), then Zensical makes build/site/html
of it. A link out of docs/ leads to a page that shows the file. A broken link or anchor, a page that the navigation
does not have, and anything that a browser would fetch from elsewhere are errors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from site_reference import PAGES  # noqa: E402

OUT = ROOT / "build/site"
# The navigation: single pages in order, or a folder, of which the pages named come first and the others by name.
NAVIGATION: tuple[tuple[str, tuple[str, ...] | str, str], ...] = (
    ("Guide", "guide", "README"),
    ("How to", "howto", "README my-data my-cluster kernel-in-my-model fine-tune export profile"),
    (
        "Reference",
        (
            *("reference/settings.md", "reference/corpus-settings.md", "reference/functions.md", "launching.md"),
            *("data.md", "corpus.md", "parallelism.md", "reliability.md", "finetune.md", "generate.md"),
            *("evaluation.md", "weights.md", "profiling.md", "lstm.md", "kernels.md", "library.md", "architecture.md"),
            "glossary.md",
        ),
        "",
    ),
    ("Troubleshooting", "troubleshooting", "README settings data corpus training checkpoints cluster models"),
    ("Benchmarks", ("benchmarks.md",), ""),
    ("Decisions", "decisions", "README"),
)
START = "index.md"
PICTURES = (".svg", ".png")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".sh": "bash", ".yaml": "yaml", "": "make"}
# A link's end, unless it stands in code.
LINK = re.compile(r"^(```+).*?^\1`*$|`[^`\n]+`|\]\((?P<target>[^()\s]+)\)", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^(```+).*?^\1`*$", re.MULTILINE | re.DOTALL)
FETCHED = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*"
    r"|(?:url\(|@import)[\"' ]*(?:https?:)?//[^)]*"
)
SETTINGS: dict[str, Any] = {
    "site_name": "Ingot",
    "site_description": "Trains GPT language models from scratch, on a laptop's CPU or many nodes of GPUs.",
    "docs_dir": "src",
    "site_dir": "html",
    "use_directory_urls": False,  # pages are files, which a browser opens without a server
    "extra_css": ["site.css"],
    "extra_javascript": ["site.js"],
    "theme": {
        "name": "material",
        "font": False,
        "features": [
            *("navigation.tabs", "navigation.indexes", "navigation.top", "navigation.footer", "navigation.path"),
            *("content.code.copy", "search.highlight"),
        ],
        "palette": [
            {"media": f"(prefers-color-scheme: {name})", "scheme": scheme, "toggle": {"icon": icon, "name": other}}
            for name, scheme, icon, other in (
                ("light", "default", "lucide/sun", "To the dark palette"),
                ("dark", "slate", "lucide/moon", "To the light palette"),
            )
        ],
    },
    "plugins": ["search"],
    "markdown_extensions": [
        "tables",
        "sane_lists",
        {"toc": {"permalink": True, "toc_depth": "2-3", "slugify": "SLUGIFY"}},
        {"pymdownx.highlight": {"use_pygments": True}},
        "pymdownx.superfences",
    ],
}


def place(path: Path) -> Path:
    """Where build/site/src has a file of the repository: pages of docs/ as they lie, others below source/."""
    if path.parts[0] == "docs" and path.suffix in (".md", *PICTURES):
        inside = path.relative_to("docs")
        return inside.with_name("index.md") if inside.name == "README.md" else inside
    if (ROOT / path).is_dir():
        return "source" / path / "index.md"
    return Path("source", path if path.suffix == ".md" else f"{path}.md")


def pages_of() -> dict[Path, str]:
    """The text of every page of docs/, and of the generated ones, by its path in the repository."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    written = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in found}
    return {**written, **{Path("docs", name): make() for name, make in PAGES.items()}}


def source_page(path: Path) -> str:
    """A page that shows a file, or the names in a folder, which the search passes over."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    file = ROOT / path
    if file.is_dir():
        return head + "\n".join(["````text", *sorted(each.name for each in file.iterdir()), "````"]) + "\n"
    text = file.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"{head}````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def rewritten(page: Path, text: str, pages: dict[Path, str], problems: list[str]) -> tuple[str, set[Path]]:
    """The text with its links as they are on the site, and the files that they lead to; adds to `problems`."""
    linked: set[Path] = set()

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or target.startswith("#") or re.match(r"[a-z]+:", target):
            return match[0]
        name, mark, anchor = target.partition("#")
        path = Path(os.path.normpath(page.parent / name))
        if path not in pages and (path.is_absolute() or ".." in path.parts or not (ROOT / path).exists()):
            problems.append(f"{page}: the link to {target} leads nowhere")
            return match[0]
        linked.add(path)
        return f"]({os.path.relpath(place(path), place(page).parent)}{mark}{anchor})"

    for line in FENCED.sub("", text).splitlines():
        if re.match(r" {1,3}(?:[-*]|\d+\.) ", line):
            problems.append(f"{page}: a list within a list is indented by four spaces: {line.strip()}")
    return LINK.sub(link, text), linked


def navigation(pages: dict[Path, str], problems: list[str]) -> list[dict[str, Any]]:
    """The navigation, each page with its heading as title; adds pages that are missing here or there to `problems`."""
    left = {place(page).as_posix(): page for page in pages}
    found: list[dict[str, Any]] = [{"Start": START}]
    left.pop(START, None)
    for title, where, first in NAVIGATION:
        names = list(where)
        if isinstance(where, str):
            order = [f"{where}/{'index' if name == 'README' else name}.md" for name in first.split()]
            inside = sorted(name for name in left if name.startswith(f"{where}/"))
            names = [*(name for name in order if name in inside), *(name for name in inside if name not in order)]
        problems += [f"the navigation has {name}, which is no page" for name in names if name not in left]
        entries = [{heading(pages[left.pop(name)], name): name} for name in names if name in left]
        found += [{title: entries}] * bool(entries)
    problems += [f"{page}: the navigation of docs/build_site.py does not have it" for page in left.values()]
    return found


def heading(text: str, name: str) -> str:
    """A page's first heading, as plain text."""
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return match[1].replace("`", "") if match else name


def write_sources(folder: Path) -> list[str]:
    """Write the site's Markdown, pictures and settings below `folder`; what is wrong with it is returned."""
    problems: list[str] = []
    pages = pages_of()
    settings = json.dumps({**SETTINGS, "nav": navigation(pages, problems)}, indent=1)
    slug = '!!python/object/apply:pymdownx.slugs.slugify {"kwds": {"case": "lower"}}'
    (folder / "src").mkdir(parents=True)
    (folder / "mkdocs.yml").write_text(settings.replace('"SLUGIFY"', slug), encoding="utf-8")
    todo, done = list(pages), set[Path]()
    while todo:
        page = todo.pop()
        done.add(page)
        target = folder / "src" / place(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix in PICTURES:
            shutil.copyfile(ROOT / page, target)
            continue
        text = pages[page] if page in pages else source_page(page)
        linked: set[Path] = set()
        if page.suffix == ".md":
            text, linked = rewritten(page, text, pages, problems)
        target.write_text(text, encoding="utf-8")
        todo += linked - done - {*todo}
    for name in ("site.css", "site.js"):
        shutil.copyfile(ROOT / "docs" / name, folder / "src" / name)
    return problems


def fetched(html: Path) -> list[str]:
    """What the pages and style sheets of a site would fetch from elsewhere."""
    files = [path for path in sorted(html.rglob("*")) if path.suffix in (".html", ".css")]
    return [f"{path.relative_to(html)}: {match[0]}" for path in files for match in FETCHED.finditer(path.read_text())]


def stop(problems: list[str]) -> None:
    """End with the problems, if there are any."""
    if problems:
        raise SystemExit("\n".join(["error: the site has not been built", *problems]))


def main() -> None:
    shutil.rmtree(OUT / "src", ignore_errors=True)
    stop(write_sources(OUT))
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    if subprocess.run(zensical, cwd=OUT, check=False).returncode:
        raise SystemExit("error: the site has not been built: see above")
    index = (OUT / "html/search.json").read_text(encoding="utf-8")
    (OUT / "html/search.js").write_text(f"var __index = {index}\n", encoding="utf-8")  # read where there is no server
    stop(fetched(OUT / "html"))
    print(f"the site: {OUT / 'html/index.html'}")


if __name__ == "__main__":
    main()
