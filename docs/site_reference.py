"""The site's generated pages: every setting, and every public function, read from the source (docs/build_site.py).

A function is public if a package's `__all__` lists it, or a page of docs/ imports it in a Python block or names it in
full, as in `kernels.rope.rope_qkv`. Functions are read as syntax, so that no page needs torch.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from site_checks import HOLE, checks, named

from llm.config.help import field_docs
from llm.config.run import RunConfig
from llm.crawl.settings import CorpusConfig
from llm.typed import describe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "llm")
OUTSIDE = "Outside the sections"
SOURCE = "../.."  # from a page of docs/reference/
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`((?:kernels|llm)(?:\.\w+)+)`")
HEADINGS = ("Args:", "Raises:", "Returns:")
SHOWN = ("classmethod", "property", "staticmethod")  # decorators


@dataclass(frozen=True)
class Key:
    """A setting, or a section of settings."""

    name: str
    kind: Any
    default: Any
    meaning: str


def keys(config: type, prefix: str = "") -> Iterator[Key]:
    """A section and its keys, then the sections in it. Raises ValueError for a key without a text."""
    defaults, hints, texts = config(), get_type_hints(config), field_docs(config)
    inner = [each.name for each in fields(config) if is_dataclass(hints[each.name])]
    yield Key(prefix.rstrip("."), config, None, inspect.cleandoc(config.__doc__ or ""))
    for name in (each.name for each in fields(config) if each.name not in inner):
        if not texts.get(name):
            raise ValueError(f"{prefix}{name} has no text below its field in {config.__name__}")
        yield Key(prefix + name, hints[name], getattr(defaults, name), texts[name])
    for name in inner:
        yield from keys(hints[name], f"{prefix}{name}.")


def records(kind: Any) -> list[type]:
    """The dataclasses that the values of a type may hold."""
    return [kind] if is_dataclass(kind) else [each for part in get_args(kind) for each in records(part)]


def setting(key: Key, messages: list[str]) -> str:
    """The entry of one setting: type, default, meaning, and what is refused."""
    default = key.default if isinstance(key.default, str) and key.default else json.dumps(key.default)
    parts = [f"### `{key.name}`", f"{quoted(describe(key.kind))}, default {quoted(default)}", plain(key.meaning)]
    names = [key.name]
    for record in dict.fromkeys(records(key.kind)):
        hints, texts = get_type_hints(record), field_docs(record)
        names += texts
        parts.append(plain(inspect.cleandoc(record.__doc__ or "")))
        parts.append("\n".join(f"- `{name}` (`{describe(hints[name])}`): {plain(texts[name])}" for name in texts))
    return "\n\n".join([*parts, *refused("Refused:", [text for text in messages if named(names, text)])])


def refused(heading: str, messages: list[str]) -> list[str]:
    """A list of messages, or nothing."""
    return [heading + "\n\n" + "\n".join(f"- {quoted(text)}" for text in messages)] if messages else []


def settings_page(config: type, title: str, above: str) -> str:
    """All settings of a config, section by section."""
    messages = checks(config)
    parts = [f"# {title}", above]
    for key in keys(config):
        if not is_dataclass(key.kind):
            parts.append(setting(key, messages))
            continue
        several = [text for text in messages if f"{key.name}.{HOLE}" in text]
        parts += [f"## {key.name or OUTSIDE}", *[plain(key.meaning)] * bool(key.name)]
        parts += refused("Refused of several keys:", several)
    return "\n\n".join(parts) + "\n"


def run_settings() -> str:
    return settings_page(
        RunConfig,
        "Settings of a run",
        "Every key of a run's YAML file, which a command line overrides: `--optim.lr=1e-3`. `launch/pretrain.py "
        "--help` prints the same. A value of another type, an unknown key and what is listed as refused end the "
        "command with exit code 2, before anything starts. `…` stands for what was found.",
    )


def corpus_settings() -> str:
    return settings_page(
        CorpusConfig,
        "Settings of a corpus",
        "Every key of the YAML file that turns raw pages into a corpus ([the stages](../corpus.md)). "
        "`launch/prepare_data.py all --help` prints the same. `…` stands for what was found.",
    )


def module_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def definition(name: str) -> tuple[str, Path, ast.FunctionDef | ast.ClassDef] | None:
    """Where the function or class of a dotted name is written, through the packages that pass it on."""
    module, _, last = name.rpartition(".")
    file = module_file(module)
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file else []:
        match node:
            case ast.FunctionDef() | ast.ClassDef() if file and node.name == last:
                return name, file, node
            case ast.ImportFrom(module=str(source)) if last in [alias.name for alias in node.names]:
                return definition(f"{source}.{last}")
    return None


def public_names() -> list[str]:
    """The dotted names of all public functions and classes, sorted. Raises ValueError for one that is nowhere."""
    names, mentioned = set(), set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            module = ".".join(path.parent.relative_to(ROOT).parts)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    names |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        mentioned |= set(PATH.findall(text))
        for node in (node for block in BLOCK.findall(text) for node in ast.walk(ast.parse(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    if missing := [name for name in names if definition(name) is None]:
        raise ValueError(f"no function or class is called {', '.join(sorted(missing))}")
    return sorted(names | {name for name in mentioned if definition(name)})


def functions_page() -> str:
    """All public functions: signature and docstring, by module."""
    parts = [
        "# Public functions",
        "What a program of yours may import ([examples](../library.md)), from the docstrings. Shapes stand in "
        "brackets: [B, T, H, D].",
    ]
    above = ""
    for name in public_names():
        module = name.rpartition(".")[0]
        if module != above:
            text = ast.get_docstring(ast.parse((module_file(module) or ROOT).read_text(encoding="utf-8")))
            parts += [f"## `{module}`", plain((text or "").split("\n\n")[0])]
        above = module
        parts.append(entry(name))
    return "\n\n".join(parts) + "\n"


def entry(name: str) -> str:
    """A function with its signature, or a class with those of its methods. Raises ValueError without a docstring."""
    found = definition(name)
    text = found and ast.get_docstring(found[2])
    if not found or not text:
        raise ValueError(f"{name} has no docstring")
    file, node = found[1:]
    source = file.read_text(encoding="utf-8").splitlines()
    parts = [f"### `{name}`", f"In [{file.relative_to(ROOT)}]({SOURCE}/{file.relative_to(ROOT)})."]
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([*parts, signature(node, source), docstring(text, node)])
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    parts.append(docstring(text, *[methods[each] for each in methods if each == "__init__"]))
    values = [f"    {ast.unparse(each)}" for each in node.body if isinstance(each, ast.AnnAssign)]
    if node.name in SECTIONS:
        parts.append(f"The [settings]({SECTIONS[node.name]}) explain each field.")
    elif values:
        parts.append("\n".join(["```python", f"class {node.name}:", *values, "```"]))
    for method in methods.values():
        text = ast.get_docstring(method) or ""
        if method.name == "__init__" or (text and not method.name.startswith("_")):
            parts += [signature(method, source), docstring(text, method)]
    return "\n\n".join(parts)


def signature(node: ast.FunctionDef, source: list[str]) -> str:
    """A definition's head as it is written."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list if ast.unparse(each) in SHOWN)])
    head = inspect.cleandoc("\n".join(["", *source[first - 1 : node.body[0].lineno - 1]]))
    return f"```python\n{head.replace('  # fmt: skip', '')}\n```"


