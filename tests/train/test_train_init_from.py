"""A run begins with the weights of another: what may differ, what becomes of the tables, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from states import state_of
from thread_ranks import on_thread_ranks, ranks_in_threads
from torch import Tensor

from llm.checkpoint.convert import open_hf
from llm.checkpoint.reader import open_checkpoint
from llm.checkpoint.writer import write_checkpoint
from llm.config import RunConfig
from llm.config.parse import to_dict
from llm.config.sections import CheckpointConfig
from llm.errors import Agreed, InputError
from llm.model.init import InitialWeights
from llm.slices import Slice, slice_of
from llm.train.build import build_model
from llm.train.engines.base import MOMENTS, WeightSource
from llm.train.engines.plain import PlainEngine
from llm.train.init_from import OtherWeights, open_weights, token_ids
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from pool import RankPool
from test_train_start_data import made_run
from tiny_run import BASE, V, batches, case, plain

CPU = torch.device("cpu")
TOKENS = {"a": 0, "b": 1, "c": 2}


def model(**fields: Any) -> RunConfig:
    return plain(case(model=dict(position="learned", bias=False) | fields))


def write_tokenizer(path: Path, tokens: dict[str, int] = TOKENS) -> None:
    """The last token is one of those that were added."""
    *vocabulary, (last, number) = tokens.items()
    parts = {"model": {"vocab": dict(vocabulary)}, "added_tokens": [{"id": number, "content": last}]}
    path.write_text(json.dumps(parts))


def write_run(folder: Path, config: RunConfig, **data: str) -> dict[str, Tensor]:
    """A run of one checkpoint of random weights; returns them."""
    engine = PlainEngine(config, build_model(config, None), None, CPU)
    weights = {name: torch.randn_like(parameter) for name, parameter in engine.parameters.items()}
    with torch.no_grad():
        for name, parameter in engine.parameters.items():
            parameter.copy_(weights[name])
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json")
    with ranks_in_threads(1):
        state = state_of(7, config=to_dict(config), data=data)
        write_checkpoint(folder / "checkpoints", 7, engine.state_pieces(), state, keep_last=1)
    return weights


def opened(path: Path, config: RunConfig, ranks: int = 2) -> tuple[list[Any], list[str]]:
    """What each rank makes of train.init_from, and what rank 0 says."""
    said: list[str] = []
    config = replace(config, train=replace(config.train, init_from=str(path)))
    tokenizer = path.parent / "tokenizer.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)

    def on_rank(rank: int) -> OtherWeights:
        return open_weights(config, tokenizer, said.append if rank == 0 else lambda text: None)

    return on_thread_ranks(ranks, on_rank), said


def read(source: WeightSource, config: RunConfig) -> dict[str, Tensor]:
    """All weights of a model of `config`, as an engine takes them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config, None).named_parameters()}
    return {name: source.read_slice(name, "master", Slice.full(shape)) for name, shape in shapes.items()}


def refused(path: Path, config: RunConfig) -> str:
    """The message of every rank."""
    results, said = opened(path, config)
    assert [type(result) for result in results] == [Agreed, Agreed], results
    assert not said and len({str(result) for result in results}) == 1
    return str(results[0])


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_name_for_a_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    """The run, its checkpoint, a renamed copy with its tokenizer and one without, and a link."""
    run, config = tmp_path / "one", model()
    weights = write_run(run, config)
    checkpoint = run / "checkpoints/step-00000007"
    for name in ("step-00000100.bak", "my-best"):
        shutil.copytree(checkpoint, tmp_path / name)
    shutil.copy(run / "tokenizer.json", tmp_path / "my-best/tokenizer.json")
    (tmp_path / "best").symlink_to(checkpoint)
    for path in (run, checkpoint, tmp_path / "my-best", tmp_path / "step-00000100.bak", tmp_path / "best"):
        results, (said,) = opened(path, config)
        assert all(equal(read(result, config), weights) for result in results)
        assert said.startswith("the weights are those of ") and "\n" not in said


