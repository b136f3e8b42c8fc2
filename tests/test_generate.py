"""Generation: the cache, batches and tensor-parallel ranks change nothing about the text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint.reader import open_checkpoint
from llm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from llm.config.sections import SparseAttention
from llm.data.chat import Chat
from llm.errors import InputError
from llm.generate import Growing, chat, generate, hidden, stream
from llm.model.cache import KVCache
from llm.model.decode import Decoder, fits
from llm.model.gpt import GPT
from llm.parallel.mesh import Mesh
from llm.sampling import SamplingConfig
from llm.train.build import build_model
from llm.trained import load_trained
from pool import RankPool
from trained_run import write_run

CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0)
CONFIG = RunConfig(
    data=DataConfig(seq_len=48),
    model=ModelConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        d_model=32,
        vocab_size=261,
        max_seq_len=48,
        position="rope",
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", CONFIG)


def continuations(model: GPT, prompts: list[list[int]], sampling=GREEDY, cache=True, n=20) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    steps = generate(model, prompts, max_new_tokens=n, end=260, sampling=sampling, use_cache=cache)
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_the_cache_changes_nothing(run: Path) -> None:
    model = load_trained(run, CPU).model
    for sampling in (
        GREEDY,
        SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2),
    ):
        cached = continuations(model, PROMPTS, sampling)
        assert cached == continuations(model, PROMPTS, sampling, cache=False)
    assert len({tuple(row) for row in cached}) == 3


OPTIONS = {
    "window": dict(attention_window=5),
    "one-key": dict(attention_window=1),
    "alternating": dict(attention_window=(4, None), attention_softcap=1.0),
    "sparse": dict(attention_sparse=(SparseAttention(64, 1, 2), None), max_seq_len=256),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_that_drops_keys_changes_nothing(name: str) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **OPTIONS[name]))
    model = build_model(config, None).eval()
    for parameter in model.parameters():
        parameter.mul_(8)
    long = [i * i % 251 for i in range(160 if name == "sparse" else 25)]
    prompts = [long, long[3:11], long[:14], long[7:8]]
    assert continuations(model, prompts) == continuations(model, prompts, cache=False)
    assert continuations(model, prompts) == [continuations(model, [prompt])[0] for prompt in prompts]


def test_a_batch_is_its_prompts_one_by_one(run: Path) -> None:
    model = load_trained(run, CPU).model
    together = continuations(model, PROMPTS)
    assert together == [continuations(model, [prompt])[0] for prompt in PROMPTS]


def test_greedy_is_the_argmax_of_the_whole_sequence(run: Path) -> None:
    model = load_trained(run, CPU).model
    tokens = list(PROMPTS[0])
    for token in continuations(model, [tokens], n=6)[0]:
        at = torch.arange(len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), at, torch.zeros(1, dtype=torch.long))
        assert token == int(logits[0, -1].argmax())
        tokens.append(token)


def test_limits(run: Path) -> None:
    model = load_trained(run, CPU).model
    long = continuations(model, [[1] * 40], n=100)[0]
    assert len(long) <= 8, "stops at the model's longest sequence"
    for prompt in ([], [1] * 48):
        with pytest.raises(InputError):
            continuations(model, [prompt])
    with pytest.raises(InputError, match="not a folder"):
        load_trained(run / "missing", CPU)


def test_a_copied_checkpoint_is_read_and_one_without_its_tokenizer_says_so(run: Path, tmp_path: Path) -> None:
    expected = continuations(load_trained(run, CPU).model, PROMPTS)
    copy = tmp_path / "a/b/best"
    shutil.copytree(run / "checkpoints/step-00000005", copy)
    with pytest.raises(InputError, match=r"no tokenizer\.json in .*/best or the two folders above; copy"):
        load_trained(copy, CPU)
    shutil.copy(run / "tokenizer.json", copy)
    (tmp_path / "link").symlink_to(copy)
    for path in (run / "checkpoints/step-00000005", copy, tmp_path / "link"):
        assert continuations(load_trained(path, CPU).model, PROMPTS) == expected
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match="best is not a whole checkpoint"):
        load_trained(copy, CPU)


def test_the_end_token_ends_a_row(run: Path) -> None:
    model = load_trained(run, CPU).model
    row = continuations(model, [PROMPTS[0]])[0]
    steps = generate(model, [PROMPTS[0]], max_new_tokens=20, end=row[3], sampling=GREEDY)
    assert [token for step in steps for token in step if token is not None] == row[: row.index(row[3])]


def test_banned_tokens_are_not_drawn(run: Path) -> None:
    model = load_trained(run, CPU).model
    first, *_ = continuations(model, [PROMPTS[0]])[0]
    steps = generate(model, [PROMPTS[0]], max_new_tokens=20, end=260, sampling=GREEDY, banned=[first, 7])
    assert not {first, 7} & {row[0] for row in steps}


def on_ranks(run: Path) -> tuple[list[list[int]], str]:
    world = torch.distributed.get_world_size()
    mesh = Mesh.create(ParallelConfig(tensor_parallel=world), "cpu")
    trained = load_trained(run, CPU, mesh)
    sampled = SamplingConfig(temperature=0.8, seed=3)
    return continuations(trained.model, PROMPTS), "".join(stream(trained, ["def f"], 20, sampled))


def test_two_ranks_equal_one(run: Path, two_ranks: RankPool) -> None:
    trained = load_trained(run, CPU)
    alone = "".join(stream(trained, ["def f"], 20, SamplingConfig(temperature=0.8, seed=3)))
    for tokens, text in two_ranks.run(on_ranks, run):
        assert tokens == continuations(trained.model, PROMPTS)
        assert text == alone and text.startswith("def f") and text.endswith("\n")


def test_more_ranks_than_heads_are_refused(run: Path, four_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="key/value heads"):
        four_ranks.run(on_ranks, run)


def test_several_prompts_are_printed_one_after_the_other(run: Path) -> None:
    text = "".join(stream(load_trained(run, CPU), ["def f", "import"], 5, GREEDY))
    assert text.startswith("--- 1 of 2\ndef f") and "--- 2 of 2\nimport" in text


def test_a_text_that_the_context_ends_is_noted(run: Path) -> None:
    trained, notes = load_trained(run, CPU), list[str]()
    prompt, sampling = "x" * 40, SamplingConfig(seed=4)
    ids = trained.tokenizer.encode(prompt)
    text = "".join(stream(trained, [prompt, "import"], 100, sampling, notes.append))
    room = 48 - len(ids)
    expected = f"ends at the model's longest sequence, 48 tokens (model.max_seq_len), after {room} of 100 new tokens"
    assert f"note: text 1 {expected}" in notes and text.startswith("--- 1 of 2\nxxxx")
    notes.clear()
    "".join(stream(trained, [prompt], room, sampling, notes.append))
    assert notes == []


def test_a_text_that_ends_by_itself_is_not_noted(run: Path) -> None:
    trained, notes = load_trained(run, CPU), list[str]()
    trained.tokenizer.eod_id = continuations(trained.model, [trained.tokenizer.encode("def f")])[0][3]
    assert "".join(stream(trained, ["def f"], 100, GREEDY, notes.append)).startswith("def f")
    assert notes == []


def test_an_empty_prompt_is_the_start_of_a_document(run: Path) -> None:
    trained = load_trained(run, CPU)
    expected = trained.tokenizer.decode(continuations(trained.model, [[trained.tokenizer.eod_id]])[0])
    assert "".join(stream(trained, [""], 20, GREEDY)) == expected + "\n"
    both = "".join(stream(trained, ["", "def f"], 20, GREEDY))
    assert both.startswith(f"--- 1 of 2\n{expected}\n--- 2 of 2\ndef f") and "endoftext" not in both


def test_a_prompt_of_bytes_is_read_as_utf_8(run: Path) -> None:
    trained = load_trained(run, CPU)
    prompts = {"d\udcc3\udca9f": "déf", "日本": "日本"} | dict.fromkeys(["d\udcff", "d\ud800", "d\udcc3"], "d\ufffd")
    for prompt, read in prompts.items():
        text = "".join(stream(trained, [prompt], 5, GREEDY))
        assert text.startswith(read) and text == "".join(stream(trained, [read], 5, GREEDY))


def test_a_character_cut_short_by_the_end_is_shown(run: Path) -> None:
    """One token is drawn, the first byte of a character: it is not lost."""
    trained = load_trained(run, CPU)
    token = trained.tokenizer.encode("\U0001f9ff")[0]
    others = [i for i in range(261) if i != token]
    trained.tokenizer.unused = lambda size: others  # type: ignore[method-assign]
    assert "".join(stream(trained, ["ab"], 1, GREEDY)) == "ab\ufffd\n"


def test_decoding_is_the_model_s_forward_pass(run: Path) -> None:
    """The logits of a step, for one row and for several with packed weights, beside those of the whole sequence."""
    model = load_trained(run, CPU).model
    assert fits(model)
    for position, rows, large in (("rope", 1, False), ("rope", 3, True), ("learned", 3, False)):
        config = replace(CONFIG.model, position=position, attention_window=(None, 6))
        model = build_model(replace(CONFIG, model=config), None).eval()
        tokens = torch.randint(261, (rows, 20), generator=torch.Generator().manual_seed(1))
        cache = KVCache(20)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("llm.model.decode.PACKED_FROM", 0 if large else 1 << 40)
            expected = model(tokens)
            hidden(model, tokens[:, :5], 0, cache)
            decoder = Decoder(model, cache, rows)
            for t in range(5, 20):
                torch.testing.assert_close(decoder(tokens[:, t], t), expected[:, t], rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_plain_is_not_decoded_by_the_short_way() -> None:
    for options in ({"attention_softcap": 1.0}, {"attention_sparse": SparseAttention(64, 1, 2)}):
        model = build_model(replace(CONFIG, model=replace(CONFIG.model, **options)), None).eval()
        assert not fits(model)
    model = build_model(CONFIG, None)
    assert not fits(model.train()) and fits(model.eval()) and not fits(model.double())


def test_weights_by_columns_are_the_same_weights(run: Path) -> None:
    weight = load_trained(run, CPU).model.blocks["0"].qkv.weight
    expected = open_checkpoint(run / "checkpoints/step-00000005").read("blocks.0.qkv.weight", "master")
    assert torch.equal(weight, expected) and weight.stride() == (1, weight.shape[0])


def test_prompts_that_are_alike_are_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = load_trained(run, CPU).model, list[int]()
    monkeypatch.setattr("llm.generate.hidden", lambda m, t, *rest: read.append(len(t)) or hidden(m, t, *rest))
    rows = continuations(model, [PROMPTS[0], PROMPTS[2], PROMPTS[0]], n=4)
    assert read == [2] and rows[0] == rows[2]
    read.clear()
    assert continuations(model, [PROMPTS[0]] * 3, n=4) == [rows[0]] * 3 and read == [1]


def test_the_caller_ends_a_row(run: Path) -> None:
    model, ended = load_trained(run, CPU).model, {1}
    steps = generate(model, PROMPTS[:2], max_new_tokens=6, end=260, sampling=GREEDY, ended=ended)
    counts = [[token is not None for token in step] for step in steps]
    assert sum(row[1] for row in counts) <= 1 and sum(row[0] for row in counts) == 6


def test_samples_of_a_prompt_differ_and_repeat(run: Path) -> None:
    trained, sampling = load_trained(run, CPU), SamplingConfig(seed=5)
    text = "".join(stream(trained, ["def f"], 12, sampling, samples=3))
    parts = [part.split("\n", 1)[1] for part in text.split("--- ")[1:]]
    assert len({*parts}) == 3 and all(part.startswith("def f") for part in parts)
    assert text == "".join(stream(trained, ["def f"], 12, sampling, samples=3))


@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_a_text_grows_to_its_first_stop(pieces: list[str], stops: list[str]) -> None:
    class Pieces:
        def push(self, token: int) -> str:
            return pieces[token]

        def finish(self) -> str:
            return "ab"

    row, shown, read = Growing(Pieces(), stops), "", ""  # pyright: ignore[reportArgumentType]
    for token, piece in enumerate(pieces):
        read += piece
        shown += row.push(token)
        assert read.startswith(shown)
        if row.stopped:
            break
    else:
        read += "ab"
    shown += row.finish()
    places = [read.index(stop) for stop in stops if stop in read]
    assert shown == read[: min(places, default=len(read))]
    assert row.stopped == bool(places)


def test_a_stop_ends_the_text(run: Path) -> None:
    trained = load_trained(run, CPU)
    trained.tokenizer.eod_id = 260  # which this model draws late
    whole = "".join(stream(trained, ["def f"], 20, GREEDY))[len("def f") :]
    stop = whole[4:6]
    text = "".join(stream(trained, ["def f"], 20, GREEDY, stop=[stop, ""]))
    assert text == "def f" + whole[: whole.index(stop)] + "\n"


def test_log_probabilities_are_those_of_the_model(run: Path) -> None:
    trained, notes = load_trained(run, CPU), list[str]()
    trained.tokenizer.eod_id = 260  # as `continuations` has it
    text = "".join(stream(trained, ["def f"], 5, GREEDY, notes.append, log_probs=True, speed=True))
    found, prompt = json.loads(text.splitlines()[-1]), trained.tokenizer.encode("def f")
    assert found["tokens"] == continuations(trained.model, [prompt], n=5)[0]
    with torch.no_grad():
        logits = trained.model(torch.tensor([prompt + found["tokens"]]))[0].log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(found["tokens"])]
    assert found["log_probs"] == pytest.approx(expected, abs=1e-3)
    assert "prefill" in notes[-1] and "decode 4 tokens" in notes[-1]


def test_a_chat_answers_after_all_turns(run: Path) -> None:
    trained = load_trained(run, CPU)
    lines = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"
    trained = replace(trained, chat=Chat(trained.tokenizer, lines))
    first = "".join(chat(trained, ["ab\n"], 4, sampling=GREEDY))
    assert first == "".join(stream(trained, [trained.tokenizer.encode("ab\n")], 4, GREEDY))
    both = "".join(chat(trained, ["ab\n", "c\n"], 4, sampling=GREEDY))
    history = trained.tokenizer.encode("ab\n" + first.removesuffix("\n") + "\nc\n")
    assert both == first + "".join(stream(trained, [history], 4, GREEDY))
    with pytest.raises(InputError, match="longest sequence is 48"):
        "".join(chat(trained, ["ab" * 40], 4, sampling=GREEDY))
