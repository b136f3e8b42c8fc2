"""Data for fine-tuning that need no network: mined from the source of the Python standard library."""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llm.data.corpus import stdlib_files
from llm.files import complete_folder

FILES = "docstrings.jsonl", "packages.jsonl"
LONGEST_FUNCTION, LONGEST_ANSWER = 150, 160  # characters; no function fills 128 tokens of a small vocabulary
LONGEST_TEXT = 600
PACKAGES = {
    "asyncio", "concurrent", "distutils", "email", "encodings", "idlelib", "importlib", "json", "lib2to3",
    "multiprocessing", "tkinter", "unittest", "xml",
}  # fmt: skip


def mine(folder: Path) -> str:
    """Write FILES, what docstrings and pieces give, into a new folder; say how many lines. Raises OSError."""
    sources = [(path, path.read_text(encoding="utf-8", errors="replace")) for path in stdlib_files()]
    found = [
        [{"messages": messages} for _, source in sources for messages in docstrings(source)],
        [record for path, source in sources for record in labelled(path, source)],
    ]
    with complete_folder(folder) as partial:
        for name, lines in zip(FILES, found, strict=True):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (partial / name).write_text(text, encoding="utf-8")
    return ", ".join(f"{folder / name}: {len(lines):,} lines" for name, lines in zip(FILES, found, strict=True))


def docstrings(source: str) -> Iterator[list[dict[str, str]]]:
    """Conversations: a function without its docstring, answered by the first paragraph of that."""
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        summary = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
        node.body = node.body[1:] if summary else node.body
        code = ast.unparse(node)
        if 0 < len(summary) <= LONGEST_ANSWER and len(code) <= LONGEST_FUNCTION and summary.isprintable():
            yield [{"role": "user", "content": code}, {"role": "assistant", "content": summary}]


def labelled(path: Path, source: str) -> Iterator[dict[str, str]]:
    """`text`, classes and functions of a file, and `label`, its package, if that is one of PACKAGES."""
    package = path.relative_to(sysconfig.get_path("stdlib")).parts[0]
    for node in parsed(source).body if package in PACKAGES else ():
        text = ast.unparse(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(text) > LONGEST_TEXT // 10:
            yield {"text": text[:LONGEST_TEXT], "label": package}


def parsed(source: str) -> ast.Module:
    """The module; an empty one where a file is not of this Python's grammar."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
