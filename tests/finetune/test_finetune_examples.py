"""Examples are packed whole, and their answers alone are learnt: each on its own would give the same gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chat_cases import T, chat_config, sums, turn, write

from llm.data.tokens.manifest import SPLITS
from llm.errors import InputError
from llm.finetune.chat import Conversations
from llm.model.layers import IGNORED_TARGET
from llm.train.build import build_model
from llm.train.engines.base import micro_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write(path, [{"messages": messages} for messages in sums()])
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> Conversations:
    return Conversations(chat_config(folder))


def test_every_example_is_in_one_row_and_every_answer_token_one_target(data: Conversations) -> None:
    end = data.tokens.end_token
    expected = sorted(f"{messages[1]['content']}{end}" for messages in sums())
    found = []
    for samples in (data.samples[name] for name in SPLITS):
        rows = np.arange(len(samples))
        batch = micro_batch(samples.batch(rows, rows), CPU)
        assert (batch.targets != IGNORED_TARGET).sum(1).tolist() == samples.targets.tolist()
        for targets in batch.targets:
            text = data.tokens.decode(targets[targets != IGNORED_TARGET].tolist())
            found += [part + end for part in text.split(end)[:-1]]
    assert sorted(found) == expected
    assert sum(data.samples[name].examples for name in SPLITS) == len(sums())


def test_what_is_given_has_no_gradient(data: Conversations) -> None:
    samples = data.samples["train"]
    batch = micro_batch(samples.batch(np.arange(4), np.arange(4)), CPU)
    model = build_model(data.config, None)
    states = model.states(batch.tokens, batch.positions, batch.samples, batch.documents, None).detach().requires_grad_()
    model.head(states, batch.targets).backward()
    assert states.grad is not None
    learning = states.grad.abs().sum(-1) > 0
    row, pieces = 0, samples.row(0).tolist()
    at = 0
    for first, count in pieces:
        learnt = samples.learnt[first : first + count].astype(bool)
        # The state before a learnt token predicts it; that of the last token predicts nothing.
        assert learning[row, at : at + count].tolist()[: count - 1] == learnt[1:].tolist()
        assert at + count > T or not learning[row, at + count - 1]
        at += count
    assert not learning[row, at:].any() and learning[row].any()


def test_gradients_are_those_of_each_answer_after_its_prompt_alone(data: Conversations) -> None:
    """Computed of one conversation at a time: by the template, which tokens are the answer's follows from its text."""
    samples, chat = data.samples["train"], data.chat
    model, rows = build_model(data.config, None), np.arange(4)
    model(*micro_batch(samples.batch(rows, rows), CPU)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    packed = {tuple(samples.tokens[a : a + n].tolist()) for row in rows for a, n in samples.row(row).tolist()}
    counted = 0
    for messages in sums():
        prompt, answer = chat.prompt(messages[:1]), chat.tokenizer.encode(messages[1]["content"])
        tokens = [*prompt, *answer, chat.tokenizer.eod_id]
        if tuple(tokens) in packed:
            states = model(torch.tensor([tokens[:-1]]))[0, len(prompt) - 1 :]
            torch.nn.functional.cross_entropy(states, torch.tensor(tokens[len(prompt) :]), reduction="sum").backward()
            counted += 1
    assert counted == len(packed) > len(rows)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_example_does_not_see_its_neighbours(data: Conversations) -> None:
    samples, model = data.samples["train"], build_model(data.config, None)
    row = next(i for i in range(len(samples)) if len(samples.row(i)) > 1)
    (_, first), (start, count) = samples.row(row)[:2].tolist()
    packed = micro_batch(samples.batch(np.array([row]), np.array([0])), CPU)
    alone = torch.tensor([samples.tokens[start : start + count].tolist()])
    with torch.no_grad():
        together = model(packed.tokens, packed.positions, packed.samples, None, packed.documents)
        apart = model(alone)
    torch.testing.assert_close(together[0, first : first + count], apart[0, : T - first])


@pytest.mark.parametrize("consumed", [0, 8])
def test_ranks_share_a_step_and_know_its_count_of_targets(data: Conversations, consumed: int) -> None:
    (whole,) = [data.loader(dp_rank=0, dp_size=1, consumed=consumed, widen=True).next_step()]
    ranks = [data.loader(dp_rank=rank, dp_size=2, consumed=consumed, widen=True).next_step() for rank in range(2)]
    batches = [batch for step in ranks for batch in step.batches]
    for one, shared in zip(whole.batches, batches, strict=True):
        assert torch.equal(one.tokens, shared.tokens) and torch.equal(one.sample_ids, shared.sample_ids)
    counted = sum(int((micro_batch(batch, CPU).targets != IGNORED_TARGET).sum()) for batch in batches)
    assert [step.target_count for step in (whole, *ranks)] == [counted] * 3


def test_an_epoch_has_every_row_once_and_the_loader_goes_on_anywhere(data: Conversations) -> None:
    samples, share = data.samples["train"], dict(dp_rank=0, dp_size=1, widen=False)
    loader, seen = data.loader(consumed=0, **share), []
    for step in range(len(samples)):  # 8 epochs in 8-sample steps
        batches = loader.next_step().batches
        seen += [batch.tokens[i].tolist() for batch in batches for i in range(len(batch.tokens))]
        if step == 2:
            again = data.loader(consumed=16, **share).next_step()
            assert torch.equal(again.batches[0].tokens, batches[0].tokens)
            assert again.batches[0].sample_ids.tolist() == [16, 17]
    rows = sorted(samples.batch(np.array([i]), np.array([i])).tokens[0].tolist() for i in range(len(samples)))
    assert sorted(seen[: len(samples)]) == rows
    assert loader.epochs() == {data.config.data.source: 8.0}


def test_a_long_answer_loses_its_end_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": messages} for messages in [*sums(), turn("a", "9" * 99)]])
    source = Conversations(chat_config(tmp_path))
    assert "; 1 are longer than data.seq_len and lose their ends" in source.describe()
    assert max(int(count) for name in SPLITS for _, count in source.samples[name].pieces) == T + 1


def test_a_split_without_an_example_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": sums()[0]}])
    with pytest.raises(InputError, match=r"has conversations in .*; use more conversations or another fraction"):
        Conversations(chat_config(tmp_path))
