"""Runs leave as Hugging Face folders and come in again: what `transformers` does with them is what Ingot does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import TEXTS, make, save
from hf_step import EPS, LR, G, T, step_on_ranks, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.config import OptimConfig
from llm.huggingface import export
from llm.trained import load_trained
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


@pytest.mark.parametrize("form", ["gpt2", "llama", "mistral"])
def test_a_step_on_ranks_is_exported(form: str, trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    models, runs = trained
    found = export(runs / form, tmp_path / "out", dtype="float32", plain=False)
    assert float(re.search(r"differ by (\S+)", found)[1]) < 1e-5
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
