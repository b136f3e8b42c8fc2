"""A machine that cannot run the job is refused with what was found, expected and to be done."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llm.cluster import preflight
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6", "deepspeed": "0.19.8"}


def test_this_machine_passes():
    preflight.check_machine(engine="deepspeed", loader="numpy", environ=os.environ)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.3.5"},
        {"triton": "3.10.0"},
        {"torch": "2.14.0.dev20261101"},
        {"torch": "2.11.0a0+50eac811a6.nv25.09"},
        {"numpy": "2.10.0", "triton": "3.8.0+git1234"},
    ],
)
def test_supported_versions(changes):
    preflight.check_versions((3, 10), {**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch": "2.10.0"}, "torch is 2.10.0; expected at least 2.11"),
        ({"torch": "2.9.1"}, "torch is 2.9.1"),
        ({"torch": None}, "torch is not installed"),
        ({"deepspeed": "0.19.9"}, "deepspeed is 0.19.9; expected at least 0.19.8, below 0.19.9"),
        ({"deepspeed": "0.18.0"}, "deepspeed is 0.18.0"),
        ({"numpy": "1.26.4"}, "numpy is 1.26.4"),
        ({"triton": "3.5.1"}, "triton is 3.5.1"),
        ({"triton": "3.6.0"}, "triton is 3.6.0 and numpy 2.4.6"),
        ({"triton": "3.7.0", "numpy": "2.10.0"}, "triton is 3.7.0 and numpy 2.10.0"),
        ({"torch": "unknown"}, "torch has the version 'unknown'"),
        ({"torch": ""}, "torch has the version ''"),
        ({"deepspeed": "0.19.9rc1"}, "deepspeed is 0.19.9rc1"),
    ],
)
def test_unsupported_versions(changes, words):
    with pytest.raises(InputError) as error:
        preflight.check_versions((3, 12), {**GOOD, **changes})
    assert words in str(error.value)
    assert "make setup" in str(error.value)


def test_old_python():
    with pytest.raises(InputError, match=r"Python is 3\.9; expected at least 3\.10"):
        preflight.check_versions((3, 9), GOOD)


def write_tool(folder, name):
    tool = folder / name
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)


def test_build_tools(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    environ = {"PATH": str(tmp_path)}
    with pytest.raises(InputError, match=r"no C\+\+ compiler: 'c\+\+' \(the default\)"):
        preflight.check_build_tools(environ, scripts)
    write_tool(tmp_path, "c++")
    with pytest.raises(InputError, match="ninja is not on PATH"):
        preflight.check_build_tools(environ, scripts)
    write_tool(scripts, "ninja")
    preflight.check_build_tools(environ, scripts)
    with pytest.raises(InputError, match=r"no C\+\+ compiler: 'clang\+\+' \(CXX\)"):
        preflight.check_build_tools({**environ, "CXX": "clang++"}, scripts)
    write_tool(tmp_path, "ccache")
    preflight.check_build_tools({**environ, "CXX": "ccache clang++"}, scripts)
    with pytest.raises(InputError, match=r"headers are missing.*python3-dev"):
        preflight.check_build_tools(environ, scripts, headers=tmp_path)


def test_lock_of_a_killed_build_is_removed_and_that_of_a_living_one_kept(tmp_path):
    locks = [tmp_path / name / "lock" for name in ("living", "killed")]
    for lock in locks:
        lock.parent.mkdir()
    # As torch does it: the holder keeps the file open.
    take = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True)"
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", f"{take}; sys.stdin.read()", lock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for lock in locks
    ]
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
    holders[1].kill()
    holders[1].wait()
    preflight.remove_abandoned_locks(tmp_path)
    assert [lock.exists() for lock in locks] == [True, False]
    holders[0].communicate()


def test_build_tools_matter_to_deepspeed_alone(tmp_path):
    preflight.check_machine(engine="plain", loader="numpy", environ={"PATH": str(tmp_path)})
    with pytest.raises(InputError, match="compiler"):
        preflight.check_machine(engine="deepspeed", loader="numpy", environ={"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("/site-packages/kernels/__init__.py", "0.0.0"),
        ("SAME", "0.18.2"),
        ("SAME", None),
    ],
)
def test_another_package_named_kernels(file, version, monkeypatch):
    import kernels

    fake = types.ModuleType("kernels")
    fake.__file__ = kernels.__file__ if file == "SAME" else file
    if version is not None:
        vars(fake)["__version__"] = version
    monkeypatch.setitem(sys.modules, "kernels", fake)
    with pytest.raises(InputError, match="another package of that name"):
        preflight.check_import_names()


def test_folder_without_init(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.delitem(sys.modules, "kernels")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"folder without __init__\.py"):
        preflight.check_import_names()


def test_native_extension_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm.data._native", None)
    with pytest.raises(InputError, match="make setup"):
        preflight.check_machine(engine="plain", loader="native", environ={})


def home_of(folder: Path, **environ: str) -> list[str]:
    """HOME and the user's name after provide_home, in a process for which /etc/passwd has no entry."""
    code = """
import getpass, os, pwd, sys
def unknown(*_): raise KeyError
pwd.getpwuid = unknown
from llm.cluster.preflight import provide_home
from llm.errors import InputError
try: provide_home()
except InputError as error: sys.exit(f"refused: {error}")
print(os.environ["HOME"], getpass.getuser())
"""
    python = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=python | environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout or "refused: " in done.stderr, done.stderr
    return done.stdout.split() or [done.stderr]


@pytest.mark.parametrize("home", [{}, {"HOME": "/proc/nowhere"}, {"HOME": "relative/none"}])
def test_a_user_without_a_name_or_a_home(home, tmp_path):
    uid = os.getuid()
    assert home_of(tmp_path, **home) == [f"{tmp_path}/ingot-{uid}", f"uid-{uid}"]
    assert (tmp_path / f"ingot-{uid}").stat().st_mode & 0o777 == 0o700
    assert home_of(tmp_path, **home, USER="me") == [f"{tmp_path}/ingot-{uid}", "me"]  # the folder is there now


def test_a_home_that_can_be_written_stays(tmp_path):
    assert home_of(tmp_path, HOME=str(tmp_path), LOGNAME="me") == [str(tmp_path), "me"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make another user's folder")
def test_another_users_folder_is_refused(tmp_path):
    folder = tmp_path / "ingot-0"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    assert "another user's; set HOME or TMPDIR" in home_of(tmp_path)[0]
    folder.rmdir()
    folder.symlink_to("/tmp")
    os.chown(folder, 12345, 12345, follow_symlinks=False)
    assert "another user's" in home_of(tmp_path)[0]


def test_no_folder_at_all(tmp_path):
    (tmp_path / f"ingot-{os.getuid()}").touch()
    assert "no HOME that can be written" in home_of(tmp_path)[0]
