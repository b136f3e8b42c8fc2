"""A manifest is taken exactly when it stores each element of each tensor once."""

from __future__ import annotations

import copy
import itertools
import json
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.checkpoint.manifest import Manifest, merge, parse
from llm.errors import CheckpointError
from llm.slices import Slice

FILE = {"size": 8, "xxh128": "0" * 32}


def piece(dim: int, start: int, stop: int, offset: int, length: int) -> dict[str, Any]:
    return {
        "file": "a.safetensors",
        "key": f"master/w/{start}:{stop}/{offset}",
        "dim": dim,
        "start": start,
        "stop": stop,
        "offset": offset,
        "length": length,
    }


def body_of(shape: list[int], pieces: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": "ingot-checkpoint",
        "version": 2,
        "step": 3,
        "files": {"a.safetensors": FILE | {"size": 4 * sum(each["length"] for each in pieces) + 300}},
        "tensors": {"w": {"master": {"shape": shape, "pieces": pieces}}},
    }


VALID = body_of(
    [4, 6],
    [piece(1, 0, 2, 0, 3), piece(1, 0, 2, 3, 5), piece(1, 2, 5, 0, 12), piece(1, 5, 6, 0, 4)],
)


def covered_once(manifest: Manifest) -> bool:
    """By counting every element: the slow twin of check_coverage."""
    for entry in manifest.tensors.values():
        numbers = torch.arange(prod(entry.shape)).view(entry.shape)
        count = torch.zeros(numbers.numel(), dtype=torch.int64)
        for stored in entry.pieces:
            part = Slice(entry.shape, stored.dim, stored.start, stored.stop).take(numbers)
            flat = part.reshape(-1)[stored.offset : stored.offset + stored.length]
            count[flat] += 1
        if not bool((count == 1).all()):
            return False
    return True


@pytest.mark.parametrize("hashed", [{"xxh128": "0" * 32}, {"sha256": "0" * 64}])
def test_text_and_back(hashed: dict[str, str]) -> None:
    body = VALID | {"files": {"a.safetensors": {"size": 400, **hashed}}}
    manifest = parse(body)
    manifest.check_coverage()
    assert Manifest.from_json(manifest.to_json().encode()) == manifest
    assert json.loads(manifest.to_json())["files"] == body["files"]
    other = copy.deepcopy(body)
    other["files"]["a.safetensors"]["size"] += 1
    assert parse(other).sha256 != manifest.sha256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format": "ingot-checkpoint", "version": 3}', "version 3; this program reads 1 and 2"),
        (b'{"format": "other", "version": 1}', "format"),
        (b'{"format": "ingot-checkpoint", "version": 1}', "its own sha256"),
        (b'{"format": "ingot-checkpoint", "version": 2}', "its own sha256"),
    ],
)
def test_other_texts_are_refused(text: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("hashed", "words"),
    [
        ({"md5": "0" * 32}, r"a.safetensors.md5.*expected.*xxh128"),
        ({}, "a.safetensors has no valid xxh128"),
        ({"xxh128": "0" * 64}, "a.safetensors has no valid xxh128"),
        ({"xxh128": "A" * 32}, "a.safetensors has no valid xxh128"),
        ({"sha256": "0" * 32}, "a.safetensors has no valid sha256"),
        ({"xxh128": "0" * 32, "sha256": "0" * 64}, "a.safetensors has two hashes"),
    ],
)
def test_a_file_has_one_hash_that_is_known(hashed: dict[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse(VALID | {"files": {"a.safetensors": {"size": 8, **hashed}}})


LEAVES = st.one_of(st.integers(-2, 13), st.booleans(), st.none(), st.sampled_from([1.0, "", "x", [], {}, 10**30]))


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Of every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    below = [(key, *path) for key, item in items for path in (paths(item) if isinstance(item, dict | list) else [])]
    return [(key,) for key in (value if isinstance(value, dict) else range(len(value)))] + below


PATHS = paths(VALID)
INTEGERS = [path for path in PATHS if path[-1] in ("dim", "start", "stop", "offset", "length")]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(VALID)
    place: Any = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if path[-1] in ("start", "stop", "offset"):
        place["key"] = f"master/w/{place['start']}:{place['stop']}/{place['offset']}"
    return body


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=LEAVES)
def test_a_changed_field_is_refused_or_harmless(path: tuple[Any, ...], value: Any) -> None:
    try:
        manifest = parse(changed(path, value))
        manifest.check_coverage()
    except CheckpointError:
        return
    assert covered_once(manifest)


JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["files", "tensors", "step", "shape", "pieces", "w", "master"]), inner)
    ),
)


@settings(max_examples=200, deadline=None)
@given(body=st.dictionaries(st.sampled_from(["files", "tensors", "step"]), JSON))
@example(body={"files": {}, "tensors": {}, "step": 0})
def test_any_object_is_refused_or_whole(body: dict[str, Any]) -> None:
    try:
        manifest = parse(body)
        manifest.check_coverage()
    except CheckpointError:
        return
    assert covered_once(manifest)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_coverage_agrees_with_counting(data: st.DataObject) -> None:
    """On cuts of a tensor, taken, and near misses with one number changed, never taken wrongly."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    dim = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    sizes = shape or [1]
    cuts = sorted({0, sizes[dim], *data.draw(st.sets(st.integers(0, sizes[dim]), max_size=2))})
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        count = prod(sizes) // sizes[dim] * (stop - start)
        inside = sorted({0, count, *data.draw(st.sets(st.integers(0, count), max_size=2))})
        for low, high in itertools.pairwise(inside):
            pieces.append(piece(dim, start, stop, low, high - low))
    body = body_of(shape, pieces)
    if not data.draw(st.booleans()):
        parse(body).check_coverage()
    else:
        field = data.draw(st.sampled_from(["start", "stop", "offset", "length"]))
        changed = pieces[data.draw(st.integers(0, len(pieces) - 1))]
        changed[field] = data.draw(st.integers(0, 5))
        changed["key"] = piece(*(changed[each] for each in ("dim", "start", "stop", "offset", "length")))["key"]
        try:
            manifest = parse(body)
            manifest.check_coverage()
        except CheckpointError:
            return
        assert covered_once(manifest)


def test_reports_that_disagree_are_not_merged() -> None:
    one = parse(VALID)
    with pytest.raises(CheckpointError, match="same file"):
        merge([one, one])
    with pytest.raises(CheckpointError, match="different steps"):
        merge([one, Manifest(4, {}, {})])
    with pytest.raises(CheckpointError, match="no rank"):
        merge([])
    other = parse(json.loads(json.dumps(body_of([24], [])).replace("a.safetensors", "b")))
    with pytest.raises(CheckpointError, match="shape"):
        merge([one, other])
