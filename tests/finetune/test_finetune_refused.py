"""What cannot be fine-tuned on is one clear error, before anything is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from chat_cases import T, chat_config, sums, tuned, turn, write

from llm.config.parse import to_yaml
from llm.errors import InputError
from llm.finetune.settings import finetune_config
from pool import RankPool
from runs import contents
from trained_run import write_run

GOOD = "".join(json.dumps({"messages": messages}) + "\n" for messages in sums())
Messages = list[dict[str, Any]]


def conversation(messages: Messages | str) -> dict[str, str]:
    """Files of 60 conversations, then of one that is given."""
    return {"chat.jsonl": GOOD + json.dumps({"messages": messages})}


def line(text: str) -> dict[str, str]:
    return {"chat.jsonl": GOOD + text}


def template(text: str) -> dict[str, str]:
    return {"tokenizer_config.json": json.dumps({"chat_template": text})}


HALF = [{"role": "user", "content": "\ud800"}, *turn("a", "b")[1:]]
# What is written into the folder, what is added to the command, and what is said.
REFUSED: dict[str, tuple[dict[str, str], list[str], str]] = {
    "an empty file": ({"chat.jsonl": ""}, [], r"has conversations in \{'train': 0, .*; use more conversations"),
    "no JSON": (line("{oops"), [], "line 61 is not JSON"),
    "no object": (line("[1]"), [], r"line 61: expected an object with `messages`, a list; found \[1.0\]"),
    "another object": (line('{"text": "a"}'), [], "line 61: expected an object with `messages`.* found {'text': 'a'}"),
    "no list": (conversation("a"), [], "line 61: expected an object with `messages`, a list; found {'messages': 'a'}"),
    "an empty list": (conversation([]), [], r"line 61: expected an object with `messages`.* found {'messages': \[\]}"),
    "no answer": (conversation(turn("a", "b")[:1]), [], "line 61: the last message is of the user: no answer follows"),
    "an empty answer": (conversation(turn("a", " ")), [], "line 61, message 2: the answer is empty"),
    "an unknown role": (conversation([{"role": "bot", "content": ""}]), [], "line 61, message 1: the role is 'bot'"),
    "other fields": (conversation([{"role": "user", "text": ""}]), [], r"message 1: .* found \['role', 'text'\]"),
    "no text": (conversation([{"role": "user", "content": None}]), [], "the content is NoneType; expected text"),
    "half a character": (conversation(HALF), [], "line 61, message 1: the content is not Unicode text"),
    "a prompt beyond the context": (
        conversation(turn("x" * T, "b")), [],
        rf"line 61: \d+ tokens are given before the first that is learnt; a sample has data.seq_len \+ 1 = {T + 1}",
    ),
    "a template that refuses": (
        template("{{ raise_exception('a system message comes first') }}"), [],
        "chat.jsonl, line 1: the chat template refuses the messages: a system message comes first",
    ),
    "a template that is none": (template("{% if %}"), [], "the chat template is no Jinja"),
    "no source": ({}, ["--data.source=nowhere.jsonl"], "data.source nowhere.jsonl does not exist"),
    "no weights": ({}, ["--train.init_from=nowhere"], "train.init_from: .*nowhere is not a folder"),
    "no checkpoint in the run": ({"made/checkpoints/a": ""}, ["--train.init_from=made"], "no complete checkpoint"),
    "weights of another model": ({}, ["--model.n_layer=3"], "model.n_layer: the checkpoint has 2, the config has 3"),
    "a smaller vocabulary": ({}, ["--model.vocab_size=100"], "has 272 tokens, model.vocab_size is 100"),
}  # fmt: skip


def refusals(folder: Path) -> dict[str, tuple[str, bool]]:
    """What each of REFUSED says on this rank of a pool, and whether the folder is as it was."""
    os.chdir(folder)
    write(folder, [])
    base = write_run(folder / "base", chat_config(folder))
    (folder / "c.yaml").write_text(to_yaml(chat_config(folder, train=dict(init_from=str(base)))))
    found = {}
    for name, (texts, words, _) in REFUSED.items():
        for file, text in {"chat.jsonl": GOOD, **texts}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        before = contents(folder)
        try:
            tuned(finetune_config(["--config=c.yaml", *words]))
        except InputError as error:
            found[name] = str(error), contents(folder) == before
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    return found


@pytest.fixture(scope="module")
def found(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bool]]:
    (results,) = one_rank.run(refusals, tmp_path_factory.mktemp("refused"))
    return results


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_place_and_nothing_is_written(name: str, found: dict[str, tuple[str, bool]]) -> None:
    message, unchanged = found[name]
    assert re.search(REFUSED[name][2], message), message
    assert unchanged


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": "chunk"}, "use data.packing=best_fit"),
        ({"blend": {"a": 1.0}}, "found data.blend"),
        ({"path": "a"}, "found data.path"),
    ],
)
def test_settings_of_token_files_are_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        chat_config(tmp_path, data=data)
