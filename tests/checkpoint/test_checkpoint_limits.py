"""What is large, deep or endless is refused early: no hostile input takes long, much memory or a place elsewhere."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forged import GOOD, SHARD, STEP, body_of, forge_state, seal
from hostile import bounded, check_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm import files
from llm.checkpoint.manifest import LARGEST_MANIFEST, LARGEST_STATE, Manifest
from llm.checkpoint.reader import open_checkpoint, verify
from llm.checkpoint.remote import Remote
from llm.checkpoint.state import check_state
from llm.errors import CheckpointError, InputError
from llm.train.run_folder import truncate_metrics


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def spaces(folder: Path) -> None:
    sparse(folder / "manifest.json", 1 << 30)


def just_short(folder: Path) -> None:
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text + b" " * (LARGEST_MANIFEST - len(text)))


def empty_lists(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"a":[' + b'[],"",' * (LARGEST_MANIFEST // 6 - 9) + b"0]}")


def many_keys(folder: Path) -> None:
    text = ",".join(f'"{i}":1' for i in range(999_990))
    (folder / "manifest.json").write_text(f"{{{text}}}")


def one_name(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"\\ud83d\\ude00' + b"a" * (LARGEST_MANIFEST - 50) + b'": 1}')


def million_pieces(folder: Path) -> None:
    piece = json.dumps({"file": SHARD, "key": "k", "dim": 0, "start": 0, "stop": 1, "offset": 0, "length": 1})
    (folder / "manifest.json").write_text('{"tensors": [' + ", ".join([piece] * 1_000_000) + "]}")


def pieces_within_the_bytes(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"tensors": [' + ", ".join(['{"key": "k"}'] * 1_000_000) + "]}")


def most_pieces(folder: Path) -> None:
    _pieces(folder, 120_000)


def _pieces(folder: Path, count: int) -> None:
    body, name = body_of(folder), "norm.weight"
    body["tensors"][name]["master"] = {
        "shape": [count],
        "pieces": [
            {"file": SHARD, "key": f"master/{name}/0:{count}/{i}", "dim": 0, "start": 0, "stop": count, "offset": i,
             "length": 1} for i in range(count)
        ],
    }  # fmt: skip
    seal(folder, body)


def large_state(folder: Path) -> None:
    sparse(folder / "state.json", 600 << 20)
    body = body_of(folder)
    body["files"]["state.json"]["size"] = 600 << 20
    seal(folder, body)


def state_of_one_text(folder: Path) -> None:
    forge_state(folder, b'{"a": "' + "\U0001f600".encode() + b"a" * (LARGEST_STATE - 20) + b'"}')


def large_shard(folder: Path) -> None:
    sparse(folder / SHARD, 200 << 30)
    body = body_of(folder)
    body["files"][SHARD]["size"] = 200 << 30
    seal(folder, body)


def large_tensor(folder: Path) -> None:
    """A tensor that takes them: the manifest is right, and so is the header."""
    body, count = body_of(folder), 50 << 30
    (folder / SHARD).rename(folder / "other")
    body["files"]["other"] = body["files"][SHARD]
    for kinds in body["tensors"].values():
        for entry in kinds.values():
            for piece in entry["pieces"]:
                piece["file"] = "other"
    key = f"master/huge/0:{count}/0"
    text = json.dumps({key: {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)
    sparse(folder / SHARD, 8 + len(text) + 4 * count)
    body["files"][SHARD] = {"size": 8 + len(text) + 4 * count, "xxh128": "0" * 32}
    piece = {"file": SHARD, "key": key, "dim": 0, "start": 0, "stop": count, "offset": 0, "length": count}
    body["tensors"]["huge"] = {"master": {"shape": [count], "pieces": [piece]}}
    seal(folder, body)


def large_spare(folder: Path) -> None:
    sparse(folder / "spare", 200 << 30)
    body = body_of(folder)
    body["files"]["spare"] = {"size": 200 << 30, "xxh128": "0" * 32}
    seal(folder, body)


def large_header(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.write((2**63).to_bytes(8, "little"))
    body = body_of(folder)
    body["files"][SHARD]["xxh128"] = files.hash_of(folder / SHARD, "xxh128")
    state = json.dumps(GOOD).encode()
    seal(folder, body)
    forge_state(folder, state)


LARGE = [
    spaces, just_short, empty_lists, many_keys, one_name, million_pieces, pieces_within_the_bytes, most_pieces,
    large_state, state_of_one_text, large_shard, large_tensor, large_spare,
]  # fmt: skip


@pytest.mark.parametrize("make", LARGE, ids=[make.__name__ for make in LARGE])
def test_what_is_large_is_refused_early(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder)
    with bounded(), pytest.raises(CheckpointError) as found:
        assert verify(folder) and open_checkpoint(folder)
    assert str(folder) in str(found.value) and len(str(found.value)) < 1500


def test_a_header_that_is_no_header_is_refused(folder: Path) -> None:
    large_header(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(folder).read("norm.weight")


TORN = [
    b'{"step": 1, "loss": 1e999}',
    b"[" * 100_000, b'{"step":' * 100_000, b'{"step": 1, "step": 1}', b'{"step": NaN}', b'{"step": 1e999}', b"[1]",
    b'{"step": true}', b'{"step": "1"}', b'{"step": 1.0}', b"{}", b"", b"\xff\xfe", b"\0" * 100, b'{"step": 1', b"null",
    b'{"step": 1, "a": "' + b"a" * files.LONGEST_LINE + b'"}', b'{"step": ' + b"1" * 5000 + b"}", b'{"step": 9}',
    b" " * files.LONGEST_LINE + b'{"step": 1}', b'{"step": 1}' + b" " * (3 * files.LONGEST_LINE),
]  # fmt: skip


@pytest.mark.parametrize("line", TORN, ids=range(len(TORN)))
def test_a_hostile_line_of_metrics_is_dropped(tmp_path: Path, line: bytes) -> None:
    path, good = tmp_path / "metrics.jsonl", [b'{"step": 1, "loss": 2.5}\n', b'{"step": 2, "loss": "nan"}\n']
    path.write_bytes(good[0] + line + b"\n" + good[1] + b'{"step": 2}')
    with bounded(tmp_path):
        assert truncate_metrics(path, 2) >= 2
    assert path.read_bytes() == b"".join(good)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert truncate_metrics(path, 2) == 0


def test_metrics_that_are_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with bounded(), pytest.raises(InputError, match="not a regular file"):
            truncate_metrics(path, 1)


class Endless(BaseHTTPRequestHandler):
    """Answers every request with bytes without end, whatever was asked for."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" " * (1 << 16))

    def log_message(self, *args: object) -> None:
        pass