def docstring(text: str, *nodes: ast.FunctionDef) -> str:
    """A docstring as Markdown: parameters and what is raised or returned begin paragraphs; indented lines are code."""
    names = {each.arg for node in nodes for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    lines, listed, code = list[str](), False, False
    for line in text.splitlines():
        listed = line in HEADINGS or (listed and line.startswith(" "))
        item = re.match(r"(\w+(?:, \w+)*): (.*)", line[4:] if listed else line)
        begins = re.match(r"(Raises|Returns?)\b", line)
        indented = line.startswith("    ") and not listed
        lines += [""] * bool(begins or indented != code)
        code = indented
        if item and (listed or {*item[1].split(", ")} <= names):
            lines += ["", f"`{item[1]}`: {plain(item[2])}"]
        else:
            lines.append(line if indented else plain(line.strip()))
    return "\n".join(lines).strip()


def plain(text: str) -> str:
    """Text of a docstring in which Markdown finds no HTML and no emphasis; code in backticks stays."""
    parts = re.split(r"(`[^`\n]*`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts)
    )


def quoted(message: str) -> str:
    """A message as code."""
    return f"`` {message} ``" if "`" in message else f"`{message}`"


SECTIONS = {
    key.kind.__name__: f"{page}#{key.name.replace('.', '') or OUTSIDE.lower().replace(' ', '-')}"
    for config, page in ((CorpusConfig, "corpus-settings.md"), (RunConfig, "settings.md"))
    for key in keys(config)
    if is_dataclass(key.kind)
}
PAGES = {
    "reference/settings.md": run_settings,
    "reference/corpus-settings.md": corpus_settings,
    "reference/functions.md": functions_page,
}
