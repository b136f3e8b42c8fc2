"""Runs leave as Hugging Face folders and come in again: what `transformers` does with them is what Ingot does."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import TEXTS, logits, make, save
from hf_step import EPS, LR, G, T, step_on_ranks, tokens
from safetensors.torch import load_file, save_file
from thread_ranks import ranks_in_threads
from tokenizer_kinds import LOSSLESS, tokenizer_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from chosen import slow_but
from llm import files, huggingface
from llm.config import OptimConfig
from llm.data.chat import Chat
from llm.data.tokenizer import Tokenizer
from llm.errors import CheckpointError, InputError
from llm.huggingface import export, import_folder
from llm.train.resume import check_resumable
from llm.trained import load_trained, open_trained
from pool import RankPool
from test_generate import continuations

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PROMPT = "def f(x):\n    return"


@pytest.fixture(scope="module")
def trained(four_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Models of `transformers`, and the runs that made a step from their weights."""
    root = tmp_path_factory.mktemp("trained")
    models = {form: make(form) for form in ("gpt2", "llama", "mistral")}
    folders = {form: save(model, root / "folders" / form) for form, model in models.items()}
    four_ranks.run(step_on_ranks, folders, root / "runs")
    for form, folder in folders.items():
        shutil.copyfile(folder / "tokenizer.json", root / "runs" / form / "tokenizer.json")
    return models, root / "runs"


@pytest.mark.parametrize("form", slow_but([], ["gpt2", "llama", "mistral"]))
def test_a_step_on_ranks_is_exported(form: str, trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    models, runs = trained
    found = export(runs / form, tmp_path / "out", dtype="float32", plain=False)
    assert float(found.split("differ by ")[1].split()[0]) < 1e-5
    # One process of PyTorch makes the same step.
    theirs, ids = models[form].train(), tokens(G)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=OptimConfig().betas, eps=EPS, weight_decay=0.0)
    torch.nn.functional.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in exported.state_dict().items():
        torch.testing.assert_close(
            weight, theirs.state_dict()[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # The text after a prompt, and its ids.
    ours = load_trained(runs / form, CPU)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXTS, PROMPT, " two  spaces\n\ttab é 漢字 🙂 ", ""]:
        assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text)
    prompt = ours.tokenizer.encode(PROMPT)[:8]
    expected = exported.generate(torch.tensor([prompt]), max_new_tokens=50, do_sample=False)[0, len(prompt) :]
    assert continuations(ours.model, [prompt], n=50)[0] == expected.tolist()
    assert len(expected) == 50
    assert (tokenizer.eos_token_id, exported.generation_config.eos_token_id) == (ours.tokenizer.eod_id,) * 2
    assert tokenizer.model_max_length == T


@pytest.mark.parametrize("kind", LOSSLESS)
def test_tokenizers_of_other_kinds_give_the_same_ids(kind: str, tmp_path: Path) -> None:
    """Whose own files begin each text with a token."""
    tokenizer = Tokenizer(tokenizer_json(kind).encode())
    huggingface._write_tokenizer(Chat(tokenizer), tmp_path, T)
    found = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, " two  spaces\n\ttab é 漢字 🙂 ", ""]:
        assert found(text)["input_ids"] == tokenizer.encode(text)
    assert (found.eos_token, found.eos_token_id) == (tokenizer.end_token, tokenizer.eod_id)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and the run that was made of it."""
    root = tmp_path_factory.mktemp("imported")
    folder = save(make("mistral"), root / "folder")
    with ranks_in_threads(1):
        assert "differ by" in import_folder(folder, "one", root / "runs")
    return folder, root / "runs/one"


def test_an_imported_run_is_read_like_any(imported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = imported
    trained = load_trained(run, CPU)
    assert trained.step == 0 and trained.config.name == "one"
    reader, config, _ = open_trained(run)
    with pytest.raises(InputError, match=r"is imported; train with --train\.init_from=runs/one and another --name"):
        check_resumable(config, None, reader.state)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.testing.assert_close(logits(trained.model, tokens(3)), theirs(tokens(3)).logits, rtol=0, atol=2e-6)
    found = export(run, tmp_path / "again", dtype="bfloat16", plain=False)
    assert "in bfloat16" in found
    stored, before = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
    assert all(torch.equal(stored[name], before[name].bfloat16()) for name in before)
    with pytest.raises(InputError, match="is there already"), ranks_in_threads(1):
        import_folder(folder, "one", run.parent)
    with pytest.raises(InputError, match=r"name is '\.\./x'"):
        import_folder(folder, "../x", run.parent)


def test_a_folder_is_read_as_it_is(imported: tuple[Path, Path], tmp_path: Path) -> None:
    """Without an import: the same text as the run that was made of it."""
    folder, run = imported
    expected, found = load_trained(run, CPU), load_trained(folder, CPU)
    assert found.step == 0 and found.tokenizer.eod_id == expected.tokenizer.eod_id
    assert continuations(found.model, [[1, 2, 3]], n=9) == continuations(expected.model, [[1, 2, 3]], n=9)
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as a Hugging Face model"):
        load_trained(tmp_path / "damaged", CPU)


def test_the_documented_lines_load_the_plain_file(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = imported
    export(run, tmp_path / "plain", dtype="float32", plain=True)
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs/weights.md").read_text(), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    with torch.inference_mode():
        assert torch.equal(names["logits"], logits(load_trained(run, CPU).model, torch.tensor([[1, 2, 3]])))


def test_other_logits_leave_nothing(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes them differ: here a norm's weight on the way."""
    folder, run = imported

    def spoiled(path: Path) -> None:
        stored = load_file(path / "model.safetensors")
        stored["model.norm.weight"] += 0.01
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})

    compare = huggingface._compare

    def compare_spoiled(checkpoint: Path, path: Path, dtype: str) -> str:
        spoiled(path)
        return compare(checkpoint, path, dtype)

    monkeypatch.setattr(huggingface, "_compare", compare_spoiled)
    with pytest.raises(InputError, match=r"differ by .* nothing was written"):
        export(run, tmp_path / "out", dtype="float32", plain=False)
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    with pytest.raises(InputError, match=r"differ by .* nothing was written"), ranks_in_threads(1):
        import_folder(copy, "two", tmp_path / "runs")
    assert {path.name for path in tmp_path.rglob("*")} == {path.name for path in folder.iterdir()} | {"folder", "runs"}


