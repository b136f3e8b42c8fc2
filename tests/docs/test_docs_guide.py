"""The guide, followed by a reader: every command and block of its chapters, in order, in one folder.

The folder is a checkout without runs. Its configs make four steps where the reader's make hundreds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.guide.pictures.frame import CHAPTERS, PICTURES, stamp_in, stamp_of
from pool import free_port
from runs import BIN, ROOT, succeeded
from test_docs import Block, blocks_of

PAGES = [PICTURES / "README.md", *sorted(PICTURES.glob("[0-9]*.md"))]
STEPS = {"train": {"max_steps": 4, "eval_interval": 2}, "optim": {"warmup_steps": 2}, "checkpoint": {"interval": 2}}


def checkout(folder: Path) -> Path:
    """A checkout after `make setup`, whose configs train for four steps."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".git", "build", "data", "docs", "launch", "runs", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(BIN.parent)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "launch", folder / "launch")
    for path in (folder / "launch/configs").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if "train" in config:
            for section, values in STEPS.items():
                config[section] = config.get(section, {}) | values
            path.write_text(yaml.safe_dump(config))
    return folder


def shortened(command: str) -> str:
    """A block of commands, with four steps for any number of them, and without set-up."""
    text = re.sub(r"^make setup.*$", "true", command, flags=re.MULTILINE)
    text = re.sub(r"^make ", "make -s -o setup ", text, flags=re.MULTILINE)
    text = re.sub(r"(max_steps=|--steps )\d+", r"\g<1>4", text)
    text = text.replace("docs.guide.pictures", "docs.guide.pictures --quick --folder pictures")
    return text.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")


def follow(block: Block, names: dict[str, Any], folder: Path) -> None:
    """Do what a block says."""
    if block.kind == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
    elif block.kind == "bash":
        command = ["bash", "-euo", "pipefail", "-c", shortened(block.text)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        succeeded(done)


@pytest.mark.slow
@pytest.mark.ranks
def test_the_guide_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout(tmp_path / "checkout")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(BIN), prepend=":")
    followed = 0
    for page in PAGES:
        names = {"__name__": page.stem}
        for block in blocks_of(page, page.read_text()):
            if block.needs is None or "minute" in block.needs:  # all else is not to be had here
                follow(block, names, folder)
                followed += block.kind != "text"
    assert followed > 2 * len(CHAPTERS)


@pytest.mark.slow
@pytest.mark.ranks
def test_the_pictures_can_be_drawn(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "checkout")
    command = [sys.executable, "-m", "docs.guide.pictures", "--quick", "--folder", "pictures"]
    succeeded(subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False))
    assert names_in(folder / "pictures") == names_in(PICTURES)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.svg"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_shows_its_pictures(chapter: str) -> None:
    number = CHAPTERS.index(chapter) + 1
    (page,) = PICTURES.glob(f"{number:02}-*.md")
    pictures = sorted(PICTURES.glob(f"{number:02}-*.svg"))
    assert pictures
    assert sorted(set(re.findall(r"\]\(([\w-]+\.svg)\)", page.read_text()))) == [path.name for path in pictures]
    for path in pictures:
        assert stamp_in(path) == stamp_of(chapter), f"run: python -m docs.guide.pictures {chapter}"
        assert path.stat().st_size < 150_000, path
        assert 'href="http' not in path.read_text(), path


def test_each_chapter_leads_to_the_next() -> None:
    for page, following in pairwise(PAGES[1:]):
        assert f"({following.name})" in page.read_text(), page


def test_a_stamp_follows_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = import_module("docs.guide.pictures.frame")
    before = stamp_of("objective")
    assert "launch/configs/lstm-cpu.yaml" in before and "docs/guide/pictures/frame.py" in before
    copy = tmp_path / "objective.py"
    copy.write_bytes((frame.HERE / "objective.py").read_bytes() + b"\n")
    monkeypatch.setattr(frame, "sources", lambda chapter: [copy])
    monkeypatch.setattr(frame, "ROOT", tmp_path)
    assert stamp_of("objective") != before
