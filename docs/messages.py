"""Compares the messages of the sources with docs/troubleshooting: each needs an entry, which lists patterns.

    python docs/messages.py                  messages without an entry, and patterns that match no message
    python docs/messages.py --of llm/data    all messages of these files; `-` stands before those without an entry

A pattern is a line of a ```text block, `…` for each part that varies. It matches a message if its fixed parts occur in
the message in this order. The exit code is 1 if anything is missing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES, FOLDERS = ROOT / "docs" / "troubleshooting", ("llm", "kernels", "launch", "csrc")
HOLE = "…"
ERRORS = re.compile(r"[A-Z]\w*Error|BadHost|DamagedFile|Agreed|Stopped|SystemExit|Unreadable|warnings\.append")
# Other calls, and which argument of them is a message.
CHECKS = {"require": 1, "expect": 1, "_expect": 1, "Verdict": 1, "fail": 0, "error": 0, "_diverged": 0}
# Functions that return messages, which others print or raise.
WRITERS = {"surplus", "compare_tokenizers", "repetitions", "replica_message"}
WRITERS |= {"limits", "no_triton", "why_not_triton", "why_not_gluon", "wrong_documents", "wrong_options", "_fault"}
SPOKEN = ("warning: ", "note: ", "error: ", "given up: ")  # a text that begins so is a message wherever it stands
# A text without words of its own: what it is put together from is a message elsewhere.
BARE = re.compile(rf"(?:(?:warning|note|error): )?(?:{HOLE}|\W|\b\w{{1,2}}\b)*")
MOST, MIN_LETTERS = 6, 6  # variants of a part that are told apart; letters of a pattern

Names = dict[str, list[tuple[int, ast.expr]]]  # what a name is assigned: the statement's column, and the value


class Line(NamedTuple):
    """A message of a source, or a pattern of a page."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def matches(pattern: Line, message: Line) -> bool:
    return re.search(".*".join(re.escape(part.strip()) for part in pattern.text.split(HOLE)), message.text) is not None


def tidy(text: str) -> str:
    """One line, with one hole where several are side by side."""
    return re.sub(rf"{HOLE}+", HOLE, " ".join(text.split()))


def joined(choices: Iterable[list[str]]) -> list[str]:
    """Every way to take one text of each choice, one after another; a choice of many is a hole."""
    return ["".join(texts) for texts in product(*(each if len(each) <= MOST else [HOLE] for each in choices))]