def test_another_tokenizer_beside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "one", model(), tokenizer="ab" * 32)
    told = refused(tmp_path / "one", model())
    assert "one/tokenizer.json: sha256 " in told and f" was trained with {'ab' * 32}: copy that run's tok" in told


LARGER = model(vocab_size=V + 7, max_seq_len=24)


def test_tables_grow_and_it_is_said(tmp_path: Path) -> None:
    weights = write_run(tmp_path / "one", model())
    (source,), (said,) = opened(tmp_path / "one", LARGER, ranks=1)
    initial = InitialWeights(LARGER.model, LARGER.seed)
    rows = initial.read_slice("position_table.weight", "master", Slice.full((24, 32)))[16:]
    mean = weights["embedding.weight"].double().mean(0).float().expand(7, 32)
    expected = weights | {
        "embedding.weight": torch.cat([weights["embedding.weight"], mean]),
        "position_table.weight": torch.cat([weights["position_table.weight"], rows]),
    }
    assert equal(read(source, LARGER), expected)
    assert said.split("\n  ")[1:] == [
        "model.vocab_size 50 -> 57 (new rows are the mean of the others)",
        "model.max_seq_len 16 -> 24 (new rows of a table of positions are initial ones)",
    ]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_hugging_face_folder_gives_its_weights(form: str, tmp_path: Path) -> None:
    """With rows added: transformers' own logits for the old ones, and the mean of these for the new."""
    theirs = hf_models.make(form)
    folder = hf_models.save(theirs, tmp_path / form)
    write_tokenizer(folder / "tokenizer.json")
    old = open_hf(folder).config
    V = old.vocab_size
    ids = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(3))
    config = replace(BASE, model=replace(old, vocab_size=V + 3))
    results, (said,) = opened(folder, config)
    assert said.split("\n  ")[1:] == [f"model.vocab_size {V} -> {V + 3} (new rows are the mean of the others)"]
    ours = build_model(config, None)
    for name, parameter in ours.named_parameters():
        with torch.no_grad():
            parameter.copy_(results[1].read_slice(name, "master", slice_of(parameter)))
    with torch.no_grad():
        found, expected = hf_models.logits(ours, ids), theirs(ids).logits
    torch.testing.assert_close(found[..., :V], expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[..., V:], expected.mean(-1, keepdim=True).expand(-1, -1, 3), atol=2e-6, rtol=0)
    deeper = replace(config, model=replace(config.model, n_layer=3))
    assert "model.n_layer: the checkpoint has 2, the config has 3" in refused(folder, deeper)
    write_tokenizer(tmp_path / "tokenizer.json", {"b": 0})
    assert "3 of the 3 tokens" in opened(folder, config)[1][0]
    (folder / "tokenizer.json").unlink()
    assert "warning" not in opened(folder, config)[1][0]
    (folder / "model.safetensors").unlink()
    assert "cannot be read as a Hugging Face model" in refused(folder, config)


def test_slices_of_a_resized_table_are_those_of_the_whole(tmp_path: Path) -> None:
    """As tensor parallelism cuts it, with a cut in the old rows, one in the new, and along the other dimension."""
    write_run(tmp_path / "one", model())
    (source,), _ = opened(tmp_path / "one", LARGER, ranks=1)
    whole = read(source, LARGER)["embedding.weight"]
    for dim, first, stop in ((0, 0, 29), (0, 29, 57), (0, 52, 57), (1, 3, 9)):
        part = Slice((57, 32), dim, first, stop)
        assert torch.equal(source.read_slice("embedding.weight", "master", part), part.take(whole))


def test_tables_shrink_and_dropout_may_change(tmp_path: Path) -> None:
    weights = write_run(tmp_path / "one", model(dropout=0.1))
    smaller = model(vocab_size=V - 7, max_seq_len=16)
    (source,), (said,) = opened(tmp_path / "one", smaller, ranks=1)
    assert equal(read(source, smaller), weights | {"embedding.weight": weights["embedding.weight"][:43]})
    assert "model.vocab_size 50 -> 43" in said and "model.dropout 0.1 -> 0.0" in said


