"""The house rules that can be read off the source: who may import whom, sizes, and what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import map as architecture
import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 15
# Lines of code of a part, tests apart, at most. A new capability raises its number in a commit of its own.
BUDGETS = {"llm": 26_100, "kernels": 5_200, "csrc": 3_500, "launch": 1_020, "benchmarks": 8_200}
MAX_PRODUCT_LINES = 35_720  # all of these but the benchmarks
# What one has to read to follow one DeepSpeed step from a shard to a weight: docs/architecture.md lists it.
MAX_PATH_FILES, MAX_PATH_LINES = 16, 2_540

# Longest matching prefix wins. None: anything. Names are import prefixes beyond the standard library.
MAY_IMPORT: dict[str, set[str] | None] = {
    "kernels": {"torch", "triton", "kernels"},
    "llm/__init__.py": set(),
    "llm/errors.py": set(),
    "llm/sinks.py": set(),
    "llm/slices.py": {"torch"},
    "llm/files.py": {"torch", "xxhash", "llm.errors"},
    "llm/locks.py": {"filelock", "llm.errors", "llm.files"},
    "llm/typed.py": {"llm.errors"},
    "llm/config": {"llm.config", "llm.errors", "llm.files", "llm.typed", "yaml"},
    "llm/model": {"torch", "kernels", "llm.config", "llm.errors", "llm.slices", "llm.model"},
    "llm/parallel": {
        "torch", "kernels", "llm.config", "llm.errors", "llm.slices", "llm.model", "llm.parallel",
    },
    "llm/cluster": {
        "torch", "mpi4py", "packaging", "psutil", "llm.config", "llm.errors", "llm.files", "llm.sinks", "llm.cluster",
    },
    "llm/plan": {"llm.config", "llm.model", "llm.plan"},
    "llm/page.py": set(),
    "llm/profile": {
        "torch", "llm.errors", "llm.files", "llm.page", "llm.sinks", "llm.typed", "llm.model.parts", "llm.profile",
    },
    "llm/crawl/report": {
        "llm.crawl.counts", "llm.crawl.report", "llm.crawl.stages", "llm.errors", "llm.files", "llm.page",
    },
    "llm/data": {
        "numpy", "torch", "tokenizers", "llm.config", "llm.errors", "llm.files", "llm.locks", "llm.typed", "llm.data",
    },
    "llm/data/tokens/sums.py": {"numpy", "xxhash", "llm.data", "llm.errors", "llm.files"},
    "llm/data/chat.py": {"jinja2", "llm.data", "llm.errors", "llm.files"},
    "llm/data/corpus": {"backports.zstd", "compression", "pyarrow", "llm.errors", "llm.data.corpus"},
    "llm/data/prepare/fetch.py": {"fsspec", "llm.config", "llm.errors", "llm.files", "llm.data"},
    "llm/data/prepare/console.py": {"llm.config", "llm.data", "llm.progress"},
    "llm/data/prepare/commands.py": {"llm.config", "llm.data", "llm.errors", "llm.progress"},
    "llm/progress.py": {"rich"},
    "llm/crawl": {
        "fsspec", "pyarrow", "xxhash", "llm.config", "llm.crawl", "llm.data.corpus", "llm.errors", "llm.files",
        "llm.locks", "llm.progress", "llm.typed",
    },
    "llm/crawl/engines": {"llm.crawl", "llm.errors"},
    "llm/crawl/engines/mpi.py": {"mpi4py", "llm.crawl", "llm.errors"},
    "llm/crawl/engines/datatrove.py": {"datatrove", "llm.crawl", "llm.errors"},
    "llm/crawl/filter": {
        "fasttext", "numpy", "publicsuffixlist", "xxhash", "llm.config", "llm.crawl", "llm.data.corpus",
        "llm.errors", "llm.files",
    },
    "llm/crawl/extract": {
        "backports.zstd", "fastwarc", "ftfy", "numpy", "pyarrow", "resiliparse", "trafilatura",
        "llm.config.sections", "llm.crawl", "llm.data.corpus", "llm.errors",
    },
    "llm/crawl/tokens": {
        "gigatoken", "numpy", "pyarrow", "tokenizers", "xxhash", "llm.config", "llm.crawl", "llm.data",
        "llm.errors", "llm.files",
    },
    "llm/crawl/dedup": {"numpy", "pyarrow", "xxhash", "llm.config", "llm.crawl", "llm.errors", "llm.files"},
    "llm/checkpoint": {
        "torch", "safetensors", "llm.config", "llm.errors", "llm.files", "llm.slices", "llm.typed", "llm.parallel",
        "llm.checkpoint",
    },
    "llm/checkpoint/remote.py": {"fsspec", "llm.errors", "llm.files", "llm.checkpoint"},
    "llm/train": {
        "torch", "triton", "numpy", "filelock", "rich", "kernels", "llm.config", "llm.errors", "llm.files", "llm.locks",
        "llm.sinks", "llm.slices", "llm.typed", "llm.model", "llm.parallel", "llm.data", "llm.checkpoint",
        "llm.cluster", "llm.plan", "llm.profile", "llm.train",
    },
    "llm/finetune": {
        "numpy", "torch", "llm.checkpoint", "llm.config", "llm.data", "llm.errors", "llm.files", "llm.finetune",
        "llm.model", "llm.parallel", "llm.sinks", "llm.slices", "llm.train", "llm.trained", "llm.typed",
    },
    "llm/train/engines/deepspeed.py": {"torch", "deepspeed", "pydantic", "llm"},
    "llm/train/gpu_state.py": {"torch", "pynvml", "llm.sinks"},
    "llm/train/wandb_run.py": {"wandb", "llm.config", "llm.errors", "llm.files"},
    "llm/parity": {
        "torch", "psutil", "rich", "kernels", "llm.config", "llm.errors", "llm.files", "llm.slices", "llm.model",
        "llm.parallel", "llm.data", "llm.checkpoint", "llm.plan", "llm.train", "llm.parity",
    },
    "llm/sampling.py": {"torch", "llm.config", "llm.errors"},
    "llm/trained.py": {
        "torch", "llm.config", "llm.errors", "llm.model", "llm.parallel", "llm.data", "llm.checkpoint", "llm.slices",
    },
    "llm/generate.py": {
        "torch", "llm.config", "llm.data", "llm.errors", "llm.model", "llm.sampling", "llm.sinks", "llm.trained",
    },
    "llm/evaluate.py": {
        "torch", "rich", "llm.__version__", "llm.config", "llm.errors", "llm.files", "llm.model", "llm.parallel",
        "llm.data", "llm.generate", "llm.trained",
    },
    "llm/harness.py": {
        "torch", "lm_eval", "llm.errors", "llm.parallel", "llm.evaluate", "llm.generate", "llm.sampling",
    },
    "llm/huggingface.py": {
        "torch", "transformers", "llm.checkpoint", "llm.config", "llm.data", "llm.errors", "llm.files", "llm.trained",
    },
    "llm/report.py": {
        "torch", "matplotlib", "llm.checkpoint", "llm.config", "llm.errors", "llm.files", "llm.data", "llm.generate",
        "llm.sampling", "llm.sinks", "llm.trained",
    },
    "launch": {"llm", "torch", "rich"},
    "setup.py": None,
    "docs": set(),
    "docs/build_site.py": {"site_reference"},
    "docs/site_reference.py": {"llm.config", "llm.crawl.settings", "llm.typed", "site_checks"},
    "docs/recording.py": {"rich"},
    "docs/profile_pictures.py": {"llm.profile"},
    "docs/guide/pictures": None,
    "benchmarks": None,
    "tests": None,
}  # fmt: skip


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.cpp", "*.h"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(name: str, source: str) -> set[str]:
    """Imports of `source`, standing at path `name`, that the table does not allow."""
    import sys

    rules = [prefix for prefix in MAY_IMPORT if name == prefix or name.startswith(prefix + "/")]
    assert rules, f"{name} has no line in the import rules"
    allowed = MAY_IMPORT[max(rules, key=len)]
    if allowed is None:
        return set()
    return {
        module
        for module in imported(ast.parse(source))
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(module == a or module.startswith(a + ".") for a in allowed)
    }


@pytest.mark.parametrize("path", [p for p in sources() if p.suffix == ".py"], ids=str)
def test_imports_follow_the_rules(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == set()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llm/model/gpt.py", "import torch.distributed as dist\nimport llm.parallel.mesh"),
        ("kernels/gelu.py", "from llm.config import InputError"),
        ("llm/data/loader.py", "import zstandard"),
        ("llm/train/loop.py", "import deepspeed"),
        ("llm/generate.py", "from launch import report"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, source: str) -> None:
    assert violations(name, source)


@pytest.mark.parametrize("room", ["llm/model", "llm/data", "llm/config", "llm/plan", "kernels"])
def test_rooms_that_know_nothing_of_ranks(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert "distributed" not in path.read_text(), path


def test_there_is_no_circle_of_imports() -> None:
    tuple(TopologicalSorter(architecture.import_graph()).static_order())  # raises CycleError, which names the circle


def test_a_circle_is_seen() -> None:
    graph = architecture.import_graph()
    graph["llm.errors"] = {"llm.train.loop"}
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(graph).static_order())


def test_the_map_is_current() -> None:
    assert architecture.SVG.read_text() == architecture.draw(), "run: python docs/map.py"


def test_no_benchmark_is_installed_or_imported() -> None:
    installed = find_packages(str(ROOT), include=["kernels*", "llm*"])
    assert not [name for name in installed if "bench" in name or "aot" in name.split(".")]
    graph = architecture.import_graph()
    product = [name for name in graph if not name.startswith("benchmarks")]
    assert not [name for name in product if any(other.startswith("benchmarks") for other in graph[name])]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"
            if not any(".jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len(parameters) <= MAX_PARAMETERS, f"{node.name}: {len(parameters)} parameters"


def lines_of(part: str) -> int:
    """Lines of code in a part of the tree, without tests, data and configs."""
    code = {".py", ".pyi", ".cpp", ".h", ".c", ".sh"}
    files = [path for path in (ROOT / part).rglob("*") if path.suffix in code and "tests" not in path.parts]
    return sum(path.read_text().count("\n") for path in files)


@pytest.mark.parametrize("part", BUDGETS)
def test_each_part_stays_within_its_budget(part: str) -> None:
    assert lines_of(part) <= BUDGETS[part]


def test_the_product_stays_within_its_budget() -> None:
    assert sum(lines_of(part) for part in BUDGETS if part != "benchmarks") <= MAX_PRODUCT_LINES


def test_one_step_can_be_followed() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.split("## The path of one step", 1)[1].split("\n## ", 1)[0]
    files = re.findall(r"^\d+\. `([\w/.-]+)`", section, re.MULTILINE)
    assert 1 < len(set(files)) <= MAX_PATH_FILES
    lines = sum((ROOT / name).read_text().count("\n") for name in set(files))
    assert lines <= MAX_PATH_LINES, f"{lines} lines in {len(set(files))} files"


@pytest.mark.parametrize("path", [p for p in sources() if p.parent == ROOT / "launch"], ids=str)
def test_launch_scripts_are_thin_and_put_the_checkout_first(path: Path) -> None:
    text = path.read_text()
    if "__main__" not in text:
        return
    assert text.count("\n") <= 80
    assert PATH_BLOCK in text or "from llm" not in text


PATH_BLOCK = """\
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
"""


def test_nothing_is_pickled_and_yaml_is_safe() -> None:
    forbidden = (
        "import pickle",
        "torch.load(",
        "torch.save(",
        "yaml.load(",
        "allow_pickle=True",
        "broadcast_object_list",
        "all_gather_object",
    )
    measured = ROOT / "benchmarks/checkpoint.py"  # what others do, with files of its own
    for path in sources():
        if path.suffix == ".py" and "tests" not in path.parts and path != measured:
            found = [word for word in forbidden if word in path.read_text()]
            assert not found, f"{path}: {found}"
