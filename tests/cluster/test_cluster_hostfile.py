"""What DeepSpeed would hand to ssh and to remote shells is checked first."""

import os
import subprocess
from pathlib import Path

import pytest

from llm.cluster.hostfile import check_remote_words, read_hostfile
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_in_order(tmp_path):
    path = write(tmp_path, "# two hosts\n\nb.example slots=8\n  10.0.0.2\tslots=64\n")
    assert list(read_hostfile(path).items()) == [("b.example", 8), ("10.0.0.2", 64)]


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}x slots=1",
        "host;id slots=1",
        "$(id) slots=1",
        "user@host slots=1",
        "host",
        "host slots=0",
        "host slots=65",
        "host slots=-1",
        "host slots=1 extra",
        "host slots=1; id",
        ".host slots=1",
        "ho\u0455t slots=1",
        "good slots=1",
    ],
)
def test_bad_line_is_refused_with_its_number(line, tmp_path):
    path = write(tmp_path, f"good slots=1\n{line}\n")
    with pytest.raises(InputError, match="hostfile:2"):
        read_hostfile(path)


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_empty_hostfile(text, tmp_path):
    with pytest.raises(InputError, match="no host"):
        read_hostfile(write(tmp_path, text))


def test_missing_hostfile(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize("value", ["$(id)", "`id`", 'a"b', "a\\b", "a\nb", "%h"])
def test_exported_variables(value, tmp_path):
    check_remote_words({"OTHER": value, "NCCL_DEBUG": "INFO", "PYTHONPATH": "/a b:/c"}, [], [])
    with pytest.raises(InputError, match="PYTHONPATH") as error:
        check_remote_words({"PYTHONPATH": value}, [], [])
    assert value not in str(error.value)
    if "\n" in value:
        return
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"GLOO_SOCKET_IFNAME=eth0\nSECRET={value}\n")
    with pytest.raises(InputError, match=r"\.deepspeed_env:2"):
        check_remote_words({}, [path], [])


@pytest.mark.parametrize("line", ["", "NAME", "x; id=1", "export A=1"])
def test_env_file_lines(line, tmp_path):
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"GLOO_SOCKET_IFNAME=eth0\n{line}\n")
    with pytest.raises(InputError, match=r"\.deepspeed_env:2"):
        check_remote_words({}, [path], [])


@pytest.mark.parametrize(
    "argument", ["$HOME", "`id`", "a;b", "a|b", "a&b", "(a)", "a>b", "it's", 'a"b', "*", "%n", "~"]
)
def test_arguments(argument):
    check_remote_words({}, [], ["--config", "a b/c.yaml", "--optim.betas=[0.9,0.95]", "-x"])
    with pytest.raises(InputError, match="argument"):
        check_remote_words({}, [], ["--config", argument])


def test_deepspeed_sh_refuses_before_it_starts_anything(tmp_path):
    """The hostfile that makes DeepSpeed's own runner execute a command."""
    path = write(tmp_path, f"-oProxyCommand=touch${{IFS}}{tmp_path}/ran slots=1\n")
    done = subprocess.run(
        ["bash", ROOT / "launch/deepspeed.sh", "--config", "none.yaml"],
        env={**os.environ, "HOSTFILE": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "hostfile:1" in done.stderr
    assert not (tmp_path / "ran").exists()