def test_an_endless_answer_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="fsspec's http:// needs aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        remote = Remote(f"http://127.0.0.1:{server.server_address[1]}", "run")
        with (
            bounded(tmp_path),
            pytest.raises(CheckpointError, match=f"manifest.json has more than {LARGEST_MANIFEST} bytes"),
        ):
            remote.get(STEP, tmp_path / "here", lambda text: None)
        url = f"{remote.root}/{STEP}/{SHARD}"
        with bounded():
            assert len(files.remote_bytes(remote.system, url, 1000, 5000)) == 1001
        server.shutdown()
    assert list(tmp_path.iterdir()) == []


LEAVES = st.one_of(
    st.integers(-2, 13), st.booleans(), st.none(), st.floats(), st.sampled_from(["", "x", [], {}, 10**30, "../a"])
)


def places(value: Any) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *way) for key, item in items for way in ((), *places(item))]


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A deep copy with up to three places changed or removed."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(result) or [("step",)]))
        inner: Any = result
        for key in way:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = draw(LEAVES)
        elif isinstance(inner, dict):
            inner.pop(last, None)
    return result


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(state=mutated(GOOD))
def test_any_state_is_refused_or_like_a_true_one(state: dict[str, Any]) -> None:
    try:
        check_state(files.parse_json(json.dumps(state).encode(), "state"), 2)
    except CheckpointError:
        return
    assert state["step"] == 2 and min(state["consumed_samples"], state["skipped_samples"]) >= 0
    assert type(state["engine"]["optimizer_step"]) is int


@FUZZ
@given(data=st.data())
def test_any_manifest_is_refused_or_covers_its_tensors(whole: Path, data: st.DataObject) -> None:
    body = body_of(whole)
    body.pop("sha256")
    body = data.draw(mutated(body))
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    try:
        manifest = Manifest.from_json(json.dumps(body | {"sha256": digest}).encode())
        manifest.check_coverage()
    except CheckpointError:
        return
    again = Manifest.from_json(manifest.to_json().encode())
    assert again.tensors == manifest.tensors
    keys = [piece.key for entry in manifest.tensors.values() for piece in entry.pieces]
    assert len(set(keys)) == len(keys)


@FUZZ
@given(text=st.binary(max_size=200), at=st.integers(0, 60), cut=st.integers(0, 60))
def test_any_bytes_in_metrics_leave_whole_lines(tmp_path: Path, text: bytes, at: int, cut: int) -> None:
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'
    path.write_bytes(good[:at] + text + good[at + cut :])
    truncate_metrics(path, 2)
    for line in path.read_bytes().splitlines():
        assert type(json.loads(line)["step"]) is int and json.loads(line)["step"] <= 2


def test_the_cases_are_counted() -> None:
    check_count(__name__)
