"""A checkpoint to be forged, and what forges it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash
from states import state_of

STEP = "step-00000002"
SHARD = "rank-00000-00000.safetensors"
GOOD = state_of(
    2, setbacks={"in_a_row": 0, "patience": None, "passed_samples": [[1, 2], [2, 5]], "recent": [[1.0], [2.0]]},
    best={"step": 1, "loss": 2.5, "since": 0}, validation_due=True,
    engine={"optimizer_step": 2, "loss_scale": {"scale": 1024.0, "remaining": 1, "good_steps": 3}},
)  # fmt: skip


def seal(folder: Path, body: dict[str, Any]) -> None:
    """Write a manifest with the right hash: hashes are for integrity, and a forger has them too."""
    body.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


def body_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_bytes())


def forge_state(folder: Path, text: bytes) -> None:
    """Write a state.json of which the manifest knows."""
    (folder / "state.json").write_bytes(text)
    body = body_of(folder)
    body["files"]["state.json"] = {"size": len(text), "xxh128": xxhash.xxh128(text).hexdigest()}
    seal(folder, body)
