"""Copies over HTTP, from a server of our own: ranges are asked for, and a cut connection is gone on from."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from llm.data.prepare import fetch as remote
from llm.data.prepare.fetch import fetch
from llm.data.tokens.hashes import check_hashes
from llm.data.tokens.manifest import read_manifest
from llm.errors import InputError

pytest.importorskip("aiohttp", reason="fsspec's http:// needs aiohttp")

PIECE = 4096  # bytes of a request in these tests


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, without its path."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}/corpus"
        self.knows_ranges, self.answers = True, 10**9
        """Ranges that it still answers; then it cuts connections."""
        self.asked: list[tuple[str, int, int]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        raw, status = path.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and self.server.knows_ranges:
            if len(self.server.asked) >= self.server.answers:
                self.close_connection = True
                return
            first, last = int(found[1]), int(found[2])
            self.server.asked.append((name, first, last + 1))
            raw, status = raw[first : last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A prepared folder of 60 kB, served."""
    tokens = np.random.default_rng(0).integers(0, 500, 30_000)
    write_shards(tmp_path / "origin", {"train": tokens[:25_000], "validation": tokens[25_000:]}, 500)
    monkeypatch.setattr(remote, "PIECE", PIECE)
    with Server(tmp_path / "origin") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def check_whole(folder: Path, server: Server) -> None:
    check_hashes(folder, read_manifest(folder))
    for path in server.folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_copy_is_whole_and_comes_in_pieces(server: Server, tmp_path: Path):
    fetch(server.url, tmp_path / "copy")
    check_whole(tmp_path / "copy", server)
    pieces = [(start, stop) for name, start, stop in sorted(server.asked) if name == "train.bin"]
    assert pieces == [(i, min(i + PIECE, 50_000)) for i in range(0, 50_000, PIECE)]


def test_a_cut_connection_is_gone_on_from(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "STREAMS", 1)
    server.answers = 7
    with pytest.raises(InputError, match=r"cannot be read: .* run again to go on from there"):
        fetch(server.url, tmp_path / "copy")
    assert len(server.asked) == 7 and not (tmp_path / "copy/manifest.json").exists()
    server.answers = 10**9
    fetch(server.url, tmp_path / "copy")
    check_whole(tmp_path / "copy", server)
    assert len(set(server.asked)) == len(server.asked), "nothing comes twice"


def test_what_a_server_cannot_do_is_explained(server: Server, tmp_path: Path):
    server.knows_ranges = False
    message = r"(train|validation)\.bin: 4097 bytes came from 0 on, 4096 were asked for"
    with pytest.raises(InputError, match=message):
        fetch(server.url, tmp_path / "copy")
    (server.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"corpus/manifest\.json cannot be read: FileNotFoundError"):
        fetch(server.url, tmp_path / "other")
