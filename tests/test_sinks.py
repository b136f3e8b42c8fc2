"""Reporting never turns a run into a failure: streams, files and libraries that fail where a report is made."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llm.report
import llm.train.metrics
from llm.cluster.heartbeat import Heartbeat
from llm.config.parse import to_yaml
from llm.config.reports import LoggingConfig
from llm.report import report
from llm.sinks import Sink, Stream
from llm.train.ballot import Ballot
from llm.train.reporter import Reporter
from llm.train.run_folder import RunFolder
from test_generate import CONFIG
from trained_run import write_run

ROOT = Path(__file__).resolve().parents[1]
FAULTS = [
    *(OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)),
    BrokenPipeError(errno.EPIPE, "Broken pipe"), UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
    RuntimeError("Can not load face"), AttributeError("_ARRAY_API not found"), MemoryError(),
]  # fmt: skip
faults = st.sampled_from(FAULTS)


class Failing:
    """Calls `real`, but raises at the call of this number, and at all after it."""

    def __init__(self, number: int, fault: Exception, real: Any = lambda *args, **options: None) -> None:
        self.number, self.fault, self.real, self.calls = number, fault, real, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls >= self.number:
            raise self.fault
        return self.real(*args, **options)


@given(st.integers(1, 9), faults)
def test_a_sink_is_tried_until_it_fails_and_warns_once(number: int, fault: Exception) -> None:
    said, failing = list[str](), Failing(number, fault, real=lambda: "written")
    sink = Sink("loss.png", said.append)
    assert [sink(failing) for _ in range(9)] == ["written"] * (number - 1) + [None] * (10 - number)
    assert failing.calls == number and sink.failure is fault
    assert said == [f"warning: loss.png is left out from here on: {type(fault).__name__}: {fault}"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_is_heard(error: type[BaseException]) -> None:
    def stopped() -> None:
        raise error

    with pytest.raises(error):
        Sink("x", print)(stopped)


PROGRAM = """
import os, pathlib, sys
from llm.sinks import output_failure, protect_streams
protect_streams()
for i in range(3):
    print(f"{i} \\u2588 \\xe9 \\udcff", flush=True)
    print(f"{i} \\u2588 to stderr", file=sys.stderr)
print("x" * 300_000)
sys.stdout.flush()
pathlib.Path(sys.argv[1]).write_text(repr(output_failure()))
"""


def speak(tmp_path: Path, redirection: str, **env: str) -> tuple[int, str, str, str]:
    """Run PROGRAM under a shell: its exit code, what came of stdout and stderr, and its output_failure()."""
    command = ["bash", "-c", f'"$0" -c "$1" failure {redirection}', sys.executable, PROGRAM]
    env |= {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, timeout=60, check=False)
    return (
        result.returncode,
        result.stdout.decode("latin-1"),
        result.stderr.decode(),
        (tmp_path / "failure").read_text(),
    )


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("options", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-8"}, POSIX,
    {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii"},
], ids=str)  # fmt: skip
def test_every_character_is_printed_in_every_encoding(tmp_path: Path, options: dict[str, str]) -> None:
    code, out, err, failure = speak(tmp_path, "", **options)
    assert (code, failure) == (0, "None")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["0", "1", "2"] and lines[3] == "x" * 300_000
    assert all(line.endswith(r"\udcff") for line in lines[:3])
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(("redirection", "expected"), [
    ("> /dev/full", "OSError(28"), ("| true; exit ${PIPESTATUS[0]}", "BrokenPipeError(32"), (">&-", "None"),
    ("2> /dev/full", "None"), ("2>&-", "None"), ("> /dev/full 2>&1", "OSError(28"), (">&- 2>&-", "None"),
])  # fmt: skip
def test_a_stream_that_takes_nothing_fails_no_script(tmp_path: Path, redirection: str, expected: str) -> None:
    code, _, err, failure = speak(tmp_path, redirection)
    assert code == 0 and failure.startswith(expected)
    warned = [line for line in err.splitlines() if "to stderr" not in line]
    told = expected != "None" and "2>" not in redirection
    assert len(warned) == told and all("standard output is left out from here on" in line for line in warned)


def test_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    """As Node.js and some CI runners hand it on: a plain print raises BlockingIOError there."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command, env = [sys.executable, "-c", PROGRAM, "failure"], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=writing, stderr=subprocess.DEVNULL) as child:
        os.close(writing)
        with open(reading, "rb") as file:
            assert len(file.read()) > 300_000
        assert child.wait(60) == 0


