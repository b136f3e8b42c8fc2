"""Forged states and manifests are refused, clearly, before a byte of a shard is read."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import make_tensors, save
from forged import GOOD, SHARD, body_of, forge_state, seal
from hostile import bounded, check_count, contents, no_umask, open_to_others

from llm import files
from llm.checkpoint.manifest import LARGEST_MANIFEST, LARGEST_STATE, Manifest, parse
from llm.checkpoint.reader import find_latest, find_named, open_checkpoint, verify
from llm.checkpoint.remote import Remote
from llm.errors import CheckpointError, InputError
from llm.train.resume import find_step

Change = Callable[[dict[str, Any]], Any]


def refused(folder: Path) -> str:
    """What every way to open the checkpoint says, as none opens it."""
    with bounded(), pytest.raises(CheckpointError) as found:
        open_checkpoint(folder)
    with bounded(), pytest.raises((CheckpointError, InputError)):
        assert find_named(folder)[0] and open_checkpoint(folder)
    assert 0 < len(str(found.value)) < 1500
    assert sorted(path.name for path in folder.parents[2].iterdir()) == ["run"]
    return str(found.value)


def at(path: str, value: Any) -> Change:
    """Set the value at a dotted path; a path of an item of a list has its number."""

    def change(body: Any) -> None:
        *way, last = path.split("/")
        for key in way:
            body = body[int(key) if isinstance(body, list) else key]
        body[int(last) if isinstance(body, list) else last] = value

    return change


def without(path: str) -> Change:
    def change(body: Any) -> None:
        *way, last = path.split("/")
        for key in way:
            body = body[key]
        del body[last]

    return change


INTEGERS = (
    "step", "consumed_samples", "skipped_samples", "engine/optimizer_step", "engine/loss_scale/remaining",
    "engine/loss_scale/good_steps", "setbacks/in_a_row", "setbacks/passed_samples/0/0", "best/step", "best/since",
)  # fmt: skip
NUMBERS = (*INTEGERS, "engine/loss_scale/scale", "setbacks/recent/0/0", "best/loss")
STATES: list[tuple[str, Change]] = [
    *((f"{key} {value!r}", at(key, value)) for key in INTEGERS for value in (-1, True, 1.5, "1", 2**63)),
    *((f"{key} {value}", at(key, value)) for key in NUMBERS for value in (float("nan"), float("inf"))),
    *((f"{key} null", at(key, None)) for key in NUMBERS),
    *((f"no {key}", without(key)) for key in ("step", "consumed_samples", "skipped_samples", "config", "data")),
    *((f"no {key}", without(key)) for key in ("engine", "engine/optimizer_step", "engine/loss_scale", "best/loss")),
    *((f"{key} []", at(key, [])) for key in ("config", "data", "engine", "setbacks", "best", "validation_due")),
    *((f"step {step}", at("step", step)) for step in (0, 1, 3, 10**9)),
    ("best in the future", at("best/step", 3)),
    ("scale 0", at("engine/loss_scale/scale", 0.0)),
    ("an unknown key", at("else", 1)),
    ("falling ranges", at("setbacks/passed_samples", [[5, 9], [1, 2]])),
    ("a range backwards", at("setbacks/passed_samples", [[5, 1]])),
    ("a range of three", at("setbacks/passed_samples", [[1, 2, 3]])),
    ("recent of one", at("setbacks/recent", [[1.0]])),
    ("NaN in the config", at("config/optim", {"lr": float("nan")})),
]


@pytest.mark.parametrize(("name", "change"), STATES, ids=[name for name, _ in STATES])
def test_a_forged_state_is_refused(folder: Path, name: str, change: Change) -> None:
    state = copy.deepcopy(GOOD)
    forge_state(folder, json.dumps(state).encode())
    assert open_checkpoint(folder).state == state
    change(state)
    forge_state(folder, json.dumps(state).encode())
    assert "state.json" in refused(folder)
    with bounded(), pytest.raises(InputError):  # there is nothing else to resume from
        find_step(folder.parent, 1)


PLAIN = json.dumps(GOOD)
TEXTS = {
    "empty": b"",
    "a list": b"[]",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep, and closed": b'{"config":' + b"[" * 500 + b"]" * 500 + b"}",
    "a key twice": PLAIN.replace('"step": 2', '"step": 9, "step": 2', 1).encode(),
    "a key twice, within": PLAIN.replace('"remaining": 1', '"remaining": 9, "remaining": 1').encode(),
    "1e999": PLAIN.replace("2.5", "1e999").encode(),
    "-1e999": PLAIN.replace("2.5", "-1e999").encode(),
    "a number of 5000 digits": PLAIN.replace('"step": 2', '"step": ' + "2" * 5000).encode(),
    "a byte that is no text": PLAIN.encode() + b"\xff",
    "more behind": PLAIN.encode() + b"{}",
    "zeros": bytes(1000),
    "UTF-16 of half a letter": b"\xff\xfe\x00",
    "two million values": b'{"config": [' + b"[]," * 2_000_000 + b"[]]}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_state_that_is_no_json_is_refused(folder: Path, name: str) -> None:
    forge_state(folder, TEXTS[name])
    assert "state.json" in refused(folder)


W = "tensors/embedding.weight"
OTHER = "master/norm.weight/0:4/0"
P = f"{W}/master/pieces/0"
FIELDS = ("dim", "start", "stop", "offset", "length")
MANIFESTS: list[tuple[str, Change]] = [
    *((f"{field} {value!r}", at(f"{P}/{field}", value)) for field in FIELDS for value in (-1, 7.0, True, 2**70, None)),
    *((f"version {value!r}", at("version", value)) for value in (True, 1.0, 2.0, "2", 0, 3, None, [2])),
    *((f"step {value!r}", at("step", value)) for value in (True, -1, 2.0, "2", None, 3, 2**64)),
    *((f"format {value!r}", at("format", value)) for value in (None, 1, "ingot", ["ingot-checkpoint"])),
    *((f"size {value!r}", at(f"files/{SHARD}/size", value)) for value in (True, -1, 2**63, 1.0, None, 0, 200 << 30)),
    *((f"hash {value!r}", at(f"files/{SHARD}/xxh128", value)) for value in (None, "", "0" * 31, "\u0966" * 32)),
    *(
        (f"a file {name!r}", lambda body, name=name: body["files"].update({name: body["files"][SHARD]}))
        for name in ("../a", "/etc/passwd", "a/b", "", ".", "..", "a\nb", "manifest.json", "spare", "\u0966", "a\0b")
    ),
    *((f"key {value!r}", at(f"{P}/key", value)) for value in (OTHER, "exp_avg/embedding.weight/0:11/0", "k", 1)),
    *((f"in file {value!r}", at(f"{P}/file", value)) for value in ("state.json", "../a", "other", 1)),
    *(
        (f"shape {value!r}"[:40], at(f"{W}/master/shape", value))
        for value in ([2**31, 2**31], [2**62, 4], [2**63 - 1] * 16, [1] * 99, [11, 0], [11, -4], [True, 4], [4, 11, 1])
    ),
    ("a huge tensor of one piece", lambda body: huge(body, [2**31, 2**31])),
    ("a tensor of 200 GiB", lambda body: huge(body, [50 << 30])),
    ("a moment's bytes as master", lambda body: swap(body)),
    ("a piece twice", lambda body: body["tensors"]["embedding.weight"]["master"]["pieces"].append(
        dict(body["tensors"]["embedding.weight"]["master"]["pieces"][0]))),
    ("no pieces", at(f"{W}/master/pieces", [])),
    ("a kind", at(f"{W}/momentum", {"shape": [1], "pieces": []})),
    ("a tensor ../x", lambda body: body["tensors"].update({"../x": body["tensors"]["norm.weight"]})),
    ("no state", without("files/state.json")),
    ("no files", without("files")),
    ("no tensors", without("tensors")),
    ("a state of 600 MB", at("files/state.json/size", 600 << 20)),
    ("another key", at("more", 1)),
    ("deep", at("more", json.loads("[" * 70 + "]" * 70))),
]  # fmt: skip


def huge(body: dict[str, Any], shape: list[int]) -> None:
    """A tensor that claims to lie in the shard, whole."""
    count = 1
    for size in shape:
        count *= size
    numbers = {"dim": 0, "start": 0, "stop": shape[0], "offset": 0, "length": count}
    piece = {"file": SHARD, "key": f"master/huge/0:{shape[0]}/0", **numbers}
    body["tensors"]["huge"] = {"master": {"shape": shape, "pieces": [piece]}}


def swap(body: dict[str, Any]) -> None:
    kinds = body["tensors"]["embedding.weight"]
    kinds["master"] = copy.deepcopy(kinds["exp_avg"])


@pytest.mark.parametrize(("name", "change"), MANIFESTS, ids=[name for name, _ in MANIFESTS])
def test_a_forged_manifest_is_refused(folder: Path, name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(folder)
    change(body)
    seal(folder, body)
    if name == "another key":  # what is not known says nothing
        open_checkpoint(folder)
        return
    monkeypatch.setattr(files, "hash_of", lambda *_: pytest.fail("hashed what the manifest alone forbids"))
    refused(folder)


@pytest.mark.parametrize(("name", "size"), [("spare", 8), (SHARD, 200 << 30), (SHARD, 8)])
def test_a_file_is_as_large_as_its_tensors_need(whole: Path, name: str, size: int) -> None:
    body = body_of(whole)
    body["files"][name] = {"size": size, "xxh128": "0" * 32}
    body.pop("sha256")
    with pytest.raises(CheckpointError, match=r"holds no tensor|its tensors take"):
        parse(body).check_coverage()


def test_texts_of_manifests_are_refused(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    for hostile in (
        text.replace('"step": 2', '"step": 9, "step": 2'), text.replace('"step": 2', '"step": NaN'),
        "[" * 100_000, '{"a":' * 100_000, " " * 5000 + text, text + " " * 5000, text.replace("norm", "nörm"), "",
        '{"files": "' + "a" * 5000 + '"}', "null", "1", text[:-2], text + text,
    ):  # fmt: skip
        (folder / "manifest.json").write_text(hostile)
        refused(folder)


def test_the_manifest_alone_refuses_a_large_state(whole: Path) -> None:
    body = body_of(whole)
    body.pop("sha256")
    body["files"]["state.json"]["size"] = LARGEST_STATE + 1
    with pytest.raises(CheckpointError, match=r"state\.json has .* bytes in the manifest"):
        parse(body)


def test_a_manifest_that_is_too_long_is_not_parsed() -> None:
    with bounded(), pytest.raises(CheckpointError, match=f"more than {LARGEST_MANIFEST} bytes"):
        Manifest.from_json(b'"' * (LARGEST_MANIFEST + 1))


@pytest.mark.parametrize("end", ["\u0966" * 7 + "\u0968", "0000000\uff12", "2", "9" * 19, "00000002.aside-1"])
def test_other_names_are_no_steps(folder: Path, end: str) -> None:
    folder.rename(folder.with_name(f"step-{end}"))
    with bounded():
        assert find_latest(folder.parent) == (None, [])


@pytest.mark.parametrize("name", [".", "manifest.json", "state.json", SHARD])
def test_what_every_user_can_change_is_refused(folder: Path, name: str) -> None:
    verify(folder)
    os.chmod(folder / name, 0o777)
    assert "can be changed by every user" in refused(folder)


def test_a_checkpoint_and_its_copy_are_their_owners_whatever_the_umask(whole: Path, tmp_path: Path) -> None:
    copies = Remote(f"memory://modes/{tmp_path.name}", "a")
    copies.put(whole, keep_last=1, keep_every=None)
    with no_umask():
        save(tmp_path / "run/checkpoints", 2, make_tensors(1))
        copies.get(whole.name, tmp_path / "copy/checkpoints", lambda text: None)
    for name in ("run", "copy"):
        assert open_to_others(tmp_path / name / "checkpoints") == {}
        assert len(contents(tmp_path / name / "checkpoints")) > 3


def test_another_owner_is_mentioned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_latest(folder.parent) == (folder, [])
    mine = os.geteuid()
    if mine == 0:
        os.chown(folder / SHARD, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    found, (warning,) = find_latest(folder.parent)
    assert found == folder and "belongs to another user (uid" in warning


def test_the_cases_are_counted() -> None:
    check_count(__name__)