def evaluated(source: WeightSource, config: RunConfig) -> float:
    """The loss of the model with these weights on text of ids below V."""
    engine = PlainEngine(config, build_model(config, None), None, CPU)
    engine.load_pieces(source, 0)
    assert not any(kind in state for state in engine.optimizer.state.values() for kind in MOMENTS)
    assert engine.scalar_state()["optimizer_step"] == 0
    total, count = engine.evaluate(batches(model(), 0, 0, 1, False))
    return total / count


def test_new_rows_cost_no_more_than_their_share(tmp_path: Path) -> None:
    """With one new row for each old one the loss rises by ln 2 at most, and it rises: the rows are there."""
    write_run(tmp_path / "one", model())
    larger = model(vocab_size=2 * V)
    before = evaluated(open_checkpoint(tmp_path / "one/checkpoints/step-00000007"), model())
    (source,), _ = opened(tmp_path / "one", larger, ranks=1)
    assert before < evaluated(source, larger) <= before + math.log(2)


def test_an_untied_head_begins_as_the_embedding_and_computes_the_same(tmp_path: Path) -> None:
    weights = write_run(tmp_path / "one", model())
    untied = model(tie_embeddings=False)
    (source,), (said,) = opened(tmp_path / "one", untied, ranks=1)
    assert torch.equal(read(source, untied)["head.weight"], weights["embedding.weight"])
    assert said.endswith("model.tie_embeddings True -> False (the output projection begins as the embedding)")
    reader = open_checkpoint(tmp_path / "one/checkpoints/step-00000007")
    assert evaluated(source, untied) == pytest.approx(evaluated(reader, model()), abs=1e-6)


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "one", model(tie_embeddings=False))
    message = refused(tmp_path / "one", model(n_layer=3, d_ff=64, norm="rmsnorm"))
    assert message.split("\n  ")[1:] == [
        "model.n_layer: the checkpoint has 2, the config has 3",
        "model.d_ff: the checkpoint has 128, the config has 64",
        "model.norm: the checkpoint has layernorm, the config has rmsnorm",
        "model.tie_embeddings: the checkpoint has False, the config has True",
    ]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_cannot_be_used_stops_every_rank(tmp_path: Path) -> None:
    """One message, before a weight is read."""
    run = tmp_path / "one"
    write_run(run, model())
    assert "is not a folder" in refused(tmp_path / "nothing", model())
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "holds no complete checkpoint" in refused(tmp_path / "empty", model())
    assert "manifest.json cannot be read" in refused(tmp_path, model())
    checkpoint = run / "checkpoints/step-00000007"
    shutil.copytree(checkpoint, tmp_path / "copy")
    for path in (checkpoint, tmp_path / "copy"):
        damage(path / "rank-00000-00000.safetensors")
        assert "is damaged" in refused(path, model())
    assert "no checkpoint in" in refused(run, model())


def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "one", model())
    reader = open_checkpoint(tmp_path / "one/checkpoints/step-00000007")
    wider = model(d_ff=64)
    with pytest.raises(InputError, match=r"up\.weight is \(128, 32\); expected \(64, 32\) by its config"):
        OtherWeights(reader, wider.model, wider)
    longer = replace(model().model, max_seq_len=17)
    with pytest.raises(InputError, match=r"position_table\.weight is \(16, 32\); expected \(17, 32\)"):
        OtherWeights(reader, longer, model())


