"""Checks the machine before a run allocates anything or talks to other ranks.

Versions are read from package metadata and torch is not imported, so a wrong machine is refused in a second.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

from packaging.version import InvalidVersion, Version

from llm.cluster.ranks import operator_folder
from llm.errors import InputError, require

PYTHON = "3.10"
# Package -> the least version, the first one that is too new (None: no limit known).
SUPPORTED = {
    "torch": ("2.11", None),
    "triton": ("3.6", None),
    "numpy": ("2.0", None),
    "deepspeed": ("0.19.8", "0.19.9"),
}
HEADERS = Path(sysconfig.get_path("include"))
KERNELS_VERSION = "0.0.0"  # why it must be this: docs/decisions, the import names
INSTALL = "install the versions of constraints.txt (make setup)"


def check_machine(*, engine: str, loader: str, environ: Mapping[str, str]) -> None:
    """Raise InputError at the first thing that this run needs and this machine lacks.

    `engine` is train.engine, `loader` is data.loader, `environ` supplies PATH and CXX.
    """
    needed = {"torch": True, "numpy": True, "triton": sys.platform == "linux", "deepspeed": engine == "deepspeed"}
    found = {name: next(iter(distributions(name=name)), None) for name in needed if needed[name]}
    check_versions(sys.version_info[:2], {name: package and package.version for name, package in found.items()})
    check_import_names()
    if engine == "deepspeed":
        check_build_tools(environ)
        remove_abandoned_locks(operator_folder())
    if loader == "native":
        _import("llm.data._native", "build the C++ loader with `make setup`, or use --data.loader=numpy")


def provide_home() -> None:
    """Set USER for a user without a name, and HOME, to a folder of this user's, where there is none to write to.

    Containers started with `--user 54321` have neither, and torch, Triton and DeepSpeed keep there what they compile.
    Raises InputError when the folder for temporary files cannot serve either.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError: from Python 3.13
        os.environ["USER"] = f"uid-{os.getuid()}"
    with contextlib.suppress(RuntimeError):  # no HOME, and no entry in /etc/passwd
        if os.access(Path.home(), os.W_OK | os.X_OK):
            return
    try:
        home = Path(tempfile.gettempdir()) / f"ingot-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as own:
            # Another user could have made it, and put code there that this one would run.
            ours = home.lstat().st_uid == os.fstat(own.fileno()).st_uid
    except OSError as error:
        raise InputError(f"there is no HOME that can be written, nor another folder ({error}); set HOME") from error
    require(ours, f"there is no HOME that can be written, and {home} is another user's; set HOME or TMPDIR")
    os.environ["HOME"] = str(home)


def check_versions(python: tuple[int, ...], installed: Mapping[str, str | None]) -> None:
    """Raise InputError unless Python and every package (None: not installed) has a supported version."""
    dotted = ".".join(map(str, python))
    newer = f"Python is {dotted}; expected at least {PYTHON}: make .venv with a newer one"
    require(Version(dotted) >= Version(PYTHON), newer)
    found: dict[str, Version] = {}
    for name, text in installed.items():
        least, too_new = SUPPORTED[name]
        expected = f"expected at least {least}" + (f", below {too_new}" if too_new else "") + f": {INSTALL}"
        if text is None:
            raise InputError(f"{name} is not installed; {expected}")
        try:
            # What was built before a release counts as that release: NVIDIA's containers have torch 2.11.0a0+....
            version = found[name] = Version(Version(text).base_version)
        except InvalidVersion as error:
            raise InputError(f"{name} has the version {text!r}; {expected}") from error
        supported = Version(least) <= version and (too_new is None or version < Version(too_new))
        require(supported, f"{name} is {text}; {expected}")
    if {"triton", "numpy"} <= found.keys() and found["triton"] < Version("3.7.1"):
        require(
            found["numpy"] < Version("2.4"),
            f"triton is {installed['triton']} and numpy {installed['numpy']}; expected triton 3.7.1 or later beside "
            f"numpy 2.4: {INSTALL}, or numpy below 2.4",
        )


def check_import_names() -> None:
    """Raise InputError unless `kernels` and `llm` are Ingot's own, from one folder.

    Both names are taken on PyPI; another package of that name may come first on the path.
    """
    folders: dict[str, Path] = {}
    for name in ("llm", "kernels"):
        remedy = "expected Ingot's own package: run the script from the checkout, or `pip install -e .` there"
        module = _import(name, remedy)
        require(
            module.__file__ is not None,
            f"`{name}` is {module}, a folder without __init__.py; expected Ingot's own package: remove that folder "
            "from the path (PYTHONPATH, the current folder)",
        )
        folders[name] = Path(str(module.__file__)).resolve().parents[1]
    version = getattr(importlib.import_module("kernels"), "__version__", None)
    require(
        folders["kernels"] == folders["llm"] and version == KERNELS_VERSION,
        f"`kernels` {version} comes from {folders['kernels']} and `llm` from {folders['llm']}; expected Ingot's own "
        f"two ({KERNELS_VERSION}), side by side: another package of that name comes first on the path; uninstall it or "
        "use a clean virtual environment",
    )


def check_build_tools(
    environ: Mapping[str, str], python: Path = Path(sys.executable).parent, headers: Path = HEADERS
) -> None:
    """Raise InputError unless a C++ compiler and ninja are on PATH, or in `python`, and Python's headers are there.

    DeepSpeed compiles a small operator when it starts; without these it dies in init_distributed. `python`, by default
    the folder of this Python, joins PATH in llm.cluster.ranks.export.
    """
    path = os.pathsep.join([environ.get("PATH", os.defpath), str(python)])
    compiler = (environ.get("CXX") or "c++").split()[0]
    header, origin = headers / "Python.h", "CXX" if environ.get("CXX") else "the default"
    missing, remedy = "", ""
    if not shutil.which(compiler, path=path):
        missing = f"no C++ compiler: {compiler!r} ({origin}) is not on PATH"
        remedy = "install one (Debian: apt-get install g++), set CXX"
    elif not shutil.which("ninja", path=path):
        missing, remedy = "ninja is not on PATH", "`pip install ninja` in this environment"
    elif not header.is_file():
        missing = f"Python's C headers are missing: no {header}"
        remedy = "install them (Debian: apt-get install python3-dev)"
    why = "DeepSpeed compiles an operator when it starts"
    require(not missing, f"{missing}; {why}: {remedy}, or use --train.engine=plain")


def remove_abandoned_locks(folder: Path, proc: Path = Path("/proc")) -> None:
    """Remove the build locks under `folder` that no process of this host holds any more.

    torch guards the build of an operator with a file that its holder keeps open and removes at the end. A holder that
    was killed leaves it, and every later start would wait for it for ever.
    """
    for lock in folder.glob("*/lock"):
        before = _identity(lock)
        if proc.is_dir() and not _is_open(lock, proc):
            time.sleep(0.2)  # a holder that is done closes the file just before it removes it: look again
            if _identity(lock) == before and not _is_open(lock, proc):
                lock.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_ctime_ns
    return None


def _is_open(path: Path, proc: Path) -> bool:
    target = _identity(path)
    return target is not None and any(_identity(descriptor) == target for descriptor in proc.glob("[0-9]*/fd/*"))


def _import(name: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"`import {name}` fails ({error}); {remedy}") from error
