"""Any bytes as a shard whose hash the manifest has: refused, or tensors of the right shapes. Never a crash."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from forged import SHARD, body_of, seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.checkpoint.reader import open_checkpoint, verify
from llm.errors import CheckpointError

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def shards(draw: st.DrawFn, good: bytes) -> bytes:
    """A shard with bytes exchanged, cut or added, in its header's length, its header or its data."""
    length = int.from_bytes(good[:8], "little")
    kind = draw(st.sampled_from(["bytes", "cut", "length", "header"]))
    if kind == "cut":
        return good[: draw(st.integers(0, len(good)))] + draw(st.binary(max_size=40))
    if kind == "length":
        return (
            draw(st.sampled_from([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1])).to_bytes(8, "little")
            + good[8:]
        )
    if kind == "bytes":
        changed = bytearray(good)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(good) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    header = json.loads(good[8 : 8 + length])
    name = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    value = draw(st.sampled_from([-1, 0, 1, 2**40, 2**63, "F32", None, [], [2**31, 2**31]]))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    header[name][field] = [value, value] if field == "data_offsets" and draw(st.booleans()) else value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


@FUZZ
@given(data=st.data())
def test_any_shard_is_refused_or_has_the_manifests_shapes(folder: Path, whole: Path, data: st.DataObject) -> None:
    content = data.draw(shards((whole / SHARD).read_bytes()))
    (folder / SHARD).write_bytes(content)
    body = body_of(whole)
    body["files"][SHARD] = {"size": len(content), "xxh128": xxhash.xxh128(content).hexdigest()}
    seal(folder, body)
    try:
        verify(folder)
        reader = open_checkpoint(folder)
        for name, kind in reader.manifest.tensors:
            tensor = reader.read(name, kind)
            assert tensor.dtype == torch.float32 and tuple(tensor.shape) == reader.shape(name, kind)
    except CheckpointError:
        pass