def test_every_script_protects_its_streams() -> None:
    scripts = [path for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 8
    for path in scripts:
        last = path.read_text().split('if __name__ == "__main__":\n')[1].strip()
        assert last.startswith(("run_script(", "run_alone(")), path


def fake_run(root: Path, tensorboard: bool) -> Any:
    config = replace(CONFIG, logging=LoggingConfig(tensorboard=tensorboard))
    return SimpleNamespace(
        config=config, folder=RunFolder(root, "run"), step=0, lead=True, device=torch.device("cpu"),
        feed=SimpleNamespace(wait_seconds=0.0, record=dict), mesh=SimpleNamespace(world_size=1),
        engine=SimpleNamespace(compiled=None),
        source=SimpleNamespace(bits_per_byte=lambda nats: None),
        ballot=Ballot(), heartbeat=Heartbeat(),
    )  # fmt: skip


def reported(run: Any, steps: int) -> None:
    """Report so many steps and a validation, as the loop does."""
    reporter = Reporter(run)
    with reporter.console, reporter.metrics:
        for _ in range(steps):
            run.step += 1
            reporter.step(3.0, 1e-3, 0.5, 0)
        reporter.validation({"val_loss": 3.0})


@settings(deadline=None, max_examples=60)
@given(place=st.sampled_from(["metrics", "TensorBoard", "console"]), number=st.integers(1, 6), fault=faults)
def test_a_fault_in_the_middle_of_training_silences_its_place_alone(
    tmp_path_factory: pytest.TempPathFactory, place: str, number: int, fault: Exception
) -> None:
    root = tmp_path_factory.mktemp("run")
    (root / "run").mkdir()
    screen, stderr = io.BytesIO(), list[str]()
    number = min(number, 2) if place == "console" else number  # which shows the first step, then one every few seconds
    failing = Failing(number, fault)
    with pytest.MonkeyPatch.context() as patch:
        if place == "metrics":
            failing.real = llm.train.metrics.write_all
            patch.setattr(llm.train.metrics, "write_all", failing)
        elif place == "TensorBoard":
            events = SimpleNamespace(add_scalar=failing, close=lambda: None)
            patch.setattr(llm.train.metrics, "open_events", lambda *args: events)
        stream = Stream(os.open(os.devnull, os.O_WRONLY), "standard output", stderr.append)
        if place == "console":
            failing.real = screen.write
        patch.setattr(stream, "_write", failing if place == "console" else screen.write)
        patch.setattr(sys, "stdout", io.TextIOWrapper(stream, "ascii", "backslashreplace", line_buffering=True))
        reported(fake_run(root, place == "TensorBoard"), steps=6)
    assert failing.calls == number
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == (number - 1 if place == "metrics" else 7)
    shown = screen.getvalue().decode()
    warnings = [*stderr, *(line for line in shown.splitlines() if "warning" in line)]
    assert (
        len(warnings) == 1
        and "left out from here on" in warnings[0]
        and place in warnings[0].replace("standard output", "console")
    )
    assert place == "console" or "validation loss 3.0000" in shown


def test_a_folder_that_cannot_be_written_leaves_metrics_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run/tensorboard").write_text("a file")
    reported(fake_run(tmp_path, tensorboard=True), steps=2)
    out = capsys.readouterr().out
    assert out.count("warning: ") == 2 and "validation loss" in out
    assert "run/metrics.jsonl is left out from here on: IsADirectoryError" in out
    assert "TensorBoard is left out from here on: " in out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoint and metrics, whose data is nowhere."""
    config = replace(CONFIG, logging=LoggingConfig(sample_tokens=3, sample_prompt=""))
    run = write_run(tmp_path_factory.mktemp("runs") / "one", config)
    (run / "config.yaml").write_text(to_yaml(config))
    records = [{"step": i, "loss": 6 - i / 10} for i in range(1, 6)] + [{"step": 5, "val_loss": 5.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "lo')
    return run


def said_of(run: Path) -> list[str]:
    said = list[str]()
    report(run, said.append)
    return said


def test_a_run_without_its_data_is_reported(finished: Path) -> None:
    first, *said = said_of(finished)
    assert first.startswith("warning: what is known of the data is left out from here on: InputError: data/")
    assert said[0] == f"run run: 5 of {CONFIG.train.max_steps} steps, {finished / 'loss.png'}"
    assert said[1] == "  validation loss   5.2500 nats per token" and said[2].startswith("\n")
    assert len(said) == 3 and (finished / "loss.png").stat().st_size > 1000


def test_data_without_a_bigram_baseline_is_reported(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(bigram_nats_per_token=None, bits_per_byte=lambda nats: None)
    monkeypatch.setattr(llm.report, "load_manifest", lambda config: manifest)
    assert not any("warning" in line or "bigram" in line for line in said_of(finished))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}-{getattr(fault, 'errno', '')}")
def test_what_cannot_be_had_of_a_finished_run_is_left_out(
    finished: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (("load_manifest", "known of the data"), ("plot_loss", "loss.png"), ("load_trained", "sample")):
        with monkeypatch.context() as patch:
            patch.setattr(llm.report, name, Failing(1, fault))
            warnings = [line for line in said_of(finished) if line.startswith("warning")]
        assert len([line for line in warnings if place in line and str(fault) in line]) == 1
        assert len(warnings) == 1 + (name != "load_manifest")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    (finished / "loss.png").write_bytes(b"old")
    monkeypatch.setattr(
        Figure, "savefig", lambda self, file, **options: file.write(b"half") and Failing(1, FAULTS[0])()
    )
    assert any("loss.png is left out" in line for line in said_of(finished))
    assert (finished / "loss.png").read_bytes() == b"old"
    assert not list(finished.glob(".loss*"))


def test_a_run_that_lost_its_tokenizer_or_has_no_matplotlib(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "tokenizer.json").rename(finished / "moved.json")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = said_of(finished)
    (finished / "moved.json").rename(finished / "tokenizer.json")
    assert any("loss.png is left out from here on: ModuleNotFoundError" in line for line in said)
    assert any("the sample of text is left out from here on: InputError: no tokenizer.json" in line for line in said)
    assert any("validation loss   5.2500" in line for line in said)
