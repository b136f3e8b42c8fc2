"""Every code block of README and docs runs here, or says what it needs in a comment before it:

    <!-- needs: a GPU -->

and is parsed: shell as shell, each command line by the script that it starts, YAML by the parser of configs. The blocks
of a page run in their order, in a folder that looks like a checkout with a prepared corpus and the trained run `first`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from chosen import slow_but
from llm.config import ModelConfig, RunConfig
from llm.config.parse import from_dict, parse_config, to_yaml
from llm.crawl.settings import CorpusConfig
from llm.typed import read
from pool import free_port
from runs import BIN, ROOT, Workspace, succeeded
from trained_run import write_run

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *(page for part in (".", "guide", "howto") for page in (DOCS / part).glob("*.md"))])
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]+) -->\n+)?"
    r"(?:^```(?P<tag>\w*)\n(?P<fenced>.*?)^```$|(?<=\n\n)(?P<indented>(?:    [^\n]*\n|\n(?=    ))+))",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:make|python|deepspeed|torchrun|mpirun|srun|pip|launch/\w+\.sh)\b", re.MULTILINE
)
CONFIGS = ("C", "FILE", "my.yaml")  # what the pages call the reader's own config
CRAWL = """
out: data/my-crawl
input: {source: crawl}
filter: {rules: [length]}
tokenizer: {vocab_size: 261}
tokenize: {validation_fraction: 0.5}
"""
# Scripts read their arguments before they import torch (tests/launch/test_launch_help.py): this ends them there.
PARSE_ONLY = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Block(NamedTuple):
    page: Path
    line: int
    kind: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """The blocks of a page; one that names no language is `bash` if a line of it starts with a command, else `text`."""
    found = []
    for match in BLOCK.finditer(text):
        body = match["fenced"] if match["fenced"] is not None else re.sub("(?m)^    ", "", match["indented"])
        kind = match["tag"] or ("bash" if COMMAND.search(body) else "text")
        found.append(Block(page, text[: match.end()].count("\n") - body.count("\n") + 1, kind, body, match["needs"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text())]


def of_kind(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


def checkout(folder: Path, *, trained: bool) -> Workspace:
    """A folder in which the commands of the pages work as in a checkout, with a small corpus and a small config."""
    space = Workspace(folder)
    config = to_yaml(parse_config(space.arguments(train__max_steps=2000, model__n_kv_head=4)))  # to be exported
    shutil.copytree(ROOT / "launch", folder / "launch", symlinks=True, ignore=shutil.ignore_patterns("*.py"))
    for script in (ROOT / "launch").glob("*.py"):
        (folder / "launch" / script.name).symlink_to(script)
    for path in (folder / "launch/configs/tiny-cpu.yaml", *(folder / name for name in CONFIGS)):
        path.write_text(config)
    (folder / "my-crawl.yaml").write_text(CRAWL)
    (folder / "crawl").mkdir()
    for module in (re, shutil, subprocess, sys, pytest, yaml, shlex.shlex, Path):
        (folder / f"crawl/{module.__name__}.txt").write_text(f"{module.__doc__}")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"PATH={shlex.quote(str(BIN))}:$PATH\n")
    (folder / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    shutil.copy(ROOT / "hostfile.example", folder / "hostfile")
    if trained:
        (folder / "runs").mkdir()
        model = ModelConfig(n_layer=2, n_head=4, d_model=32, vocab_size=261, max_seq_len=128)
        write_run(folder / "runs/first", RunConfig(model=model))
    return space


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return checkout(tmp_path_factory.mktemp("docs") / "checkout", trained=True)


def run(block: Block, names: dict[str, Any], space: Workspace) -> None:
    """Run a block where the process is; names: what the Python blocks of its page share."""
    if block.kind == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
        return
    text = block.text.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")  # 29500 may be in use here
    result = space.run(["bash", "-euo", "pipefail", "-c", text])
    succeeded(result)


RUNNING = [block for block in of_kind("python", "bash") if block.needs is None and block.page.parent.name != "guide"]
BY_HAND = ROOT / "docs/launching.md"  # which makes the run `first` itself


RUN_HERE = sorted({block.page for block in RUNNING} - {BY_HAND})  # the guide: test_docs_guide.py
FAST = [page for page in RUN_HERE if page.parent.name != "howto"]


@pytest.mark.parametrize("page", slow_but(FAST, RUN_HERE), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space.path)
    names = {"__name__": page.stem}
    for block in RUNNING:
        if block.page == page:
            run(block, names, space)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_by_hand(tmp_path: Path) -> None:
    space = checkout(tmp_path / "checkout", trained=False)
    for block in RUNNING:
        if block.page == BY_HAND:
            run(block, {}, space)


def commands_of(text: str) -> list[list[str]]:
    """The words of each command line, without variables that are set for it."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := line[next((i for i, w in enumerate(line) if "=" not in w), 0) :])]


