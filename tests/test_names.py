"""`kernels` and `llm` are Ingot's own, however a script is started and whoever else has the names.

Both names are taken on PyPI (Hugging Face's `kernels`, Willison's `llm`); docs/decisions says why
they are kept.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# As every launch script begins (tests/test_structure.py): the checkout takes the place of launch/.
PROBE = """import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import kernels
import llm

print(Path(kernels.__file__).parents[1], kernels.__version__, Path(llm.__file__).parents[1])
"""


def run(command, *, cwd: Path, path: Path | None = None) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout with a script that begins as the launch scripts do."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("kernels", "llm"):
        (folder / package).symlink_to(ROOT / package)
    (folder / "launch").mkdir()
    (folder / "launch" / "probe.py").write_text(PROBE)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """The other packages of these names, as installed distributions."""
    folder = tmp_path_factory.mktemp("others")
    for package, number in (("kernels", "0.17.2"), ("llm", "0.30")):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(f"__version__ = '{number}'\n")
        info = folder / f"{package}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    return folder


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]


@pytest.mark.parametrize("installed", [False, True], ids=["alone", "others-installed"])
@pytest.mark.parametrize(
    ("start", "here"),
    [
        ([sys.executable, "SCRIPT"], "/"),
        ([sys.executable, "SCRIPT"], "checkout"),
        ([sys.executable, "-m", "launch.probe"], "checkout"),
        ([*TORCHRUN, "SCRIPT"], "/"),
        ([*TORCHRUN, "-m", "launch.probe"], "checkout"),
    ],
    ids=["script-from-root", "script", "module", "torchrun-from-root", "torchrun-module"],
)
def test_own_packages_win(start, here, installed, checkout, others):
    command = [str(checkout / "launch/probe.py") if word == "SCRIPT" else word for word in start]
    cwd = checkout if here == "checkout" else Path(here)
    found = run(command, cwd=cwd, path=others if installed else None)
    assert found == f"{checkout} 0.0.0 {checkout}"


def test_the_other_packages_win_without_that_line(checkout, others):
    """The danger is real: what the line prevents happens without it."""
    bare = checkout / "launch" / "bare.py"
    bare.write_text("import kernels, llm\nprint(kernels.__version__, llm.__version__)\n")
    assert run([sys.executable, bare], cwd=checkout, path=others) == "0.17.2 0.30"


def test_launch_scripts_shadow_no_module():
    """A script's folder comes first on the path when it is run by other means.

    Hugging Face's `evaluate` is an exception: only the harness imports it, long after evaluate.py has taken its own
    folder off the path (tests/test_structure.py).
    """
    for script in {*ROOT.glob("launch/*.py")} - {ROOT / "launch" / "evaluate.py"}:
        probe = f"import importlib.util as u; print(u.find_spec({script.stem!r}))"
        assert run([sys.executable, "-c", probe], cwd=Path("/")) == "None", script.name


def test_kernels_is_light():
    """Other libraries import a package of this name to read its version."""
    probe = "import kernels, sys; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    assert run([sys.executable, "-c", probe], cwd=ROOT) == "set()"


def test_deepspeed_imports_beside_our_kernels():
    probe = "import kernels, deepspeed; print(kernels.__version__, deepspeed.__version__)"
    lines = run([sys.executable, "-c", probe], cwd=ROOT).splitlines()
    assert lines[-1] == f"0.0.0 {version('deepspeed')}"