def walk(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of these statements in their order, without those of functions within them."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield from walk(ast.iter_child_nodes(node))


def assigned(body: Iterable[ast.AST]) -> Names:
    found: Names = {}
    for node in walk(body):
        if isinstance(node, ast.Assign):
            names, values = node.targets[:1], [node.value]
            if isinstance(names[0], ast.Tuple) and isinstance(values[0], ast.Tuple):
                names, values = names[0].elts, values[0].elts
            for name, value in zip(names, values, strict=True):
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append((node.col_offset, value))
    return found


class Reader(ast.NodeVisitor):
    """Collects the messages of one Python file in `found`, as (line, text)."""

    def __init__(self, tree: ast.Module, imported: Names) -> None:
        self.found: set[tuple[int, str]] = set()
        self.names = imported | assigned(tree.body)
        self.at = (0, 0)  # line and column of the statement
        self.function = ""
        self.visit(tree)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self.at = (node.lineno, node.col_offset)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.names, self.function
        self.function = node.name
        arguments = {each.arg for each in [*node.args.args, *node.args.kwonlyargs]}
        self.names = {name: found for name, found in self.names.items() if name not in arguments} | assigned(node.body)
        self.generic_visit(node)
        self.names, self.function = outer

    def visit_Return(self, node: ast.Return) -> None:
        if self.function in WRITERS and node.value is not None:
            self.message(*(node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func)
        number = 0 if ERRORS.fullmatch(function) else CHECKS.get(function.rpartition(".")[2])
        if number is not None and len(node.args) > number:
            self.message(node.args[number])
        self.generic_visit(node)

    def visit_List(self, node: ast.List) -> None:
        if "*warnings" in ast.unparse(node):
            self.message(node)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if isinstance(node.values[0], ast.Constant) and str(node.values[0].value).startswith(SPOKEN):
            self.message(node)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):  # no constants: they are parts of this text
                self.visit(part.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.startswith(SPOKEN):
            self.message(node)

    def message(self, *nodes: ast.expr) -> None:
        found = {(node.lineno, tidy(text)) for node in nodes for text in self.texts(node, self.names)}
        self.found |= {(line, text) for line, text in found if not BARE.fullmatch(text)}

    def texts(self, node: ast.expr, names: Names) -> list[str]:
        """What a text may be, as far as its file says it: each variant, with holes."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return joined(self.texts(part, names) for part in parts)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self.texts(value, names)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return joined([self.texts(left, names), self.texts(right, names)])
            case ast.IfExp(body=one, orelse=other):
                return sorted({*self.texts(one, names), *self.texts(other, names)})
            case ast.ListComp(elt=part):
                return self.texts(part, names)
            case ast.BoolOp(values=parts) | ast.List(elts=parts):
                return sorted({text for part in parts for text in self.texts(part, names)})
            case ast.Call(func=ast.Attribute(value=text, attr="format")):
                return [re.sub(r"\{.*?\}", HOLE, each) for each in self.texts(text, names)]
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[ast.List(elts=parts)]):
                return joined(texts for part in parts for texts in (self.texts(part, names), [HOLE]))
            case ast.Name(id=name) if name in names:
                rest = {other: found for other, found in names.items() if other != name}
                return sorted({text for value in self.current(names[name]) for text in self.texts(value, rest)})
        return [HOLE]

    def current(self, values: list[tuple[int, ast.expr]]) -> list[ast.expr]:
        """Of a name's values those that hold at the statement: the last before it, and, if in a branch, others."""
        found = []
        for at, value in reversed([each for each in values if each[1].lineno <= self.at[0]] or values):
            found.append(value)
            if at <= self.at[1]:
                break
        return found


def of_python(path: Path) -> set[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    imported: Names = {}  # what other modules of ours assign to the names that this one imports from them
    for node in (each for each in tree.body if isinstance(each, ast.ImportFrom)):
        source = (ROOT / (node.module or "").replace(".", "/")).with_suffix(".py")
        theirs = assigned(ast.parse(source.read_text()).body) if source.is_file() else {}
        imported |= {each.asname or each.name: theirs[each.name] for each in node.names if each.name in theirs}
    return Reader(tree, imported).found


def of_shell(path: Path) -> Iterator[tuple[int, str]]:
    """`error: ...` and the like that are printed, and what ${NAME:?...} says."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for match in re.finditer(r'"((?:error|warning|note): [^"]+)|:\?([^}]+)}', line):
            yield number, tidy(re.sub(r"\$\w+|\$?\$[{(].*?[})]", HOLE, match[1] or match[2]))


def of_cpp(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of `throw ...(...)`, `fail(...)` and `require(...)`, with a hole for all that is between them."""
    source = path.read_text()
    for start in re.finditer(r"(?:\bthrow [\w:]+|(?<![\w:])(?:fail|require))\(", source):
        text, end = "", start.end()
        for part in re.finditer(r'[^";]*"((?:[^"\\]|\\.)*)"|;', source[end:]):
            if part[0] == ";":
                break
            between = "" if re.match(r'\s*"', part[0]) else HOLE  # texts side by side are one
            text += between + part[1].replace("\\", "")
        if not BARE.fullmatch(text):
            yield source.count("\n", 0, end) + 1, tidy(text + HOLE)


def messages() -> list[Line]:
    """Every message of the sources, in the order of files and lines."""
    readers = {".py": of_python, ".sh": of_shell, "": of_shell, ".sbatch": of_shell, ".cpp": of_cpp, ".h": of_cpp}
    paths = [ROOT / "Makefile", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())]
    used = [path for path in paths if path.suffix in readers and "tests" not in path.parts]
    return sorted({Line(str(path.relative_to(ROOT)), *each) for path in used for each in readers[path.suffix](path)})


def patterns(pages: Path = PAGES) -> list[Line]:
    """The lines of the ```text blocks of every page."""
    found = []
    for page in sorted(pages.glob("*.md")):
        fence = ""
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("```"):
                fence = line if not fence else ""
            elif fence == "```text" and line.strip():
                found.append(Line(str(Path(*page.parts[-3:])), number, tidy(line)))
    return found


def missing(said: list[Line], listed: list[Line]) -> list[Line]:
    return [message for message in said if not any(matches(pattern, message) for pattern in listed)]


def dead(said: list[Line], listed: list[Line]) -> list[Line]:
    """Patterns that match no message, or have hardly a word and would match too many."""
    short = {each for each in listed if len(re.findall(r"\w", each.text)) < MIN_LETTERS}
    return [each for each in listed if each in short or not any(matches(each, message) for message in said)]


def main(argv: list[str]) -> int:
    said, listed = messages(), patterns()
    lost = missing(said, listed)
    if argv[:1] == ["--of"]:
        shown = [each for each in said if each.path.startswith(tuple(argv[1:]))]
        print("\n".join(f"{'-' if each in lost else ' '} {each}" for each in shown))
        return int(any(each in lost for each in shown))
    found = [f"no entry: {each}" for each in lost] + [f"no such message: {each}" for each in dead(said, listed)]
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
