"""The commands of prepare_data.py from end to end: the first as a user types it, the others in this process."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TypeAlias

import pytest

from llm.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "launch/prepare_data.py"
Main: TypeAlias = Callable[[list[str]], None]
CONFIG = """
model: {vocab_size: 270, max_seq_len: 64}
data: {source: text.jsonl, path: prepared, seq_len: 32, validation_fraction: 0.3, packing: best_fit,
       document_masks: true}
train: {global_batch_size: 4, micro_batch_size: 2, max_steps: 20}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c.yaml and what the command without a name makes of it."""
    place = tmp_path_factory.mktemp("place")
    (place / "c.yaml").write_text(CONFIG)
    words = [f"{w}{i}" for i in range(9) for w in ("north", "south", "east", "west")]
    texts = [" ".join(words[(i * k) % 36] for k in range(1, 5 + i)) for i in range(60)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(SCRIPT), "--config=c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=place)
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    refused = subprocess.run([*command, "verfiy"], capture_output=True, text=True, timeout=120, cwd=place)
    assert refused.returncode == 2 and refused.stderr.startswith("error: "), refused.stderr
    return place


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture(scope="module")
def main() -> Main:
    """The script's main(), which a process of its own would need two seconds for."""
    before, spec = sys.path[:], importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module.main


def ok(main: Main, *arguments: str) -> str:
    """What it prints."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()), suppress(SystemExit):  # of --help
        main(list(arguments))
    return out.getvalue()


def refused(main: Main, *arguments: str) -> str:
    """Why it does nothing."""
    with pytest.raises(InputError) as error:
        ok(main, *arguments)
    return str(error.value)


def test_preparing_writes_plans_and_is_done_once(place: Path, main: Main):
    before = {path: path.stat().st_mtime_ns for path in (place / "prepared").iterdir()}
    assert {path.name for path in before} >= {"train.32.plan", "tokenizer.json"}
    ok(main, "--config", "c.yaml")
    assert {path: path.stat().st_mtime_ns for path in (place / "prepared").iterdir()} == before


def test_show_and_stats(place: Path, main: Main):
    shown = ok(main, "show", "--sample=3", "--config=c.yaml")
    assert shown.startswith("sample 3: step 1, phase 1 of 1, 32 tokens\ncorpus prepared: epoch 1, place ")
    assert "prepared/train.bin: bytes " in shown
    assert "east" in shown
    table = ok(main, "stats", "--config=c.yaml")
    assert "median " in table
    assert " epochs in this run" in table
    assert "padding of samples of 32: " in table
    assert "#" in table


def test_register_then_verify(place: Path, main: Main):
    config = ["--config=c.yaml", "--data.path=registered", "--data.tokenizer=prepared/tokenizer.json"]
    files = ["--train=prepared/train.bin", "--validation", "prepared/validation.bin"]
    assert "token files made elsewhere: prepared/train.bin" in ok(main, "register", *files, *config)
    assert "no file is damaged" in ok(main, "verify", *config)
    assert "train.bin" in ok(main, "show", "--sample", "0", *config, "--data.packing=chunk")
    assert "run python launch/prepare_data.py" in refused(main, "show", "--sample", "0", *config)
    ok(main, *config)  # writes the packing plans
    assert "registered" in ok(main, "show", "--sample", "0", *config)
    assert "has a manifest.json already" in refused(main, "register", *files, *config)


def test_damage_is_named(place: Path, main: Main):
    damaged = place / "damaged"
    subprocess.run(["cp", "-r", place / "prepared", damaged], check=True)
    for name in ("train.bin", "validation.idx"):
        raw = bytearray((damaged / name).read_bytes())
        raw[-1] ^= 1
        (damaged / name).write_bytes(raw)
    told = refused(main, "verify", "--config=c.yaml", "--data.path=damaged")
    assert told.startswith("damaged/train.bin: sha256")
    assert "damaged/validation.idx: sha256" in told


def test_a_remote_corpus(place: Path, main: Main):
    url = f"file://{place}/prepared"
    config = ["--config=c.yaml", f"--data.path={url}", "--data.cache=copies"]
    assert "holds no prepared data" in refused(main, "verify", *config)
    ok(main, *config)
    assert "no file is damaged" in ok(main, "verify", *config)
    assert f"corpus {url}: epoch 1" in ok(main, "show", "--sample=0", *config)


def test_what_is_misspelt_is_explained(place: Path, main: Main):
    assert "unknown command 'verfiy'; expected one of prepare, register" in refused(main, "verfiy")
    assert "register needs --train=GLOB" in refused(main, "register", "--config=c.yaml")
    for sample in ([], ["--sample=-1"], ["--sample=x"]):
        assert "show needs --sample=N" in refused(main, "show", *sample, "--config=c.yaml")
    assert "unknown key 'sample'" in refused(main, "stats", "--sample=1", "--config=c.yaml")
    usage = ok(main, "--help")
    assert "register" in usage
    assert "--data.seq_len" in usage
