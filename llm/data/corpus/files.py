"""Which files of a file, folder or glob hold text, by their names, and how many others there are."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from llm.errors import InputError, require

NAME = re.compile(r"(?is).+\.(?:(txt|jsonl|ndjson|json)(?:\.(?:gz|bz2|xz|zst))?|(parquet|arrow|feather))")
EXPECTED = ".txt, .jsonl, .ndjson or .json (or these with .gz, .bz2, .xz or .zst), .parquet, .arrow or .feather"
# What Hugging Face's `datasets` writes beside its data.
ABOUT_DATA = re.compile(r"dataset_(?:dict|info|infos)\.json|state\.json|cache-.*\.arrow")
SUFFIX = re.compile(r"(?<=.)\.[a-z][a-z0-9]{0,7}\Z")  # one that can be shown


def kind_of(path: Path) -> str | None:
    """txt, jsonl, ndjson, json, parquet, arrow or feather, by the file's name; None: no text."""
    match = NAME.fullmatch(path.name)
    return match and (match[1] or match[2]).lower()


def list_files(source: str) -> tuple[list[Path], dict[str, int]]:
    """The text files of a file, folder or glob in the order of their paths, and how many others it has, by suffix.

    Folders are searched through, links followed, hidden files left out. A file that several names lead to is read
    by the first of them. Raises InputError where there is no text file, and where one is a link to nothing.
    """
    if os.path.isfile(source):
        require(kind_of(Path(source)) is not None, f"data.source {source}: expected a name that ends in {EXPECTED}")
        return [Path(source)], {}
    roots = [source] if os.path.isdir(source) else glob.glob(source)
    require(bool(roots), f"data.source {source} does not exist; expected `stdlib`, a file, a folder or a glob")
    files, others, seen = list[Path](), Counter[str](), set[str]()
    for path in sorted(_walk(roots), key=Path.as_posix):
        real = os.path.realpath(path)
        if kind_of(path) is None or ABOUT_DATA.fullmatch(path.name):
            suffix = SUFFIX.search(path.name.lower())
            others[suffix[0] if suffix else "without a known suffix"] += 1
        elif real in seen:
            others["further links to a file"] += 1
        else:
            require(path.is_file(), f"{path} is no file, or a link to nothing; restore what it names or remove it")
            seen.add(real)
            files.append(path)
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "nothing"
    require(bool(files), f"data.source {source} is empty of text: found {found}; expected files in {EXPECTED}")
    return files, dict(others)


def _walk(roots: Iterable[str]) -> Iterator[Path]:
    """Roots that are no folders, and every file below the others but what is hidden. Each folder is entered once."""
    entered = set[str]()
    for root in roots:
        if not os.path.isdir(root):
            yield Path(root)
            continue
        for folder, folders, names in os.walk(root, followlinks=True, onerror=_unreadable):
            new = os.path.realpath(folder) not in entered
            entered.add(os.path.realpath(folder))
            folders[:] = sorted(name for name in folders if new and not name.startswith("."))
            yield from (Path(folder, name) for name in names if new and not name.startswith("."))


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"data.source: folder {error.filename} cannot be read: {error}") from error