def test_the_comparison_reads_tokens_beyond_the_window(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another window would give the same logits."""
    monkeypatch.setattr(huggingface, "POSITIONS", 2)
    assert "of 4 x 9 random tokens" in export(imported[1], tmp_path / "out", dtype="float32", plain=False)
    write_config = huggingface.write_hf

    def wider(*arguments: Any, **options: Any) -> None:
        write_config(*arguments, **options)
        path = arguments[2] / "config.json"
        path.write_text(path.read_text().replace('"sliding_window": 7', '"sliding_window": 8'))

    monkeypatch.setattr(huggingface, "write_hf", wider)
    with pytest.raises(InputError, match="nothing was written"):
        export(imported[1], tmp_path / "other", dtype="float32", plain=False)


def test_what_an_export_needs_is_asked_for_first(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = imported
    for target in (folder, folder / "config.json"):
        with pytest.raises(InputError, match="is there already"):
            export(run, target, dtype="float32", plain=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    for target in ("link", "dangling"):
        with pytest.raises(InputError, match="is there already"):
            export(run, tmp_path / target, dtype="float32", plain=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "empty")
    with pytest.raises(InputError, match="is there already"):
        export(run, tmp_path / "empty", dtype="float32", plain=True)
    (tmp_path / "bare").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "bare/config.json")
    shutil.copyfile(folder / "model.safetensors", tmp_path / "bare/model.safetensors")
    with pytest.raises(InputError, match=r"tokenizer .*bare/tokenizer\.json cannot be read"):
        import_folder(tmp_path / "bare", "two", tmp_path)
    Tokenizer.train([text * 99 for text in (*TEXTS, ROOT.joinpath("LICENSE").read_text())], 400).save(
        tmp_path / "bare/tokenizer.json"
    )
    with pytest.raises(InputError, match="the tokenizer has 400 tokens and the model 301"):
        import_folder(tmp_path / "bare", "two", tmp_path)
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ingot\[hf\]'"):
        export(run, tmp_path / "out", dtype="float32", plain=False)
    with ranks_in_threads(1):
        assert "not compared with transformers" in import_folder(folder, "three", tmp_path)
    assert not (tmp_path / "out").exists() and not (tmp_path / "two").exists()


def test_what_transformers_cannot_load_is_one_error(imported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(imported[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {}}))
    with pytest.raises(InputError, match="transformers cannot run this model: AttributeError"), ranks_in_threads(1):
        import_folder(folder, "two", tmp_path / "runs")
    assert not [*(tmp_path / "runs").iterdir()]


@pytest.mark.parametrize("plain", [True, False])
def test_a_full_disk_is_one_error_whatever_the_file(
    plain: bool, imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write_all = list[int](), files.write_all

    def limited(descriptor: int, view: memoryview) -> None:
        if len(written) == limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(descriptor)
        write_all(descriptor, view)

    monkeypatch.setattr(files, "write_all", limited)
    monkeypatch.setattr(huggingface, "_compare", lambda *arguments: "")
    limit = 1000
    export(imported[1], tmp_path / "out", dtype="float32", plain=plain)
    total, names = len(written), [*(tmp_path / "out").iterdir()]
    # By files.create, which says what is full and syncs the bytes.
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in names)
    shutil.rmtree(tmp_path / "out")
    for last in (0, *range(total - len(names) + 1, total)):  # the first part of the weights, and every other file
        limit = last
        written.clear()
        with pytest.raises(CheckpointError, match="the disk is full"):
            export(imported[1], tmp_path / "out", dtype="float32", plain=plain)
        assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_scripts(imported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = imported

    def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / f"launch/{name}.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    first = script("import_hf", "--from", str(folder), "--name", "two")
    assert first.returncode == 0, first.stderr
    second = script("export", "--checkpoint", "runs/two", "--to", "out", "--dtype", "float16")
    assert second.returncode == 0, second.stderr
    assert "differ by" in first.stdout and "differ by" in second.stdout
    again = script("export", "--checkpoint", "runs/two", "--to", "out")
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "is there already" in again.stderr
