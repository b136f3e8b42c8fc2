"""Draws docs/architecture.svg, the map of the rooms, from the imports in the source: `python docs/map.py`.

A room is a folder of code. Its text is the docstring of its package and the names of its files. An arrow goes from a
room to one that it imports. Two kinds are left out: arrows that follow from others, and those to what every room reads.
"""

from __future__ import annotations

import ast
import textwrap
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SVG = ROOT / "docs/architecture.svg"
ROOMS = (
    *("launch", "benchmarks", "kernels", "llm"),
    *(f"llm/{name}" for name in ("parity", "train", "cluster", "checkpoint", "parallel", "crawl", "data")),
    *("llm/model", "llm/plan", "llm/profile"),
)
READ_BY_ALL = (
    *("llm/config", "llm/errors", "llm/files", "llm/locks", "llm/page", "llm/progress", "llm/sinks", "llm/slices"),
    "llm/typed",
)
BOX, GAP, MARGIN, LINE = 236, 28, 20, 15  # pixels


def module_name(path: Path) -> str:
    """llm/data/loader.py -> llm.data.loader; a package's __init__.py -> the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def python_files() -> list[Path]:
    """The product's and the benchmarks' Python files."""
    folders = {room.split("/")[0] for room in ROOMS}
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, wherever in it, `TYPE_CHECKING` blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
            if not names <= modules:
                found.add(node.module)
    return found & modules


def import_graph() -> dict[str, set[str]]:
    """Every module and the modules it imports."""
    files = {module_name(path): path for path in python_files()}
    return {name: imports(path, set(files)) - {name} for name, path in files.items()}


def room_of(module: str) -> str | None:
    """The innermost room of a module; None for what every room reads."""
    path = module.replace(".", "/")
    inside = [room for room in (*ROOMS, *READ_BY_ALL) if path == room or path.startswith(room + "/")]
    room = max(inside, key=len)
    return room if room in ROOMS else None


def arrows() -> dict[str, set[str]]:
    """Every room and the rooms it imports, without those that another arrow implies."""
    direct: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, imported in import_graph().items():
        room = room_of(module)
        if room is not None:
            direct[room] |= {goal for goal in map(room_of, imported) if goal not in (None, room)}
    return {
        room: {goal for goal in goals if not any(goal in reachable(direct, via) for via in goals - {goal})}
        for room, goals in direct.items()
    }


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The rooms that can be reached from `start` by at least one arrow."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        room = waiting.pop()
        if room not in found:
            found.add(room)
            waiting += graph[room]
    return found


def text_of(room: str) -> list[str]:
    """The lines in a room's box: what it is for, its files, its folders and what they are for."""
    files = [path.stem for path in sorted((ROOT / room).glob("*.py")) if not path.stem.startswith("__")]
    files = [name for name in files if f"{room}/{name}" not in READ_BY_ALL]
    folders = [path.parent for path in sorted((ROOT / room).glob("*/__init__.py"))]
    folders = [path for path in folders if str(path.relative_to(ROOT)) not in (*ROOMS, *READ_BY_ALL)]
    lines = [summary(ROOT / room), ", ".join(files), *(f"{path.name}/: {summary(path)}" for path in folders)]
    return [part for line in lines for part in textwrap.wrap(line, 38, break_long_words=False)]


def summary(folder: Path) -> str:
    """The first line of a package's docstring; "" where there is none."""
    package = folder / "__init__.py"
    text = ast.get_docstring(ast.parse(package.read_text())) if package.exists() else None
    return (text or "").split("\n")[0]


def rows_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """The rooms in rows, each below all that import it and, as far as there is room, under their middle."""
    importers = {room: [other for other in graph if room in graph[other]] for room in graph}
    row: dict[str, int] = {}
    for room in TopologicalSorter(importers).static_order():
        row[room] = 1 + max((row[other] for other in importers[room]), default=-1)
    rows = [[room for room in graph if row[room] == i] for i in range(1 + max(row.values()))]
    middle: dict[str, float] = {}
    for rooms in rows:
        rooms.sort(key=lambda room: sum(middle[other] for other in importers[room]) / max(1, len(importers[room])))
        middle |= {room: (i + 0.5) / len(rooms) for i, room in enumerate(rooms)}
    return rows


def draw() -> str:
    """The map as SVG."""
    graph = arrows()
    rows = rows_of(graph)
    width = max(map(len, rows)) * (BOX + GAP) + 2 * MARGIN
    boxes, shapes, top = {}, [], MARGIN
    for row in rows:
        height = max(len(text_of(room)) for room in row) * LINE + 40
        left = (width - len(row) * (BOX + GAP) + GAP) / 2
        for i, room in enumerate(row):
            boxes[room] = (left + i * (BOX + GAP), top, height)
        top += height + 3 * GAP
    for room, goals in graph.items():
        for goal in sorted(goals):
            (x, y, height), (goal_x, goal_y, _) = boxes[room], boxes[goal]
            x, goal_x, y = x + BOX / 2, goal_x + BOX / 2, y + height
            shapes.append(
                f'<path class="arrow" d="M{x},{y} C{x},{y + 50} {goal_x},{goal_y - 60} {goal_x},{goal_y - 4}"/>'
            )
    for room, (x, y, height) in boxes.items():
        shapes.append(box(room, x, y, BOX, height, text_of(room)))
    config = ", ".join(path.stem for path in sorted((ROOT / "llm/config").glob("[!_]*.py")))
    lines = [f"llm/config/: {summary(ROOT / 'llm/config')} ({config})", ", ".join(READ_BY_ALL[1:])]
    shapes.append(box("read by every room", MARGIN, top, width - 2 * MARGIN, len(lines) * LINE + 40, lines))
    return SHEET.format(width=width, height=top + len(lines) * LINE + 40 + MARGIN, shapes="\n".join(shapes))


def box(title: str, x: float, y: float, width: float, height: float, lines: list[str]) -> str:
    """A rectangle with a title and lines of text."""
    text = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>']
    text.append(f'<text class="room" x="{x + 10}" y="{y + 22}">{escape(title)}</text>')
    text += [f'<text x="{x + 10}" y="{y + 40 + i * LINE}">{escape(line)}</text>' for i, line in enumerate(lines)]
    return "\n".join(text)


SHEET = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
svg {{ background: white; }}
rect {{ fill: #f6f8fa; stroke: #57606a; }}
text {{ font: 11px sans-serif; fill: #24292f; }}
.room {{ font: bold 14px sans-serif; }}
.arrow {{ fill: none; stroke: #0969da; stroke-width: 1.3; marker-end: url(#head); }}
</style>
<marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>
{shapes}
</svg>
"""


if __name__ == "__main__":
    SVG.write_text(draw())
