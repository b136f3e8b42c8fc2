"""What DeepSpeed would hand to ssh and to remote shells is checked first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.cluster.hostfile import MAX_SLOTS, check_folder, check_remote_words, read_hostfile
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
    ("text", "hosts"),
    [
        ("gpu_node_1 slots=8\n_x slots=1\n", {"gpu_node_1": 8, "_x": 1}),
        ("me@node-1 slots=2\nnode-2 slots=2\n", {"me@node-1": 2, "node-2": 2}),
        ("\ufeffnode-1 slots=2\r\n\r\n# all\r\nnode-2 slots=4 # the new one\r\n", {"node-1": 2, "node-2": 4}),
        # Open MPI, "Scheduling processes across hosts" (docs.open-mpi.org/en/v5.0.x/launching-apps/scheduling.html)
        ("a slots=4 max_slots=8\nb slots = 2 max-slots=2#x\n", {"a": 4, "b": 2}),
        # MPICH, "Using the Hydra Process Manager" (wiki.mpich.org/mpich/index.php/Using_the_Hydra_Process_Manager)
        ("donner:2\nfoo:2 # comment\n", {"donner": 2, "foo": 2}),
    ],
)
def test_spellings(text, hosts, tmp_path):
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode())
    assert list(read_hostfile(path).items()) == list(hosts.items())


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}x slots=1",
        "host;id slots=1",
        "$(id) slots=1",
        "user@@host slots=1",
        "-l@host slots=1",
        "user@-oProxyCommand slots=1",
        "me@good slots=1",
        "host",
        "host:",
        "host:0",
        "host:2:2",
        "host:2 slots=2",
        "host slots=1 max_slots=x",
        "[::1] slots=1",
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


@settings(deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.text(st.sampled_from("ab-_.@:=# \r\n\t\x0b\u2028$;08slotmax"), max_size=60))
)
def test_any_hostfile_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hosts") / "hostfile"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        hosts = read_hostfile(path)
    except InputError:
        return
    assert hosts
    for host, slots in hosts.items():
        assert 1 <= slots <= MAX_SLOTS
        assert not host.startswith("-") and set(host) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.@"
        )


@pytest.mark.skipif(" " in str(ROOT), reason="a checkout with a space in its path is refused")
def test_deepspeed_reads_what_the_check_prints(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = write(tmp_path, "\ufeffgpu_1:2 # one\nme@b slots = 4 max_slots=4\n")
    done = subprocess.run(
        [sys.executable, ROOT / "launch/check_hostfile.py", path],
        env={**os.environ, "DS_ENV_FILE": "none"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 processes on 2 hosts: gpu_1, me@b" in done.stderr
    (tmp_path / "plain").write_text(done.stdout)
    assert fetch_hostfile(str(tmp_path / "plain")) == {"gpu_1": 2, "me@b": 4}


@pytest.mark.parametrize("folder", ["/home/a b/ingot", "/home/$(id)/ingot", "/home/x;y", "/home/a\nb"])
def test_a_folder_that_a_remote_shell_would_split(folder):
    check_folder(Path("/home/me_1/ingot-0.2+x"))
    with pytest.raises(InputError, match=r"has a space or the like.*move it"):
        check_folder(Path(folder))


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


def test_env_file_that_is_not_text(tmp_path):
    path = tmp_path / ".deepspeed_env"
    path.write_bytes(b"A=\xff\n")
    with pytest.raises(InputError, match=r"\.deepspeed_env.*cannot be read"):
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
