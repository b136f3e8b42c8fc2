"""Instruction tuning from a config to a run: it learns, keeps what was best, ends early, and goes on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_cases import chat_config, metric, sums, tuned, turn, write

from llm.checkpoint.reader import find_named, open_checkpoint
from llm.checkpoint.writer import checkpoints, step_of
from llm.config.finetune import FinetuneConfig
from llm.data.chat import Chat
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError
from llm.finetune.settings import finetune_config
from llm.train.run_folder import RUNS
from pool import RankPool


def runs(folder: Path) -> dict[str, Any]:
    """What was found of two runs on this rank of a pool."""
    os.chdir(folder)
    write(folder, [{"messages": messages} for messages in sums()])
    steps = dict(max_steps=8, eval_interval=2, micro_batch_size=8)
    learns = replace(chat_config(folder, train=steps, optim=dict(lr=3e-3)), name="learns")
    found: dict[str, Any] = {"learns": tuned(learns), "again": tuned(learns)}
    # Nothing can become better: the best is the first validation, and the run ends after two more.
    stays = chat_config(folder, train=steps | dict(eval_interval=1), optim=dict(lr=1e-30, min_lr=0.0, weight_decay=0.0))
    patient = [replace(stays, name="stays", finetune=FinetuneConfig("chat", patience)) for patience in (2, 3)]
    found |= {"early": tuned(patient[0]), "early again": tuned(patient[0]), "more patience": tuned(patient[1])}
    found["kept"] = [step_of(path) for path in checkpoints(RUNS / "stays" / "checkpoints")]
    found["named"] = find_named(RUNS / "stays")
    write(folder, [{"messages": messages} for messages in sums(50)])
    try:
        tuned(replace(learns, train=replace(learns.train, max_steps=9)))
    except InputError as error:
        found["data"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    (results,) = one_rank.run(runs, folder)
    return results | {"folder": folder}


def test_tuning_lowers_the_loss_of_answers_and_keeps_the_template(found: dict[str, Any]) -> None:
    folder = found["folder"] / "runs/learns"
    losses = metric(folder, "val_loss")
    assert [step for step, _ in losses] == [0, 2, 4, 6, 8] and losses[-1][1] < 0.9 * losses[0][1]
    assert (found["learns"], found["again"]) == (8, None)
    chat = Chat.load(folder, Tokenizer.load(folder / "tokenizer.json"))
    asked = chat.prompt(turn("1", "")[:1])
    assert chat.tokenizer.decode(asked) == "### user\n1\n### assistant\n"


def test_the_best_checkpoint_is_kept_and_read_and_patience_ends_a_run(found: dict[str, Any]) -> None:
    assert (found["early"], found["early again"], found["more patience"]) == (3, None, 4)
    assert found["kept"] == [4, 1]  # keep_last is 1
    path, warnings = found["named"]
    assert path.name == "step-00000001" and "lowest validation loss at step 1: that is read" in warnings[0]
    state = open_checkpoint(found["folder"] / "runs/stays/checkpoints/step-00000004").state
    assert state["best"]["step"] == 1 and state["best"]["since"] == 3


def test_a_run_does_not_go_on_with_other_conversations(found: dict[str, Any]) -> None:
    assert "is not what runs/learns began with; restore it, or choose another --name" in found["data"]


def test_the_model_and_the_tokenizer_are_those_of_the_weights(found: dict[str, Any], tmp_path: Path) -> None:
    base = found["folder"] / "runs/learns"
    (tmp_path / "c.yaml").write_text("data: {packing: best_fit, document_masks: true, seq_len: 8, source: a.jsonl}")
    words = ["--config", f"{tmp_path}/c.yaml", "--finetune.task=chat", f"--train.init_from={base}"]
    config = finetune_config([*words, "--model.dropout=0.5"])
    assert config.model == replace(chat_config(tmp_path).model, dropout=0.5)
    assert config.data.tokenizer == str(base / "tokenizer.json") and config.data.source == "a.jsonl"
    assert finetune_config([*words, "--data.tokenizer=t.json"]).data.tokenizer == "t.json"
    with pytest.raises(InputError, match=r"train\.init_from: .*nowhere"):
        finetune_config([*words[:-1], "--train.init_from=nowhere"])
    with pytest.raises(InputError, match=r"finetune\.task is none"):
        finetune_config([*words, "--finetune.task=none"])
    (tmp_path / "t.json").write_bytes((base / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"train\.init_from is not set; expected the run"):
        finetune_config([*words[:-1], f"--data.tokenizer={tmp_path}/t.json"])
