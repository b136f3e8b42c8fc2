"""The site's Markdown: the reference made of the source, its links and its navigation (docs/build_site.py).

`make docs` builds the pages of it, and finds broken anchors: CI runs that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import build_site
import pytest
import site_checks
import site_reference

from llm.config.parse import parse
from llm.config.run import RunConfig
from llm.crawl.settings import CorpusConfig
from llm.errors import InputError
from llm.typed import dotted_keys

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/guide/01-tokens.md")


def entries(page: str) -> dict[str, str]:
    """The text below each heading of the third level."""
    parts = re.split(r"^### `(.+)`$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("config", "page"), [(RunConfig, site_reference.run_settings), (CorpusConfig, site_reference.corpus_settings)]
)
def test_every_setting_has_its_entry(config, page):
    found = entries(page())
    assert set(found) == set(dotted_keys(config))
    for key, text in found.items():
        assert re.match(r"\n\n`+ ?.+, default `.+`\n\n\S", text), key


def test_an_entry_says_type_default_meaning_and_checks():
    text = entries(site_reference.run_settings())["optim.lr"]
    assert text.split("\n\n")[1:3] == ["`float`, default `0.004`", "Peak learning rate."]
    assert "- `optim.lr is …; expected above 0`" in text


@dataclass(frozen=True)
class Untold:
    """A config of which one key lacks its text."""

    told: int = 1
    """Has one."""
    untold: int = 2


def test_a_setting_without_text_is_seen():
    with pytest.raises(ValueError, match=r"^untold has no text"):
        list(site_reference.keys(Untold))


@pytest.mark.parametrize(
    ("config", "key", "values"),
    [
        (RunConfig, "optim.lr", ["--optim.lr=-1"]),
        (RunConfig, "train.max_steps", ["--train.max_steps=0"]),
        (RunConfig, "model.attention_window", ["--model.attention_window=0"]),
        (RunConfig, "model.attention_sparse", ["--model.attention_sparse={block: 1, local: 1, stride: 1}"]),
        (RunConfig, "data.phases", ["--data.phases=[{samples: 33}]"]),
        (RunConfig, "data.blend", ["--data.blend={}"]),
        (RunConfig, "model.n_kv_head", ["--parallel.tensor_parallel=3"]),
        (RunConfig, "train.engine", ["--train.engine=plain", "--parallel.zero_stage=1"]),
        (RunConfig, "data.path", ["--finetune.task=chat", "--data.path=x"]),
        (CorpusConfig, "filter.quality.bits", ["--filter.quality.bits=0"]),
        (CorpusConfig, "filter.rules", ["--filter.rules=[contamination]"]),
        (CorpusConfig, "dedup.bands", ["--dedup.bands=0"]),
    ],
)
def test_what_is_refused_stands_with_the_key(config, key, values):
    with pytest.raises(InputError) as refused:
        parse(config, values, "x")
    page = entries(site_reference.settings_page(config, "", ""))[key]
    patterns = [re.escape(text).replace("…", ".*") for text in re.findall(r"^- `+ ?(.*…?.*?) ?`+$", page, re.MULTILINE)]
    assert any(re.search(pattern, str(refused.value)) for pattern in patterns), (str(refused.value), patterns)


def test_every_check_stands_somewhere():
    for config, page in (
        (RunConfig, site_reference.run_settings()),
        (CorpusConfig, site_reference.corpus_settings()),
    ):
        missing = [text for text in site_checks.checks(config) if text not in page]
        assert [text for text in missing if not text.startswith("…")] == []


def test_every_public_function_has_its_docstring():
    found = entries(site_reference.functions_page())
    assert set(found) == set(site_reference.public_names())
    for name, text in found.items():
        module, _, last = name.rpartition(".")
        if module == "llm.crawl.engines.datatrove":
            continue  # imports a package that is not among the pinned ones
        first = (getattr(import_module(module), last).__doc__ or "").strip().splitlines()[0]
        assert site_reference.plain(first) in text, name


def test_what_pages_import_and_packages_list_is_public():
    names = set(site_reference.public_names())
    assert {
        "kernels.attention.attention",  # __all__
        "kernels.rope.rope_qkv",  # named in full in docs/kernels.md
        "llm.data.loader.token_batches",  # imported in docs/library.md
        "llm.model.gpt.GPT",
    } <= names
    assert "llm.train.loop.Trainer" not in names


def test_a_function_without_docstring_is_seen():
    with pytest.raises(ValueError, match="has no docstring"):
        site_reference.entry("kernels.attention.op.check_shapes")


def test_a_docstring_becomes_paragraphs():
    text = site_reference.docstring("One <b>.\n\nRaises:\n    ValueError: if a*b.\nReturns c.\n\n    x = a * b")
    assert text == "One &lt;b>.\n\n\nRaises:\n\n`ValueError`: if a\\*b.\n\nReturns c.\n\n\n    x = a * b"


def test_links_that_leave_docs_lead_to_a_page_of_the_file():
    problems: list[str] = []
    pages = {PAGE: "", Path("docs/data.md"): "", Path("docs/howto/README.md"): ""}
    text = (
        "[a](../../llm/model/gpt.py) [b](../data.md#x) [c](../howto/README.md) [d](#e) [f](https://x.org) "
        "[g](../../README.md#h) [i](../../launch/configs) ![p](../lstm.png) `[q](none.md)`\n\n"
        "```text\n[r](none.md)\n```\n"
    )
    found, linked = build_site.rewritten(PAGE, text, pages, problems)
    assert problems == []
    assert found == (
        "[a](../source/llm/model/gpt.py.md) [b](../data.md#x) [c](../howto/index.md) [d](#e) [f](https://x.org) "
        "[g](../source/README.md#h) [i](../source/launch/configs/index.md) ![p](../lstm.png) `[q](none.md)`\n\n"
        "```text\n[r](none.md)\n```\n"
    )
    assert {Path("llm/model/gpt.py"), Path("docs/lstm.png")} < linked


@pytest.mark.parametrize("target", ["none.md", "../../llm/none.py", "../../../README.md", "/etc/passwd", "none.svg"])
def test_a_broken_link_is_seen(target):
    problems: list[str] = []
    build_site.rewritten(PAGE, f"[x]({target})", {PAGE: ""}, problems)
    assert problems == [f"{PAGE}: the link to {target} leads nowhere"]


def test_an_inner_list_that_the_site_would_flatten_is_seen():
    problems: list[str] = []
    build_site.rewritten(PAGE, "- a\n  - b\n\n```yaml\n- a\n  - b\n```\n- c\n    - d\n", {PAGE: ""}, problems)
    assert problems == [f"{PAGE}: a list within a list is indented by four spaces: - b"]


def test_the_navigation_has_every_page_in_order():
    names = ["howto/profile", "howto/my-data", "howto/another", "guide/02-b", "guide/01-a", "guide/README", "index"]
    problems: list[str] = []
    pages = {Path(f"docs/{name}.md"): f"# Of `{name}`\n" for name in names}
    found = build_site.navigation({**build_site.pages_of(), **pages}, problems)
    assert problems == []
    assert [next(iter(section)) for section in found][:4] == ["Start", "Guide", "How to", "Reference"]
    guide = [next(iter(page.values())) for page in found[1]["Guide"]]
    assert guide[:2] == ["guide/index.md", "guide/01-a.md"] and guide[1:] == sorted(guide[1:])
    listed = [next(iter(page.values())) for page in found[2]["How to"]]
    assert listed.index("howto/my-data.md") < listed.index("howto/profile.md") < listed.index("howto/another.md")
    assert {"Of guide/01-a": "guide/01-a.md"} in found[1]["Guide"]


def test_a_page_without_place_and_a_place_without_page_are_seen():
    pages = {**build_site.pages_of(), Path("docs/new.md"): "# New", Path("docs/poems/one.md"): "# One"}
    del pages[Path("docs/lstm.md")]
    problems: list[str] = []
    build_site.navigation(pages, problems)
    assert problems == [
        "the navigation has lstm.md, which is no page",
        "docs/new.md: the navigation of docs/build_site.py does not have it",
        "docs/poems/one.md: the navigation of docs/build_site.py does not have it",
    ]


def test_the_pages_are_written_without_problems(tmp_path):
    assert build_site.write_sources(tmp_path) == []
    written = {path.relative_to(tmp_path / "src").as_posix() for path in (tmp_path / "src").rglob("*.*")}
    assert {"index.md", "reference/settings.md", "source/llm/config/sections.py.md", "first-run.svg"} <= written


def test_the_reference_needs_no_package_beside_the_generator():
    """Its environment has neither torch nor what the product needs."""
    probe = (
        "import sys; sys.path[:0] = ['.', 'docs']\n"
        "for name in ('torch', 'numpy', 'yaml', 'tokenizers', 'pyarrow'): sys.modules[name] = None\n"
        "import site_reference\nprint(sum(len(make()) for make in site_reference.PAGES.values()))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<a href="https://x.org">', 0),
        ('<script src="https://x.org/a.js">', 1),
        ('<link rel="stylesheet" href="//x.org/a.css">', 1),
        ('<img alt="a" src="http://x.org/a.png">', 1),
        ("a { background: url('https://x.org/a.png') }", 1),
        ('@import "https://x.org/a.css"', 1),
        ('<img src="a.svg"> url(a.svg)', 0),
    ],
)
def test_what_a_browser_would_fetch_from_elsewhere_is_seen(text, found, tmp_path):
    (tmp_path / "page.html").write_text(text)
    assert len(build_site.fetched(tmp_path)) == found
