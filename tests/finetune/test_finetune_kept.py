"""A chat run keeps its template: what generates, exports, imports or goes on from it gives the template's tokens."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_cases import chat_config, sums, tuned, turn, write
from thread_ranks import ranks_in_threads
from tokenizer_kinds import tokenizer_json
from transformers import AutoTokenizer

import llm.generate
from llm.cluster.ranks import discover_ranks
from llm.finetune.chat import Conversations
from llm.finetune.settings import finetune_config
from llm.huggingface import export, import_folder
from llm.trained import load_trained
from pool import RankPool

SCRIPT = Path(__file__).resolve().parents[2] / "launch/generate.py"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [*turn("1+1", "2"), {"role": "user", "content": "2+2"}]


def chat_run(folder: Path) -> None:
    """A run of one step on this rank of a pool, whose tokenizer has special tokens and a template."""
    os.chdir(folder)
    write(folder, [{"messages": messages} for messages in sums()])
    Path("tokenizer.json").write_text(tokenizer_json("bytes_alone"))
    settings = {"chat_template": TEMPLATE, "bos_token": "<|endoftext|>"}
    Path("tokenizer_config.json").write_text(json.dumps(settings))
    config = chat_config(
        folder, model=dict(max_seq_len=256), data=dict(end_token="<|im_end|>"), train=dict(max_steps=1)
    )
    tuned(replace(config, name="chat"))


@pytest.fixture(scope="module")
def root(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run, its export and the run that was imported from that."""
    folder = tmp_path_factory.mktemp("kept")
    one_rank.run(chat_run, folder)
    export(folder / "runs/chat", folder / "exported", dtype="float32", plain=False)
    with ranks_in_threads(1):
        import_folder(folder / "exported", "imported", folder / "runs")
    return folder


def expected(root: Path, messages: Any) -> list[int]:
    """What `transformers` makes of the exported folder."""
    theirs: Any = AutoTokenizer.from_pretrained(root / "exported")
    assert (theirs.bos_token, theirs.eos_token) == ("<|endoftext|>", "<|im_end|>")
    return theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("source", ["runs/chat", "exported", "runs/imported"])
def test_the_prompt_is_that_of_transformers_wherever_the_model_goes(source: str, root: Path) -> None:
    trained = load_trained(root / source)
    assert trained.chat.prompt(ASKED) == expected(root, ASKED)
    assert trained.tokenizer.end_token == "<|im_end|>"


@pytest.mark.parametrize("source", ["runs/chat", "exported", "runs/imported"])
def test_tuning_goes_on_with_the_template(source: str, root: Path) -> None:
    words = ["--data.packing=best_fit", "--data.document_masks=true", "--data.validation_fraction=0.3"]
    words += [f"--data.source={root}/chat.jsonl", f"--train.init_from={root / source}", "--finetune.task=chat"]
    chat = Conversations(finetune_config(words)).chat
    assert chat.prompt(ASKED) == expected(root, ASKED)
    assert chat.tokenizer.end_token == "<|im_end|>"


def test_generate_reads_what_the_template_makes_of_all_turns(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, answer = list[list[int]](), load_trained(root / "runs/chat").tokenizer.encode("four")

    def answered(model: Any, prompts: list[list[int]], **options: Any) -> Iterator[list[int]]:
        read.extend(prompts)
        assert options["end"] == 258  # <|im_end|>
        yield from ([token] for token in answer)

    monkeypatch.setattr(llm.generate, "generate", answered)
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--checkpoint={root / 'runs/chat'}", "--chat"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1\n2+2\n"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # whose first entry the script replaces
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which the script adds to
    runpy.run_path(str(SCRIPT))["main"](discover_ranks({}))
    asked = turn("1+1", "four")
    assert read == [expected(root, asked[:1]), expected(root, [*asked, {"role": "user", "content": "2+2"}])]
    assert capsys.readouterr().out == "four\nfour\n"
