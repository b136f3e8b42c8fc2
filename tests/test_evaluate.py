"""Scores equal those of a slow loop over tokens, whatever the batches, the ranks and what requests share."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from llm.cluster.ranks import discover_ranks, initialize
from llm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from llm.errors import Agreed, InputError, require
from llm.evaluate import Request, Scorer, plan, report, score_text, windows
from llm.generate import hidden
from llm.parallel.mesh import Mesh
from llm.trained import Trained, load_trained
from pool import RankPool
from trained_run import write_run

CPU = torch.device("cpu")
T = 16
# The vocabulary is padded: the tokenizer has 261 tokens.
MODEL = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=32, vocab_size=272, max_seq_len=T, position="learned", bias=True
)
CONFIG = RunConfig(data=DataConfig(seq_len=T), model=MODEL)
DOCUMENTS = ["", "é", "import os", "x = 'naïve' # 日本\n" * 3, "def f(x):\n    return x\n" * 5, "class A:\n" * 4]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", CONFIG)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Of this process alone."""
    initialize(discover_ranks({}), timeout_seconds=60, device=CPU)
    yield Mesh.create(ParallelConfig(), "cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run, CPU)


def log_probabilities(trained: Trained, tokens: list[int]) -> torch.Tensor:
    """[V] after the last of `tokens`, which go through the model alone."""
    with torch.no_grad():
        logits = trained.model(torch.tensor([tokens]), torch.arange(len(tokens)), torch.zeros(1, dtype=torch.long))
    return logits[0, -1].double().log_softmax(-1)


def slow_nats(trained: Trained, text: str, seq_len: int, stride: int) -> float:
    """-log p(text), a token at a time: each is predicted from its window alone."""
    tokens = trained.tokenizer.encode(text)
    row, nats = [trained.tokenizer.eod_id, *tokens], 0.0
    for j, token in enumerate(tokens):
        later = 0 if j < seq_len else (j - seq_len) // stride + 1
        end = min(seq_len + later * stride, len(tokens))
        nats -= log_probabilities(trained, row[max(0, end - seq_len) : j + 1])[token].item()
    return nats


@pytest.mark.parametrize(("seq_len", "stride"), [(None, None), (T, T), (10, 3), (5, 1)])
def test_a_text_scores_as_token_by_token(trained: Trained, mesh: Mesh, seq_len: int | None, stride: int | None) -> None:
    found = score_text(Scorer(trained, mesh, rows=3), "x", iter(DOCUMENTS), seq_len, stride)
    seq_len, stride = seq_len or T, stride or T // 2
    nats = sum(slow_nats(trained, text, seq_len, stride) for text in DOCUMENTS)
    tokens, size = (sum(map(len, map(how, DOCUMENTS))) for how in (trained.tokenizer.encode, str.encode))
    assert found == {
        "seq_len": seq_len,
        "stride": stride,
        "documents": len(DOCUMENTS),
        "tokens": tokens,
        "bytes": size,
        "loss": pytest.approx(nats / tokens, rel=1e-6),
        "perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-5),
        "bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-6),
    }


@given(n=st.integers(0, 70), seq_len=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once_with_the_context_that_the_stride_leaves(n: int, seq_len: int, data: Any) -> None:
    stride = data.draw(st.integers(1, seq_len))
    tokens = list(range(100, 100 + n))
    cut = list(windows(tokens, 7, seq_len, stride))
    assert [token for request in cut for token in request.continuation] == tokens
    for request in cut:
        row = [*request.context, *request.continuation]
        assert 1 < len(row) <= seq_len + 1
        first = request.continuation[0] - 100
        assert row == [7, *tokens][first + 1 - len(request.context) :][: len(row)]
        assert len(request.context) >= min(first + 1, seq_len - stride + 1)


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=3), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    max_size=40,
)


