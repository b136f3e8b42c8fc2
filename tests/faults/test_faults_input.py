"""Wrong input: one clear message, exit code 2 (1 for a full disk), and no rank that hangs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from small_disk import small_disk

from chosen import slow_but
from runs import Workspace, contents, succeeded


def refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    text = result.stdout + result.stderr
    assert result.returncode == code, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in text, f"{word!r} not in:\n{text[-3000:]}"


ALONE = {
    "TP does not divide the world": (
        dict(parallel__tensor_parallel=2),
        ["1", "parallel.tensor_parallel"],
    ),
    "TP above the key/value heads": (
        dict(parallel__tensor_parallel=4),
        ["key/value heads", "n_kv_head"],
    ),
    "global batch": (dict(train__global_batch_size=9), ["train.global_batch_size 9", "multiple"]),
    "unknown key": (dict(model__n_layrs=3), ["n_layrs", "n_layer"]),
    "wrong type": (dict(train__max_steps="many"), ["max_steps", "many"]),
    "no data": (dict(data__path="nowhere"), ["nowhere/manifest.json", "add --prepare", "prepare_data.py"]),
    "other weights": (dict(train__init_from="runs/none"), ["runs/none"]),
    "sample prompt": (dict(logging__sample_tokens=5, logging__sample_prompt="x " * 90), ["logging.sample_prompt"]),
    "validation samples": (dict(data__validation_samples=10**6), ["data.validation_samples"]),
    "DeepSpeed's own": (dict(deepspeed__zero_optimization__reduce_bucket_size="many"), ["reduce_bucket_size"]),
    "owned by Ingot": (
        dict(deepspeed__train_batch_size=9),
        ["train_batch_size", "train.global_batch_size"],
    ),
    "kernels": (dict(train__impl="triton"), ["triton", "impl"]),
}


@pytest.mark.parametrize(
    "name", slow_but(["TP does not divide the world", "unknown key", "no data", "DeepSpeed's own"], ALONE)
)
def test_refused_by_one_process(name: str, workspace: Workspace) -> None:
    overrides, words = ALONE[name]
    environment = workspace.environment()
    environment.pop("TRITON_INTERPRET", None)
    before = contents(workspace.path / "runs")
    refused(workspace.python(environment, name="refused", **overrides), *words)
    assert contents(workspace.path / "runs") == before


def test_ranks_that_have_met_leave_no_folder(workspace: Workspace) -> None:
    """torchrun ends the other rank as soon as one has gone."""
    before = contents(workspace.path / "runs")
    result = workspace.torchrun(2, name="refused", train__init_from="runs/none")
    assert result.returncode == 1 and "runs/none" in result.stdout + result.stderr
    assert contents(workspace.path / "runs") == before


@pytest.mark.parametrize("launcher", slow_but(["torchrun"], ["deepspeed", "torchrun"]))
def test_refused_by_all_ranks_alike(launcher: str, workspace: Workspace) -> None:
    """`deepspeed` passes the code 2 on; `torchrun` returns 1 and names it."""
    start = workspace.deepspeed if launcher == "deepspeed" else workspace.torchrun
    before = contents(workspace.path / "runs")
    result = start(2, name="refused", data__path="nowhere")
    assert contents(workspace.path / "runs") == before
    assert result.returncode == (2 if launcher == "deepspeed" else 1)
    text = result.stdout + result.stderr
    assert text.count("error: the data is not prepared") == 1
    assert "Traceback (most recent call last):\n  File" not in text.split("error: the data")[0]
    assert launcher == "deepspeed" or "exitcode  : 2" in text


CORPORA = {
    "missing": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00bad",
}


@pytest.mark.parametrize("name", slow_but(["not UTF-8"], CORPORA))
def test_unfit_corpus(name: str, workspace: Workspace) -> None:
    path = workspace.path / f"{name.replace(' ', '-')}.txt"
    content = CORPORA[name]
    if content is not None:
        path.write_bytes(content)
    refused(workspace.prepare(data__source=str(path), data__path="unfit"), path.name)
    assert not (workspace.path / "unfit").exists()


@pytest.mark.slow
def test_checkpoint_of_another_model(workspace: Workspace) -> None:
    succeeded(workspace.python(name="model", train__max_steps=4))
    result = workspace.python(name="model", train__max_steps=8, model__n_layer=3)
    refused(result, "model.n_layer: the checkpoint has 2, the config has 3")
    refused(workspace.python(name="model", train__max_steps=8, seed=5), "seed")
    refused(workspace.python(name="model", train__max_steps=2), "max_steps")


def test_missing_compiler(workspace: Workspace, tmp_path: Path) -> None:
    """Everything of the usual PATH but compilers."""
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            link = tmp_path / program.name
            if not any(word in program.name for word in ("g++", "gcc", "c++", "clang")) and not link.exists():
                link.symlink_to(program)
    environment = workspace.environment(PATH=str(tmp_path))
    environment.pop("CXX", None)
    refused(workspace.python(environment, name="compiler"), "C++ compiler", "g++")


@pytest.mark.slow
def test_full_disk(workspace: Workspace) -> None:
    """The checkpoint does not fit: exit 1, the place named, every rank gone, the one before whole."""
    folder = workspace.path / "runs" / "disk"
    folder.mkdir(parents=True)
    with small_disk(folder, "1000k"):
        result = workspace.deepspeed(2, name="disk", checkpoint__keep_last=9, train__max_steps=24)
        refused(result, "error: ", str(Path("runs/disk/checkpoints")), "needs", code=1)
        whole = sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("step-"))
        assert whole and not any(name.endswith(".tmp") for name in whole)
    shutil.rmtree(folder)
