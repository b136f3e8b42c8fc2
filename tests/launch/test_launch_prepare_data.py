"""The commands of prepare_data.py from end to end, each as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {vocab_size: 270, max_seq_len: 64}
data: {source: text.jsonl, path: prepared, seq_len: 32, validation_fraction: 0.3, packing: best_fit,
       document_masks: true}
train: {global_batch_size: 4, micro_batch_size: 2, max_steps: 20}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c.yaml and what the command without a name makes of it."""
    place = tmp_path_factory.mktemp("place")
    (place / "c.yaml").write_text(CONFIG)
    words = [f"{w}{i}" for i in range(9) for w in ("north", "south", "east", "west")]
    texts = [" ".join(words[(i * k) % 36] for k in range(1, 5 + i)) for i in range(60)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert "bytes per token" in ok(place, "--config=c.yaml")
    return place


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/prepare_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=place)


def ok(place: Path, *arguments: str) -> str:
    result = run(place, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(place: Path, *arguments: str) -> str:
    result = run(place, *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr


def test_preparing_writes_plans_and_is_done_once(place: Path):
    before = {path: path.stat().st_mtime_ns for path in (place / "prepared").iterdir()}
    assert {path.name for path in before} >= {"train.32.plan", "tokenizer.json"}
    ok(place, "--config", "c.yaml")
    assert {path: path.stat().st_mtime_ns for path in (place / "prepared").iterdir()} == before


def test_show_and_stats(place: Path):
    shown = ok(place, "show", "--sample=3", "--config=c.yaml")
    assert shown.startswith("sample 3: step 1, phase 1 of 1, 32 tokens\ncorpus prepared: epoch 1, place ")
    assert "prepared/train.bin: bytes " in shown
    assert "east" in shown
    table = ok(place, "stats", "--config=c.yaml")
    assert "median " in table
    assert " epochs in this run" in table
    assert "padding of samples of 32: " in table
    assert "#" in table


def test_register_then_verify(place: Path):
    config = ["--config=c.yaml", "--data.path=registered", "--data.tokenizer=prepared/tokenizer.json"]
    files = ["--train=prepared/train.bin", "--validation", "prepared/validation.bin"]
    assert "token files made elsewhere: prepared/train.bin" in ok(place, "register", *files, *config)
    assert "no file is damaged" in ok(place, "verify", *config)
    assert "train.bin" in ok(place, "show", "--sample", "0", *config, "--data.packing=chunk")
    assert "run python launch/prepare_data.py" in refused(place, "show", "--sample", "0", *config)
    ok(place, *config)  # writes the packing plans
    assert "registered" in ok(place, "show", "--sample", "0", *config)
    assert "has a manifest.json already" in refused(place, "register", *files, *config)


def test_damage_ends_with_status_2(place: Path):
    damaged = place / "damaged"
    subprocess.run(["cp", "-r", place / "prepared", damaged], check=True)
    for name in ("train.bin", "validation.idx"):
        raw = bytearray((damaged / name).read_bytes())
        raw[-1] ^= 1
        (damaged / name).write_bytes(raw)
    told = refused(place, "verify", "--config=c.yaml", "--data.path=damaged")
    assert "error: damaged/train.bin: sha256" in told
    assert "damaged/validation.idx: sha256" in told


def test_a_remote_corpus(place: Path):
    url = f"file://{place}/prepared"
    config = ["--config=c.yaml", f"--data.path={url}", "--data.cache=copies"]
    assert "holds no prepared data" in refused(place, "verify", *config)
    ok(place, *config)
    assert "no file is damaged" in ok(place, "verify", *config)
    assert f"corpus {url}: epoch 1" in ok(place, "show", "--sample=0", *config)


def test_what_is_misspelt_is_explained(place: Path):
    assert "unknown command 'verfiy'; expected one of prepare, register" in refused(place, "verfiy")
    assert "register needs --train=GLOB" in refused(place, "register", "--config=c.yaml")
    for sample in ([], ["--sample=-1"], ["--sample=x"]):
        assert "show needs --sample=N" in refused(place, "show", *sample, "--config=c.yaml")
    assert "unknown key 'sample'" in refused(place, "stats", "--sample=1", "--config=c.yaml")
    usage = ok(place, "--help")
    assert "register" in usage
    assert "--data.seq_len" in usage
