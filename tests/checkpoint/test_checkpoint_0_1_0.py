"""What Ingot 0.1.0 wrote on four ranks (tensor parallel 2, ZeRO 1) is read, and goes on as then."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint.manifest import KINDS
from llm.checkpoint.reader import load_manifest, open_checkpoint, verify
from llm.checkpoint.remote import Remote
from llm.errors import CheckpointError, InputError
from llm.finetune.settings import from_source
from llm.trained import open_trained
from pool import free_port
from runs import DEEPSPEED, ROOT, Workspace, succeeded

FIXTURE = Path(__file__).with_name("fixture-0.1.0")
STEP_FOLDER = Path("runs/fixture/checkpoints/step-00000006")
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
# The hardware, and so the rounding, is not that of expected.json.
TOLERANCE = {"loss": 1e-5, "val_loss": 1e-5, "grad_norm": 1e-4}


def test_every_tensor_is_read() -> None:
    verify(FIXTURE / STEP_FOLDER)
    reader = open_checkpoint(FIXTURE / STEP_FOLDER)
    found = {}
    for name in {name for name, _ in reader.manifest.tensors}:
        found[name] = {"shape": list(reader.shape(name))}
        for kind in KINDS:
            data = reader.read(name, kind).contiguous().numpy().astype("<f4").tobytes()
            found[name][kind] = hashlib.sha256(data).hexdigest()
    assert found == EXPECTED["tensors"]


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copied(tmp_path: Path) -> Workspace:
    """A copy of the fixture, in which the run can go on."""
    space = Workspace(tmp_path / "space")
    shutil.copytree(FIXTURE, space.path, dirs_exist_ok=True)
    return space


def test_damage_is_found(copied: Workspace) -> None:
    for name in load_manifest(folder := copied.path / STEP_FOLDER).files:
        flip(folder / name)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: its sha256"):
            verify(folder)
        flip(folder / name)
    verify(folder)


def test_another_tokenizer_is_refused_by_all_that_read_it(copied: Workspace) -> None:
    run = copied.path / "runs/fixture"
    reads = (lambda: open_trained(run), lambda: from_source({"train": {"init_from": str(run)}}))
    for read in reads:
        read()
    flip(run / "tokenizer.json")
    for read in reads:
        with pytest.raises(
            InputError, match=r"fixture/tokenizer\.json: sha256 \w+, the run of .*000006 was trained with"
        ):
            read()


def test_it_is_copied_to_a_url_and_back(tmp_path: Path) -> None:
    remote, name = Remote(f"file://{tmp_path}/there", "fixture"), STEP_FOLDER.name
    remote.put(FIXTURE / STEP_FOLDER, keep_last=1, keep_every=None)
    remote.get(name, tmp_path / "here", print)
    assert verify(tmp_path / "here" / name) == load_manifest(FIXTURE / STEP_FOLDER)
    flip(tmp_path / "there/fixture" / name / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: its sha256"):
        remote.get(name, tmp_path / "other", print)


def goes_on(space: Workspace, launcher: list[str], layout: list[str]) -> None:
    arguments = ["--config", "runs/fixture/config.yaml", *layout]
    result = space.run([*launcher, str(ROOT / "launch/pretrain.py"), *arguments])
    succeeded(result)
    assert "resumed from step 6 of 12" in result.stdout
    assert list(space.losses("fixture")) == list(range(1, 13))
    assert (space.path / "runs/fixture/checkpoints/latest").read_text() == "step-00000012\n"
    merged: dict[int, dict[str, Any]] = {}
    for record in space.metrics("fixture"):
        merged[record["step"]] = merged.get(record["step"], {}) | record
    for step, numbers in EXPECTED["steps"].items():
        for key, expected in numbers.items():
            assert merged[int(step)][key] == pytest.approx(expected, rel=TOLERANCE[key]), f"step {step}: {key}"


def test_a_run_goes_on_with_the_plain_engine(copied: Workspace) -> None:
    plain = ["--train.engine=plain", "--parallel.tensor_parallel=1", "--parallel.zero_stage=0"]
    goes_on(copied, [sys.executable], plain)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_goes_on_with_deepspeed(copied: Workspace) -> None:
    """Its own config, with as many ranks as tensor parallelism takes."""
    launcher = [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port())]
    goes_on(copied, launcher, [])