def check_command(words: list[str], space: Workspace) -> None:
    """What the command line names is there, and its script takes its arguments."""
    if words[0] == "make":
        targets = re.findall(r"^([\w.-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        given = dict(word.split("=", 1) for word in words if "=" in word)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        if "pretrain" not in words:
            return
        script = "launch/pretrain.py"
        words = ["--config", given.get("CONFIG", "launch/configs/tiny-cpu.yaml"), *shlex.split(given.get("ARGS", ""))]
    elif (at := next((i for i, word in enumerate(words) if word.startswith("launch/")), None)) is not None:
        script, words = words[at], words[at + 1 :]
    else:
        module = words[2] if words[:2] == ["python", "-m"] else None
        others = words[:2] == ["python", "-c"] or Path(words[0]).name in ("source", "pip", "echo", "mkdir")
        assert find_spec(module) if module else others, words
        return
    assert (ROOT / script).is_file(), script
    script = script if script.endswith(".py") else "launch/pretrain.py"  # to which the shell scripts pass everything
    if script == "launch/mine_stdlib.py":  # needs no torch, so it runs
        shutil.rmtree(space.path / words[words.index("--out") + 1], ignore_errors=True)
    takes_config = "parse_config" in (ROOT / script).read_text() and "--compare" not in words
    command = [sys.executable, "-c", PARSE_ONLY, script, *words, *["--print-config"] * takes_config]
    result = space.run(command)
    began = not takes_config and "import of torch halted" in result.stderr
    assert began or result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", of_kind("bash"), ids=str)
def test_commands_are_known(block: Block, space: Workspace) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for words in commands_of(block.text):
        check_command(words, space)


@pytest.mark.parametrize(
    "line",
    [
        "python launch/pretain.py",
        "python launch/pretrain.py --optim.lrr=1",
        "deepspeed --num_gpus 2 launch/verify.py --config C --stepps 3",
        "launch/torchrun.sh --config missing.yaml",
        "python launch/prepare_data.py shw --sample 3",
        "python launch/generate.py --checkpoint runs/first --prompt a --topk 3",
        "python launch/export.py --checkpoint runs/first",
        "make pretrian",
        "make pretrain CONFIG=launch/configs/none.yaml",
        "make pretrain ARGS='--data.sauce=x'",
        "python -m benchmarks.kernels.tuna",
        "pyhton launch",
    ],
)
def test_a_wrong_command_is_seen(line: str, space: Workspace) -> None:
    with pytest.raises(AssertionError):
        check_command(commands_of(line)[0], space)


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_yaml_is_a_config(block: Block) -> None:
    mapping = yaml.safe_load(block.text)
    if block.page.name == "corpus.md":
        read(CorpusConfig, mapping, "")
    elif block.needs is None:
        model = {"max_seq_len": 1 << 20, **mapping.get("model", {})}  # data alone says nothing of the model
        from_dict({**mapping, "model": model})


def test_the_tree_of_folders_is_there() -> None:
    (tree,) = [
        block for block in of_kind("text") if block.page.name == "architecture.md" and "\nkernels/  " in block.text
    ]
    folder, found = "", 0
    for line in tree.text.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split() if indent <= 2 else []
        folder = names[0] if indent == 0 else folder
        for name in names:
            assert (ROOT / (name if indent == 0 else folder + name)).exists(), name
            found += 1
    assert found > 30


def test_kinds_and_needs_are_read() -> None:
    text = "a\n\n<!-- needs: two nodes -->\n\n    srun x\n\n```yaml\na: 1\n```\n\n```\nloss 2.8\n```\n"
    found = [(b.line, b.kind, b.text, b.needs) for b in blocks_of(Path("p.md"), text)]
    assert found[0] == (5, "bash", "srun x\n", "two nodes")
    assert [(kind, needs) for _, kind, _, needs in found[1:]] == [("yaml", None), ("text", None)]
    assert {block.kind for block in BLOCKS} <= {"bash", "python", "yaml", "text"}
    assert len({block.page for block in BLOCKS}) > 8
