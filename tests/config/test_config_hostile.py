"""Configs made to hang, to fill the memory or to be read otherwise than they look are refused in bounded time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import bounded, check_count

from llm.config.parse import LARGEST_FILE, MOST_VALUES, parse_config
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("model", "data", "optim", "parallel", "train", "checkpoint", "logging", "profile", "lora", "deepspeed")


def bomb(section: str, links: str) -> str:
    """Each of 9 lists or mappings holds the one before ten times."""
    merge = "b{0}: &b{0} {{<<: [{1}], k{0}: 1}}"
    line = merge if links == "merge" else "b{0}: &b{0} " + ("[{1}]" if links == "list" else "{{{1}}}")
    lines = [f"  b0: &b0 {'{k: 1}' if links == 'merge' else '[x]'}"]
    for i in range(1, 10):
        parts = [f"*b{i - 1}" if links != "map" else f"k{j}: *b{i - 1}" for j in range(10)]
        lines.append("  " + line.format(i, ", ".join(parts)))
    return f"{section}:\n" + "\n".join(lines)


TEXTS = {
    **{f"aliases in {section}, {kind}": bomb(section, kind) for section in SECTIONS for kind in ("list", "map")},
    **{f"merged aliases in {section}": bomb(section, "merge") for section in SECTIONS},
    "an alias in itself": "deepspeed: &a {b: [*a]}",
    "a merge of itself": "deepspeed: &a {<<: *a}",
    "a mapping as its own key": "deepspeed: &a {? *a : 1}",
    "an unknown alias": "name: *nobody",
    "nested lists": "deepspeed: {a: " + "[" * 100_000,
    "nested mappings": "{a: " * 60_000,
    "nested blocks": "".join(" " * i + "a:\n" for i in range(700)),
    "nested dashes": "- " * 100_000,
    "nested questions": "? " * 100_000,
    "nested pairs": "[? " * 60_000,
    "closed nested lists": "deepspeed: {a: " + "[" * 5000 + "]" * 5000 + "}",
    "too many values": "deepspeed: {a: [" + "1," * (MOST_VALUES + 1) + "]}",
    "too many keys": "".join(f"k{i}: 1\n" for i in range(MOST_VALUES // 2 + 1)),
    "the same key 10,000 times": "deepspeed:\n" + "  a: 1\n" * 10_000,
    "a key twice": "name: a\nname: b",
    "a key twice, once quoted": "name: a\n'name': b",
    "a key twice, in the deepspeed section": "deepspeed: {a: 1, b: {c: 1, c: 2}}",
    "a key twice, escaped": 'seed: 1\n"\\x73eed": 2',
    "a key twice, within a list": "deepspeed: {a: [{b: 1, b: 2}]}",
    "a long integer": "seed: " + "9" * 200_000,
    "a long hexadecimal integer": "seed: 0x" + "f" * 200_000,
    "a long float": "optim: {lr: " + "9" * 200_000 + "e9}",
    "a float beyond all": "optim: {lr: 1e999}",
    "underscores": "optim: {lr: " + "1_" * 100_000 + "}",
    "a long key": "k" * 200_000 + ": 1",
    "a long key like a known one": "model: {n_layer" + "r" * 200_000 + ": 1}",
    "a long name": "name: " + "a/" * 100_000,
    "a name that leaves": "name: ../../etc",
    "an absolute name": "name: /etc/cron.d/x",
    "a hidden name": "name: .ssh",
    "a name with a line end": 'name: "a\\nb"',
    "a name with a NUL": 'name: "a\\0b"',
    "an object of Python": "name: !!python/object/apply:os.system [id]",
    "a module of Python": "name: !!python/module:os",
    "a name of Python": "name: !!python/name:os.system",
    "a new object of Python": "deepspeed: {x: !!python/object/new:type [a]}",
    "a tuple of Python": "deepspeed: {x: !!python/tuple [1]}",
    "an own tag": "name: !mine x",
    "binary": "deepspeed: {x: !!binary aGVsbG8=}",
    "a set": "deepspeed: {x: !!set {a}}",
    "a date": "deepspeed: {x: 2020-01-01}",
    "a date of month 13": "deepspeed: {x: 2020-13-01}",
    "not a number": "deepspeed: {x: .nan}",
    "two documents": "name: a\n---\nname: b",
    "many documents": "---\n" * 50_000,
    "many directives": "%YAML 1.1\n" * 20_000,
    "anchors without a value": "&a " * 80_000,
    "stars": "*" * 200_000,
    "tags": "a: " + "!!str " * 40_000,
    "a tab": "\t" * 200_000,
    "a control character": "name: a\x07",
    "a list": "- 1",
    "text": "text",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_hostile_text_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with bounded(), pytest.raises(InputError) as refusal:
        parse_config([f"--config={path}"])
    assert 10 < len(str(refusal.value)) < 1000


VALUES = {
    "deepspeed.x": ["[" * 100_000, "{a: " * 30_000, bomb("x", "list"), "&a [*a]", "!!python/name:os.system", "1: 2"],
    "deepspeed": ["1"],
    "deepspeed." + ".".join("a" * 50_000): ["1"],
    "model.n_layer": ["[" * 100_000, "9" * 100_000, "1:30", "٣"],
    "k" * 100_000: ["1"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_a_hostile_override_is_refused(key: str, value: str) -> None:
    with bounded(), pytest.raises(InputError) as refusal:
        parse_config([f"--{key}={value}"])
    assert 10 < len(str(refusal.value)) < 1000


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200 << 30)


FILES = {
    "a pipe": pipe,
    "200 GiB": sparse,
    "one byte too many": lambda path: path.write_bytes(b"#" * (LARGEST_FILE + 1)),
    "a folder": Path.mkdir,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "no UTF-8": lambda path: path.write_bytes(b"name: \xff\xfe"),
    "random bytes": lambda path: path.write_bytes(os.urandom(100_000)),
    "UTF-16": lambda path: path.write_bytes("name: a".encode("utf-16-le")),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_what_is_no_config_is_refused_and_not_waited_for(make, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    make(path)
    with bounded(), pytest.raises(InputError, match=r"run\.yaml"):
        parse_config([f"--config={path}"])


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/random", "/dev/null", "/proc/self/mem", "/"])
def test_a_device_is_refused(path: str) -> None:
    with bounded(), pytest.raises(InputError, match=path):
        parse_config([f"--config={path}"])


def test_the_exit_code_is_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(bomb("deepspeed", "list"))
    words = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", "run.yaml", "--print-config"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: run.yaml: found more than"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_aliases_within_the_limit_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("deepspeed: {a: &a {x: [1, 2]}, b: *a, c: {<<: *a, y: 3}}")
    found = parse_config([f"--config={tmp_path / 'run.yaml'}"]).deepspeed
    assert found == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": [1, 2], "y": 3}}


def test_the_cases_are_counted() -> None:
    check_count(__name__)