def test_ids_of_another_tokenizer_are_warned_about(tmp_path: Path) -> None:
    write_run(tmp_path / "one", model())
    for tokens, warned in (
        (TOKENS, None),
        (TOKENS | {"d": 3}, None),  # more tokens, none of them moved
        ({"a": 0, "b": 2, "c": 1}, "2 of the 3 tokens"),
        ({"a": 0, "c": 2}, "1 of the 3 tokens"),
    ):
        write_tokenizer(tmp_path / "tokenizer.json", tokens)
        _, (said,) = opened(tmp_path / "one", model())
        assert ("warning" in said) == (warned is not None) and (warned or "") in said
    for text in (
        '{"model": {}}',
        '{"model": {"vocab": {"a": "b"}}, "added_tokens": []}',
        "[]",
        '{"model": {"vocab": [1]}, "added_tokens": []}',
        '{"model": {"vocab": ["abc"]}, "added_tokens": []}',
    ):
        (tmp_path / "one/tokenizer.json").write_text(text)
        _, (said,) = opened(tmp_path / "one", model())
        assert "cannot be compared" in said


def test_rows_that_the_tokenizer_uses_are_not_cut(tmp_path: Path) -> None:
    write_run(tmp_path / "one", model())
    write_tokenizer(tmp_path / "one/tokenizer.json", TOKENS | {"d": V - 2})
    message = refused(tmp_path / "one", model(vocab_size=V - 2))
    assert f"model.vocab_size {V - 2} cuts rows off" in message and f"use model.vocab_size={V - 1}" in message
    assert len(opened(tmp_path / "one", model(vocab_size=V - 1))[1]) == 1


def test_the_ids_of_a_real_tokenizer(tmp_path: Path) -> None:
    made_run(tmp_path)
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": [{"id": 2, "content": "</s>"}]}
    (tmp_path / "u.json").write_text(json.dumps(unigram))
    assert token_ids(tmp_path / "u.json") == {"<unk>": 0, "a": 1, "</s>": 2}
    ids = token_ids(tmp_path / "t.json")
    assert sorted(ids.values()) == list(range(257)) and ids["<|endoftext|>"] == 0


LAYOUTS = {
    "zero2-tp2": dict(parallel=dict(zero_stage=2, tensor_parallel=2)),
    "fsdp-tp2": dict(parallel=dict(zero_stage=3, tensor_parallel=2), train=dict(engine="fsdp")),
    "plain": dict(train=dict(engine="plain")),
}


def validation_losses(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The validation loss of a checkpoint, and of runs of every layout that begin with it. Collective."""
    os.chdir(folder)
    losses: dict[str, Any] = {}

    def loss_of(run: Any) -> float:
        total, count = run.engine.evaluate(run.validation_batches())
        return total / count

    def started(name: str, said: list[str], **options: Any) -> Any:
        layout = case(**LAYOUTS.get(name, LAYOUTS["zero2-tp2"]))
        parts = {"parallel": layout.parallel, "deepspeed": layout.deepspeed, "optim": replace(layout.optim, lr=0.03)}
        changed = replace(layout.train, max_steps=2, **options)
        run_config = replace(config, name=name, train=changed, checkpoint=CheckpointConfig(interval=2), **parts)
        held = RunFolder(RUNS, name).claim() if torch.distributed.get_rank() == 0 else None
        torch.distributed.barrier()
        run = start(run_config, CPU, said.append)
        if held is not None:
            held.release()
        return run

    source = started("source", [])
    train(source)
    losses["checkpoint"] = loss_of(source)
    source.engine.close()
    for name in LAYOUTS:
        said: list[str] = []
        run = started(name, said, init_from="runs/source")
        losses[name] = loss_of(run)
        assert run.step == 0 and run.engine.scalar_state()["optimizer_step"] == 0
        assert any(line.startswith("the weights are those of runs/source/checkpoints/step-00000002") for line in said)
        run.feed.close()
        run.engine.close()
    return losses


@pytest.mark.slow
def test_a_run_begins_with_the_loss_of_the_checkpoint(four_ranks: RankPool, tmp_path: Path) -> None:
    config = made_run(tmp_path)
    for losses in four_ranks.run(validation_losses, config, tmp_path):
        expected = losses.pop("checkpoint")
        assert expected != pytest.approx(math.log(257), abs=1e-3), "it has learned something"
        assert losses.pop("zero2-tp2") == expected
        assert losses == pytest.approx(dict.fromkeys(("fsdp-tp2", "plain"), expected), abs=1e-6)
