"""What a run says: lines in a file, a bar on a terminal, nothing on other ranks."""

from __future__ import annotations

import io

import pytest

from llm.train.console import Console, step_text

RECORD = {
    "loss": 3.25, "lr": 4e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6, "tflops": 0.0123,
    "mfu": None, "mfu_formula": "causal", "mfu_non_causal": None, "hfu": None, "data_wait_share": 0.012,
    "memory_bytes": 2**30, "skipped_steps": 0,
}  # fmt: skip


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(file: io.StringIO, steps: int, seconds: float, **kw) -> str:
    now = [0.0]
    with Console(steps, file=file, clock=lambda: now[0], **kw) as console:
        for step in range(kw.get("first_step", 0) + 1, steps + 1):
            now[0] += seconds
            console.step({"step": step, **RECORD})
    return file.getvalue()


def test_a_file_gets_the_first_the_last_and_a_line_every_few_seconds() -> None:
    text = run(io.StringIO(), 100, seconds=1.0)
    steps = [int(line.split()[1].split("/")[0]) for line in text.splitlines()]
    assert steps == [1, *range(6, 100, 5), 100]
    assert "\x1b" not in text


def test_a_line_says_what_matters() -> None:
    line = run(io.StringIO(), 1, seconds=1.0).strip()
    for part in ("step 1/1", "loss 3.2500", "12,346 tokens/s", "lr 4.00e-03", "norm 0.50",
                 "0.0123 TFLOP/s", "waiting for data 1.2%", "memory 1.00 GiB"):  # fmt: skip
        assert part in line


def test_what_is_not_known_is_left_out() -> None:
    now = io.StringIO()
    with Console(1, file=now) as console:
        console.step({"step": 1, **RECORD, "memory_bytes": None})
    line = now.getvalue()
    assert "0.0123 TFLOP/s  waiting for data 1.2%\n" in line
    assert "MFU" not in line and "memory" not in line and "n/a" not in line


def test_time_left_counts_the_steps_of_this_process_only() -> None:
    lines = run(io.StringIO(), 100, seconds=6.0, first_step=90).splitlines()
    assert lines[0].startswith("step 91/100  --:-- left")  # the first step is slower than those that follow
    assert lines[1].startswith("step 92/100  00:48 left")
    assert lines[-1].startswith("step 100/100  00:00 left")


def test_time_left_of_slow_steps() -> None:
    lines = run(io.StringIO(), 10, seconds=600.0).splitlines()
    assert lines[1].startswith("step 2/10  1:20:00 left")


def test_a_known_mfu_comes_with_its_formula_and_skips_are_shown() -> None:
    known = {**RECORD, "mfu": 0.416, "mfu_non_causal": 0.453, "hfu": 0.416, "skipped_steps": 3}
    text = step_text(known)
    assert "MFU 41.6% causal, 45.3% non-causal" in text and "HFU" not in text
    assert "HFU 52.0%" in step_text({**known, "hfu": 0.52})
    assert "skipped 3" in text
    assert "skipped" not in step_text(RECORD)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # under TERM=dumb there are no escape sequences
    text = run(FakeTerminal(), 20, seconds=1.0)
    assert "20/20" in text
    assert "00:00" in text
    assert "loss 3.2500" in text
    assert "\x1b" in text


@pytest.mark.parametrize("file", [io.StringIO(), FakeTerminal()], ids=["file", "terminal"])
def test_other_ranks_are_silent(file: io.StringIO) -> None:
    with Console(10, file=file, enabled=False) as console:
        console.step({"step": 1, **RECORD})
        console.say("hello")
    assert file.getvalue() == ""


@pytest.mark.parametrize("file", [io.StringIO(), FakeTerminal()], ids=["file", "terminal"])
def test_say_prints_text_as_it_is(file: io.StringIO) -> None:
    with Console(10, file=file) as console:
        console.say("[bold] validation loss 3.1")
    assert "[bold] validation loss 3.1" in file.getvalue()
