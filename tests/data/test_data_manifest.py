"""manifest.json: what is written is read back; anything else is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.manifest import SPLITS, Manifest, read_manifest, verify_files
from llm.errors import InputError


@pytest.fixture
def folder(make_data: MakeData) -> Path:
    config, _ = make_data()
    assert config.data.path is not None
    return Path(config.data.path)


def test_round_trip(make_data: MakeData):
    config, manifest = make_data()
    folder = Path(config.data.path or "")
    assert read_manifest(folder) == manifest
    verify_files(folder, manifest)


def test_bits_per_byte(make_data: MakeData):
    _, manifest = make_data(n_validation=200)  # bytes == tokens there
    assert manifest.bits_per_byte(math.log(8)) == pytest.approx(3.0)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\x00b", "a b", "é", "a\n"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"dtype": 3}, "manifest.dtype is 3; expected str"),
        ({"vocab_size": "500"}, "vocab_size is '500'; expected int"),
        ({"vocab_size": True}, "vocab_size is True; expected int"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"eod_id": 500}, "eod_id is 500"),
        ({"eod_id": -1}, "eod_id is -1"),
        ({"bigram_nats_per_token": math.inf}, "expected float"),
        ({"validation_fraction": None}, "validation_fraction is None"),
        ({"surprise": 1}, "surprise"),
        ({"splits": {}}, "splits are"),
        ({"splits": []}, "splits is \\[\\]; expected dict"),
        ({"splits": {"train": 1, "validation": 1}}, "splits.train is 1"),
        (
            {"splits": {name: {"tokens": -1, "documents": 1, "bytes": 1} for name in SPLITS}},
            "impossible counts",
        ),
        ({"files": {}}, "files lack"),
    ],
)
def test_what_does_not_belong_is_refused(folder: Path, changes: dict, message: str):
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_file_names_stay_inside_the_folder(folder: Path, name: str):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files=files | {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(InputError, match="file name"):
        read_manifest(folder)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (1 << 21)])
def test_damaged_json_is_refused(folder: Path, raw: bytes):
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"manifest\.json: .*prepare the data again"):
        read_manifest(folder)


def test_damaged_files_are_found(folder: Path, make_data: MakeData):
    path = folder / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    manifest = read_manifest(folder)
    with pytest.raises(InputError, match=r"train\.bin: sha256"):
        verify_files(folder, manifest)
    path.write_bytes(raw[:-1])
    with pytest.raises(InputError, match=r"train\.bin has 2001 bytes; the manifest says 2002"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_manifest_confuses_the_reader(make_data: MakeData, data: st.DataObject):
    """Any value anywhere gives InputError or a manifest of the right types."""
    config, _ = make_data()
    folder = Path(config.data.path or "")
    values = json.loads((folder / "manifest.json").read_text())
    node, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(node[key], dict) and data.draw(st.booleans()):
        node, key = node[key], data.draw(st.sampled_from(sorted(node[key])))
    node[key] = data.draw(JSON)
    (folder / "manifest.json").write_text(json.dumps(values))
    try:
        manifest = read_manifest(folder)
    except InputError:
        return
    assert isinstance(manifest, Manifest)
    assert all(isinstance(split.tokens, int) for split in manifest.splits.values())
