"""What reaches the shells of other hosts through DeepSpeed and pdsh is refused, or arrives as it is. No value is shown.

DeepSpeed writes `export NAME="value"` without escaping, for NCCL*, PYTHON*, UCX*, MV2*, MLFLOW* and .deepspeed_env.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile import bounded

from llm.cluster.hostfile import EXPORTED_PREFIXES, LARGEST, check_remote_words, read_hostfile
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("$(touch ran)", "`touch ran`", '"; touch ran; "', "x\ntouch ran", "\\", "${HOME}", "$IFS", "%h", "x\r")
ADDRESSES = (*COMMANDS, "host;touch ran", "a b", "host|id", "host&", "-oProxyCommand=touch", "<in", ">out", "*", "hö")


@pytest.mark.parametrize("value", COMMANDS)
@pytest.mark.parametrize("prefix", EXPORTED_PREFIXES)
def test_no_exported_variable_holds_a_command(prefix: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{prefix}_SECRET") as refusal:
        check_remote_words({f"{prefix}_SECRET": f"hunter2{value}"}, [], [])
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("value", ADDRESSES)
@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_the_address_holds_no_command(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"variable {name} is no") as refusal:
        check_remote_words({name: f"hunter2{value}" if value[0] != "-" else value}, [], [])
    assert "hunter2" not in str(refusal.value) and "ProxyCommand" not in str(refusal.value)


@pytest.mark.parametrize("address", ["10.0.0.1", "node-1.example", "node_1", "fe80::1", ""])
def test_an_address_is_taken(address: str) -> None:
    check_remote_words({"MASTER_ADDR": address, "MASTER_PORT": "29500"}, [], [])


@pytest.mark.parametrize("name", ["NCCL;touch ran;X", "NCCL$(touch ran)", "PYTHON X", "UCX-A", "NCCL`id`", "MV2\nX"])
def test_no_name_of_a_variable_is_a_command(name: str) -> None:
    with pytest.raises(InputError, match="is not NAME=value"):
        check_remote_words({name: "1"}, [], [])


@pytest.mark.parametrize("argument", ["--deepspeed.wandb.api_key=hunter2$(id)", "hunter2;id"])
def test_no_value_of_an_argument_is_shown(argument: str) -> None:
    with pytest.raises(InputError, match=r"argument ('--deepspeed.wandb.api_key'|2) has") as refusal:
        check_remote_words({}, [], ["--name=x", argument])
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "value", ["plain", "a b", "/a b:/c", "a;b", "a|b&c", "it's", "(x)", "*", "~", "#x", "a<b>c", "!x"]
)
def test_what_is_accepted_arrives_as_it_is(value: str, tmp_path: Path) -> None:
    """The command that DeepSpeed's own code makes, in a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    check_remote_words({"NCCL_X": value}, [], [])
    runner = object.__new__(PDSHRunner)
    runner.exports, runner.args, runner.user_arguments = {}, SimpleNamespace(), []
    runner.add_export("NCCL_X", value)
    script = f"export NCCL_X={runner.exports['NCCL_X']}; printenv NCCL_X"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{value}\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["zeros", "pipe", "200 GiB", "too long"])
def test_a_hostfile_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    if kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"#" * (LARGEST + 1))
        os.truncate(path, 200 << 30 if kind == "200 GiB" else LARGEST + 1)
    with bounded(), pytest.raises(InputError, match="cannot be read"):
        read_hostfile(path)
    if kind in ("200 GiB", "too long"):
        with bounded(), pytest.raises(InputError, match="cannot be read"):
            check_remote_words({}, [path], [])


@pytest.mark.parametrize(
    ("script", "variables", "named"),
    [
        ("deepspeed.sh", {"MASTER_ADDR": "$(touch ran)"}, "MASTER_ADDR"),
        ("deepspeed.sh", {"MASTER_PORT": "1; touch ran"}, "MASTER_PORT"),
        ("deepspeed.sh", {"NCCL_DEBUG": "`touch ran`"}, "NCCL_DEBUG"),
        ("deepspeed.sh", {"UCX_X": "$(touch ran)"}, "UCX_X"),
        ("torchrun.sh", {"NNODES": "a[$(touch ran)]"}, "NNODES"),
        ("torchrun.sh", {"NNODES": "2,$(touch ran)"}, "NNODES"),
    ],
)
def test_a_launch_script_ends_with_2_before_it_starts_anything(
    script: str, variables: dict[str, str], named: str, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\n")
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, "--config", "none.yaml"],
        cwd=tmp_path, env={**os.environ, "HOSTFILE": "hostfile", **variables},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]