@given(requests=REQUESTS, rows=st.integers(1, 9))
def test_a_plan_holds_every_request_once_and_says_what_is_shared(requests: list, rows: int) -> None:
    requests = [Request(*pair) for pair in requests]
    batches = plan(requests, rows)
    assert sorted(i for _, batch in batches for i in batch) == list(range(len(requests)))
    prefixes = [request.context[:-1] for request in requests]
    for start, batch in batches:
        assert 0 < len(batch) <= rows
        for i in batch:
            assert start == (len(prefixes[i]) if prefixes.count(prefixes[i]) > 1 else 0)


def choices() -> list[Request]:
    """Contexts with several continuations each, with one, and twice the same request."""
    random = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, 260, (n,), generator=random).tolist()

    made, lengths = [], [(12, (1, 1, 1)), (12, (4, 1, 2)), (9, (1, 7)), (1, (2,)), (6, (3,)), (3, (2, 2)), (9, (1,))]
    for length, continuations in lengths:
        context = tokens(length)
        made += [Request(context, tokens(n)) for n in continuations]
    return [*made[::2], *made[1::2], made[0]]


def test_scores_are_those_of_each_request_alone_and_shared_contexts_are_computed_once(
    trained: Trained, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, computed = choices(), []
    real = hidden

    def counted(model: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed[-1] += tokens.numel()
        return real(model, tokens, *rest)

    monkeypatch.setattr("llm.evaluate.hidden", counted)
    likeliest = [int(log_probabilities(trained, [*request.context]).argmax()) for request in requests[:4]]
    requests += [Request(r.context, [token, 5]) for r, token in zip(requests, likeliest, strict=False)]
    expected = []
    for context, continuation in requests:
        rows = [log_probabilities(trained, [*context, *continuation[:i]]) for i in range(len(continuation))]
        pairs = list(zip(rows, continuation, strict=True))
        expected.append([sum(row[t].item() for row, t in pairs), sum(int(row.argmax()) != t for row, t in pairs)])
    for rows in (1, 2, 5, 64):
        computed.append(0)
        found = Scorer(trained, mesh, rows).score(requests)
        torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=1e-6)
    alone, *_, shared = computed
    assert alone == sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    assert shared < 0.75 * alone


def on_ranks(run: Path, tensor_parallel: int) -> list[Any]:
    mesh = Mesh.create(ParallelConfig(tensor_parallel=tensor_parallel), "cpu")
    scorer = Scorer(load_trained(run, CPU, mesh), mesh, rows=3)
    texts = [score_text(scorer, "x", iter(text), None, None) for text in (DOCUMENTS, DOCUMENTS[:2])]
    return [*texts, scorer.total(scorer.score(choices())).tolist()]


def test_neither_ranks_nor_batches_change_a_score(run: Path, trained: Trained, mesh: Mesh, two_ranks: RankPool) -> None:
    expected: list[Any] = [
        score_text(Scorer(trained, mesh, 1), "x", iter(d), None, None) for d in (DOCUMENTS, DOCUMENTS[:2])
    ]
    scores = torch.tensor(Scorer(trained, mesh, 64).score(choices()).tolist())
    runs = [r for tensor_parallel in (1, 2) for r in two_ranks.run(on_ranks, run, tensor_parallel)]
    for documents, few, requests in runs:
        assert documents == pytest.approx(expected[0], rel=1e-6)
        assert few == pytest.approx(expected[1], rel=1e-6), "fewer windows than ranks"
        torch.testing.assert_close(torch.tensor(requests), scores, atol=1e-5, rtol=1e-6)


def on_a_rank_that_cannot_read(run: Path) -> str:
    mesh = Mesh.create(ParallelConfig(tensor_parallel=2), "cpu")
    scorer = Scorer(load_trained(run, CPU, mesh), mesh, rows=1)

    def documents() -> Iterator[str]:
        yield from DOCUMENTS * 11  # more than are encoded together
        require(mesh.rank == 0, "the disk is gone")

    with pytest.raises(Agreed, match="the disk is gone"):
        score_text(scorer, "x", documents(), None, None)
    return "all know"


def test_a_text_that_one_rank_cannot_read_ends_all(run: Path, two_ranks: RankPool) -> None:
    """And none waits for the part of another in the products of tensor parallelism."""
    assert two_ranks.run(on_a_rank_that_cannot_read, run) == ["all know"] * 2


@pytest.mark.parametrize(
    ("documents", "seq_len", "stride", "message"),
    [
        (["a"], T + 1, None, r"--seq-len is 17; expected 1 to 16"),
        (["a"], 0, None, "--seq-len is 0"),
        (["a"], 8, 9, r"--stride is 9; expected 1 to 8"),
        (["a"], None, 0, "--stride is 0"),
        ([], None, None, "x.txt holds no token"),
        (["", ""], None, None, "x.txt holds no token"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    trained: Trained, mesh: Mesh, documents: list[str], seq_len: int | None, stride: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score_text(Scorer(trained, mesh, 2), "x.txt", iter(documents), seq_len, stride)
    with pytest.raises(InputError, match="batch size is 0"):
        Scorer(trained, mesh, 0)


@pytest.mark.parametrize(("scale", "perplexity"), [(math.nan, "nan"), (1e6, "inf")])  # e^700 is no double
def test_the_table_and_the_json_take_any_name_and_number(
    scale: float, perplexity: str, run: Path, mesh: Mesh, tmp_path: Path, capsys: Any
) -> None:
    broken = load_trained(run, CPU)
    with torch.no_grad():
        broken.model.norm.weight.fill_(scale)
    record = score_text(Scorer(broken, mesh, 2), "[red]x", iter(["ab"]), None, None)
    task = {"sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.125}
    report({"text": {"[red]x": record}, "tasks": {"some": task}}, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    loss = found["text"]["[red]x"]["loss"]
    assert loss == "nan" if perplexity == "nan" else loss > 710
    assert found["text"]["[red]x"]["perplexity"] == perplexity
    rows = [row.strip("│ ").split() for row in capsys.readouterr().out.replace("│", "").splitlines()]
    for row in (
        f"[red]x perplexity {perplexity}",
        "[red]x tokens 2",
        "some sample_len 4",
        "some acc,none 0.2500 0.1250",
    ):
        assert row.split() in rows


def launch(*argv: str | Path, before: str = "pass") -> subprocess.CompletedProcess:
    script = Path(__file__).resolve().parents[1] / "launch/evaluate.py"
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; {before}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(script), *map(str, argv)], capture_output=True, text=True, timeout=120,
        check=False, env={k: v for k, v in os.environ.items() if k != "RANK"},
    )  # fmt: skip


def test_the_script_prints_a_table_and_writes_json(run: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "some.txt", tmp_path / "new/out.json"
    text.write_text("import os\n" * 9)
    done = launch("--checkpoint", run, "--text", text, "--text", text.parent, "--seq-len", 8, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found.keys() == {"checkpoint", "step", "text", "tasks", "versions"}
    assert (found["checkpoint"], found["step"], found["tasks"]) == (str(run), 5, {})
    assert found["versions"].keys() == {"ingot", "torch", "tokenizers"}
    record = found["text"][str(text)]
    assert list(found["text"]) == [str(text), str(tmp_path)] and record == found["text"][str(tmp_path)]
    assert (record["documents"], record["bytes"], record["seq_len"], record["stride"]) == (1, 90, 8, 4)
    assert f"{record['bits_per_byte']:.4f}" in done.stdout and "perplexity" in done.stdout


def test_the_script_refuses_before_it_loads_anything(run: Path) -> None:
    nothing = launch("--checkpoint", run)
    assert (nothing.returncode, nothing.stderr) == (2, "error: there is nothing to evaluate; give --text or --tasks\n")
    absent = launch("--checkpoint", run, "--tasks", "arc_easy", before="sys.modules['lm_eval'] = None")
    assert absent.returncode == 2 and absent.stderr.endswith("lm-evaluation-harness; pip install 'ingot[eval]'\n")
