"""Checks the hostfile, variables and arguments that DeepSpeed hands to a shell on other hosts, before it does.

`deepspeed` passes the first word of a hostfile line to ssh, where `-oProxyCommand=...` is an option that runs a
command, and writes variables and arguments into a remote command line without quoting `$` or backticks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm.errors import InputError, require

MAX_SLOTS = 64
# What `deepspeed` exports from its own environment, on CPU and CUDA machines.
EXPORTED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
SAFE_ARGUMENT = r"[\w@+=:,./\[\] -]*"
SAFE_PATH = r"[\w@+=:,./-]*"


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots (processes on it), in the file's order.

    Raises InputError, with the line, unless every line is `host slots=N`, blank or a comment, with a host name that
    starts with a letter or digit and goes on with those, dots and hyphens, N from 1 to 64, and no host twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]*)[ \t]+slots=([0-9]{1,3})", text)
        where = f"{path}:{number}: {text!r}"
        if match is None:
            raise InputError(f"{where}; expected `host slots=N`, such as `node-1 slots=8`")
        host, slots = match[1], int(match[2])
        require(1 <= slots <= MAX_SLOTS, f"{where}; expected slots from 1 to {MAX_SLOTS}")
        require(host not in hosts, f"{where}; the host is listed twice, expected once")
        hosts[host] = slots
    require(bool(hosts), f"hostfile {path} lists no host; expected lines such as `node-1 slots=8`")
    return hosts


def check_remote_words(
    environ: Mapping[str, str], env_files: Sequence[Path], arguments: Sequence[str], paths: Sequence[Path] = ()
) -> None:
    """Refuse what a remote shell would interpret in what `deepspeed` hands to it.

    `environ` is its environment, `env_files` the `.deepspeed_env` files that it reads, `arguments` those of the launch
    script, `paths` what the command for a host names without quotes. Raises InputError naming the path, variable, line
    or argument; the values of variables are not shown, for they may be secret.
    """
    for path in paths:
        require(
            re.fullmatch(SAFE_PATH, str(path), re.ASCII) is not None,
            f"the path {str(path)!r} has a space or another character at which a shell on another host would cut it; "
            "move it to a path of letters, digits and _@+=:,./-, or start on one host",
        )
    for name, value in environ.items():
        if name.startswith(EXPORTED_PREFIXES):
            _check_export(f"the environment variable {name}", f"{name}={value}")
    for path in env_files:
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                _check_export(f"{path}:{number}", line)
    for argument in arguments:
        require(
            re.fullmatch(SAFE_ARGUMENT, argument, re.ASCII) is not None,
            f"argument {argument!r} has a character that a shell on another host would interpret; expected letters, "
            "digits, spaces and _@+=:,./[]- (other values: in the config file)",
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
