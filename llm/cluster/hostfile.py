"""Checks the hostfile, variables and arguments that DeepSpeed hands to a shell on other hosts, before it does.

`deepspeed` passes the first word of a hostfile line to ssh, where `-oProxyCommand=...` is an option that runs a
command, and writes variables and arguments into a remote command line without quoting `$` or backticks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm.errors import InputError, require
from llm.files import read_up_to

MAX_SLOTS = 64
LARGEST = 1 << 20  # bytes of a hostfile or .deepspeed_env: 20,000 lines
# What `deepspeed` exports from its own environment, on CPU and CUDA machines.
EXPORTED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
# `host slots=8` (DeepSpeed), `host slots=8 max_slots=8` (Open MPI), `host:8` (MPICH); the host may be `user@host`.
HOST_LINE = (
    r"((?:[A-Za-z_][\w.-]*@)?[A-Za-z0-9_][\w.-]*)"
    r"(?::([0-9]{1,3})|[ \t]+slots[ \t]*=[ \t]*([0-9]{1,3})(?:[ \t]+max[_-]slots[ \t]*=[ \t]*[0-9]{1,3})?)"
)
SAFE_ARGUMENT = r"[\w@+=:,./\[\] -]*"


def read_hostfile(path: Path) -> dict[str, int]:
    """Host, or user@host -> slots (processes on it), in the file's order.

    Raises InputError, with the line, unless every line is as HOST_LINE, blank or a comment (which may also follow an
    entry), with a host name of letters, digits, dots, underscores and hyphens, N from 1 to 64, and no host twice.
    """
    try:
        lines = (
            read_up_to(path, LARGEST).decode("utf-8-sig").splitlines()
        )  # -sig: editors on Windows write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(HOST_LINE, text, re.ASCII)
        where = f"{path}:{number}: {text!r}"
        if match is None:
            raise InputError(f"{where}; expected `host slots=N`, such as `node-1 slots=8` or `user@node-1 slots=8`")
        host, slots = match[1], int(match[2] or match[3])
        require(1 <= slots <= MAX_SLOTS, f"{where}; expected slots from 1 to {MAX_SLOTS}")
        listed = host.rpartition("@")[2] in [other.rpartition("@")[2] for other in hosts]
        require(not listed, f"{where}; the host is listed twice, expected once")
        hosts[host] = slots
    require(bool(hosts), f"hostfile {path} lists no host; expected lines such as `node-1 slots=8`")
    return hosts


def check_folder(folder: Path) -> None:
    """Raise InputError if a shell on another host would split or interpret a path that it gets from DeepSpeed."""
    require(
        re.fullmatch(r"[\w+=:,./@-]+", str(folder)) is not None,
        f"{str(folder)!r} has a space or the like; for a run on several hosts DeepSpeed hands this path to a shell on "
        "each, so it may have letters, digits and _+=:,./@- alone: move it",
    )


def check_remote_words(environ: Mapping[str, str], env_files: Sequence[Path], arguments: Sequence[str]) -> None:
    """Refuse what a remote shell would interpret in what `deepspeed` hands to it.

    `environ` is its environment, `env_files` the `.deepspeed_env` files that it reads, `arguments` those of the launch
    script. Raises InputError naming the variable, line or argument; no value is shown, for it may be secret.
    """
    for name, value in environ.items():
        if name.startswith(EXPORTED_PREFIXES):
            _check_export(f"the environment variable {name}", f"{name}={value}")
    for name, pattern in (("MASTER_ADDR", r"(?!-)[\w.:-]*"), ("MASTER_PORT", "[0-9]*")):
        require(
            re.fullmatch(pattern, environ.get(name, ""), re.ASCII) is not None,
            f"the environment variable {name} is no {'host or address' if name == 'MASTER_ADDR' else 'number'}, and "
            "DeepSpeed hands it to a shell on other hosts; set it anew or unset it",
        )
    for path in filter(Path.is_file, env_files):
        try:
            lines = read_up_to(path, LARGEST).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}, whose variables DeepSpeed exports, cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            _check_export(f"{path}:{number}", line)
    for i, argument in enumerate(arguments, 1):
        name, equals, _ = argument.partition("=")
        require(
            re.fullmatch(SAFE_ARGUMENT, argument, re.ASCII) is not None,
            f"argument {repr(name) if equals else i} has a character that a shell on another host would interpret; "
            "expected letters, digits, spaces and _@+=:,./[]- (other values: in the config file)",
        )


def _check_export(where: str, line: str) -> None:
    name, equals, value = line.partition("=")
    require(
        bool(equals) and re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name, re.ASCII) is not None,
        f"{where} is not NAME=value; DeepSpeed would fail or run it as a command",
    )
    require(
        re.search(r'[$`"\\\n\r%]', value) is None,
        f'{where} has one of $ ` " \\ % or a line end in its value, which a shell on another host would interpret; '
        "unset it or give it a plain value",
    )
