"""What is left to do of a stage, and whether what is there of it was made of the same input with the same settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm.crawl.tasks import Engine, Task, Work, config_of, described, disk_errors, read_report, write_report
from llm.errors import require
from llm.typed import shown

SETTINGS = "settings.json"  # of a stage's folder: what the hash `config` of its reports is of
TEMPORARY = ".tmp"  # ends the names of what is not finished
OUTPUT = re.compile(r"(\d{5,})\.")  # begins the names of a task's output


def run_stage(stage: str, tasks: Sequence[Task], engine: Engine, progress: Callable[[int], None]) -> list[str]:
    """Do what is left of a stage; what there is to say of it. progress: is called with the bytes that are done.

    Raises InputError where the folder holds what was made with other settings or of another input, where a task fails,
    which it names, and where the disk is full. Nothing unfinished stays.
    """
    folder = tasks[0].folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        interrupted = remove_unfinished(folder)
        left = unfinished(engine.works(stage), tasks)
    notes = (
        [f"{folder.name}: removed what an interrupted task had begun: {', '.join(interrupted)}"] if interrupted else []
    )
    done = sum(task.size for task in tasks) - sum(task.size for task in left)
    progress(done)
    try:
        if left:
            engine.run(stage, sorted(left, key=lambda task: -task.size), lambda size: progress(done + size))
    finally:
        remove_unfinished(folder)
    return notes


def unfinished(work: Work, tasks: Sequence[Task]) -> list[Task]:
    """The tasks without a report, after a look at the reports of the others; keeps the settings in the folder."""
    folder, config = tasks[0].folder, config_of(work)
    advice = f"remove {folder} and the folders of the stages after it, or choose another out"
    numbers = {int(name[1]): path for path in folder.iterdir() if (name := OUTPUT.match(path.name))}
    last = max(numbers, default=-1)
    require(last < len(tasks), f"{numbers.get(last)} is there, but its input has {len(tasks)} files now; {advice}")
    reports = {task.number: task.path(".json") for task in tasks if task.path(".json").exists()}
    if reports:
        _check_settings(folder / SETTINGS, described(work), advice)
    for task in tasks:
        if path := reports.get(task.number):
            report = read_report(path)
            require(report.get("config") == config, f"{path} was made with other settings; {advice}")
            same = report.get("input") == task.identity
            require(same, f"{path} was made of another input than {task.source or task.inputs[0]} is now; {advice}")
    write_report(folder / SETTINGS, described(work) | {"tasks": len(tasks)})
    return [task for task in tasks if task.number not in reports]


def reports_of(folder: Path) -> list[dict[str, Any]]:
    """The reports of all tasks of a stage; raises InputError where it is not finished."""
    advice = f"run prepare_data.py {folder.name} first, or all"
    require((folder / SETTINGS).exists(), f"there is no {folder} yet; {advice}")
    paths = [folder / f"{number:05d}.json" for number in range(read_report(folder / SETTINGS)["tasks"])]
    left = sum(not path.exists() for path in paths)
    require(not left, f"{left} of {len(paths)} tasks of {folder} are not done; {advice}")
    return [read_report(path) for path in paths]


def _check_settings(path: Path, now: dict[str, Any], advice: str) -> None:
    """Raise InputError, naming what differs, unless the folder's settings are those of `now`."""
    before, after = _flat(read_report(path)), _flat(now)
    keys = [key for key in sorted((before.keys() | after.keys()) - {"tasks"}) if before.get(key) != after.get(key)]
    changes = "; ".join(f"{key}: {shown(before.get(key))} -> {shown(after.get(key))}" for key in keys)
    require(not keys, f"{path.parent} was made with other settings ({changes}); {advice}")


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    return {name: value for key in content for name, value in _flat(content[key], f"{prefix}.{key}".strip(".")).items()}


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what a killed process left, and say what it was."""
    found = sorted(folder.glob(f"*{TEMPORARY}"))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return [path.name for path in found]
