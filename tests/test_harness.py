"""lm-evaluation-harness scores a model here as it scores the same weights through its own `hf` model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from states import state_of
from thread_ranks import ranks_in_threads

from llm.checkpoint.writer import write_checkpoint
from llm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from llm.config.parse import to_dict
from llm.data.chat import Chat
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError
from llm.evaluate import Scorer
from llm.huggingface import export
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers
from llm.parallel.mesh import Mesh
from llm.sampling import SamplingConfig
from llm.train.engines.plain import PlainEngine
from llm.trained import Trained, load_trained
from pool import RankPool
from test_evaluate import CPU, mesh  # noqa: F401 - a fixture
from trained_run import TEXTS

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ.update(OFFLINE)
pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

T, V, TRAINED_V = 64, 272, 261  # the vocabulary is padded
LAYERS, HEADS, WIDTH = 2, 4, 32
TEMPLATE = {
    "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
    "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}",
}  # fmt: skip
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
TASKS = {
    "choice": {**CHOICE, "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_mutual_info")]},
    "one": {**CHOICE, "metric_list": [{"metric": "acc"}]},
    "text": {
        "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "rn"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip
ANSWERS = [" return x", " import os", " pass", " A"]
ITEMS = [
    {"question": "def f(x):" * (1 + 3 * i), "choices": ANSWERS[: 2 + i % 3], "answer": i % 2} for i in range(7)
]  # fmt: skip


def write_task(folder: Path, name: str, items: list[dict[str, Any]], task: dict[str, Any]) -> None:
    """A task as users write it: a YAML file, of which JSON is a part, and its items."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    whole = {"task": name, **TEMPLATE, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
    (folder / f"{name}.yaml").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        write_task(folder, name, ITEMS[:1] if name == "one" else ITEMS, task)
    Tokenizer.train(TEXTS * 50, TRAINED_V).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def peer() -> Any:
    """A GPT-2 of transformers with random weights, larger than initial ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=V, n_positions=T)
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=TRAINED_V - 1, eos_token_id=TRAINED_V - 1)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        table = peer.transformer.wte.weight  # `hf` may write what pads the vocabulary: here another comes first
        table[TRAINED_V:] = table[0]
    return peer


def trained_of(weights: dict[str, torch.Tensor], folder: Path) -> Trained:
    model = ModelConfig(
        n_layer=LAYERS, n_head=HEADS, d_model=WIDTH, d_ff=4 * WIDTH, vocab_size=V, max_seq_len=T, position="learned",
        norm="layernorm", activation="gelu", bias=True, tie_embeddings=True,
    )  # fmt: skip
    gpt = GPT(model, DenseLayers(seed=1)).eval()
    assert weights.keys() == {name for name, _ in gpt.named_parameters()}
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(torch.as_tensor(weights[name]))
    config = RunConfig(data=DataConfig(seq_len=T), model=model)
    return Trained(gpt, Chat(Tokenizer.load(folder / "tokenizer.json")), config, 1)


@pytest.fixture(scope="module")
def weights(peer: Any) -> dict[str, torch.Tensor]:
    """The same weights by our names."""
    given = peer.transformer.state_dict()

    def by_head(x: torch.Tensor) -> torch.Tensor:
        """Rows q, k, v of all heads -> q, k, v of each head."""
        return x.unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)

    weights = {"embedding.weight": given["wte.weight"], "position_table.weight": given["wpe.weight"]}
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "qkv": "attn.c_attn", "attention_output": "attn.c_proj"}
    for i in range(LAYERS):
        for mine, theirs in (names | {"up": "mlp.c_fc", "down": "mlp.c_proj"}).items():
            for kind in ("weight", "bias"):
                weight = given[f"h.{i}.{theirs}.{kind}"].t()
                weights[f"blocks.{i}.{mine}.{kind}"] = by_head(weight) if mine == "qkv" else weight
    weights |= {f"norm.{kind}": given[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    return weights


@pytest.fixture(scope="module")
def hf(peer: Any, folder: Path) -> Any:
    """The harness's own model."""
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    ids = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=end, eos_token=end)
    return through_hf(peer, ids)


def through_hf(model: Any, ids: Any) -> Any:
    """The harness's `hf` model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=ids, batch_size=3, max_length=T)


@pytest.fixture(scope="module")
def scorer(weights: dict[str, torch.Tensor], folder: Path, mesh: Mesh) -> Scorer:  # noqa: F811
    return Scorer(trained_of(weights, folder), mesh, rows=5)


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]  # pyright: ignore


def test_each_request_scores_as_through_hf(hf: Any, scorer: Scorer) -> None:
    from llm.harness import HarnessModel

    model, long = HarnessModel(scorer), "import os\n" * 12
    pairs = [
        (context, continuation)
        for context in ("", "def f", "def f ", "x  ", long, long + " ")
        for continuation in (" return x", "os", " import os\n    pass", "é")
    ]
    found, expected = (lm.loglikelihood(instances("loglikelihood", pairs)) for lm in (model, hf))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    texts = [(text,) for text in ("a", "", "class A:\n", long, long * 4)]
    found, expected = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in (model, hf))
    assert found == pytest.approx(expected, abs=1e-3)
    probe = hf.generate_until(instances("generate_until", [("def f", {"until": [], "max_gen_toks": 30})]))[0]
    stop = next(character for character in probe[1:] if character.isascii() and character != probe[0])
    options = [{"until": ["never", stop], "max_gen_toks": 30}, {"until": "r", "max_gen_toks": 20, "do_sample": False}]
    prompts = [(prompt, option) for prompt in ("def f", "imp", "class A:\n", long) for option in options]
    found, expected = (lm.generate_until(instances("generate_until", prompts)) for lm in (model, hf))
    assert found == expected and found[0] == probe.split(stop)[0] and len(set(found)) > 3


def scores(scorer: Scorer, folder: Path | None, names: tuple[str, ...] = (*TASKS,), **options: Any) -> dict[str, Any]:
    from llm.harness import open_tasks, run_tasks

    limit = options.get("limit")
    return run_tasks(scorer, names, open_tasks(names, folder, limit), options.get("num_fewshot"), limit)


@pytest.mark.slow
def test_tasks_score_as_through_hf(hf: Any, scorer: Scorer, folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for names, options in (((*TASKS,), {}), (("choice", "text"), {"num_fewshot": 2, "limit": 5})):
        given: Any = simple_evaluate(hf, tasks=[*names], task_manager=manager, log_samples=False, **options)
        found = scores(scorer, folder, names, **options)
        assert tuple(found) == names
        assert found["choice"]["sample_len"] == options.get("limit", 7) and found["choice"].keys() >= {"acc,none"}
        for name, record in found.items():
            expected = {key: given["results"][name][key] for key in record}
            inexact = 1e-5 if name == "rolling" else 0
            assert record == pytest.approx(expected, rel=inexact, abs=0), name


def test_a_checkpoint_and_its_export_score_alike(
    weights: dict[str, torch.Tensor],
    folder: Path,
    mesh: Mesh,  # noqa: F811
    tmp_path: Path,
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, run = trained_of(weights, folder), tmp_path / "run"
    run.mkdir()
    made.tokenizer.save(run / "tokenizer.json")
    with ranks_in_threads(1):
        pieces = PlainEngine(made.config, made.model, None, CPU).state_pieces()
        write_checkpoint(run / "checkpoints", 7, pieces, state_of(7, config=to_dict(made.config)), keep_last=1)
    export(run, tmp_path / "hf", dtype="float32", plain=False)
    peer = through_hf(*(kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer)))
    names, manager = ("choice", "text"), TaskManager(include_path=str(folder), include_defaults=False)
    given: Any = simple_evaluate(peer, tasks=[*names], task_manager=manager, log_samples=False)
    found = scores(Scorer(load_trained(run, CPU), mesh, rows=4), folder, names)
    assert found == {name: {key: given["results"][name][key] for key in found[name]} for name in names}


def on_ranks(folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(OFFLINE)
    mesh = Mesh.create(ParallelConfig(), "cpu")  # noqa: F811
    return scores(Scorer(trained_of(weights, folder), mesh, rows=2), folder)


@pytest.mark.slow
def test_ranks_share_tasks_even_one_of_a_single_item(
    scorer: Scorer, weights: dict[str, torch.Tensor], folder: Path, two_ranks: RankPool
) -> None:
    found = two_ranks.run(on_ranks, folder, {name: weight.numpy() for name, weight in weights.items()})[0]
    for name, record in scores(scorer, folder).items():
        assert found[name] == pytest.approx(record, rel=1e-6), name


BROKEN = {
    "no answer": ([{"question": "a", "choices": [" a", " b"]}], CHOICE, "'answer' is undefined"),
    "null": ([{"question": "a", "choices": [" a", " b"], "answer": None}], CHOICE, "item 0: the answer is 'None'"),
    "range": ([*ITEMS, {**ITEMS[0], "answer": 2}], CHOICE, "item 7: the answer is 2; expected one of"),
    "empty": ([], CHOICE, "StopIteration"),
    "long": ([{**ITEMS[0], "choices": ["a" * 99, "b"]}], CHOICE, r"has \d+ tokens; expected 1 to 64"),
    "limit": (ITEMS, {**TASKS["text"], "generation_kwargs": {"max_gen_toks": T}}, "max_gen_toks is 64 .* 1 to 63"),
    "beams": (
        ITEMS,
        {**TASKS["text"], "generation_kwargs": {"num_beams": 2, "max_gen_toks": 2}},
        r"\['num_beams'\] are unknown",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_cannot_be_scored_is_one_error(scorer: Scorer, tmp_path: Path, name: str) -> None:
    items, task, message = BROKEN[name]
    write_task(tmp_path, name, items, task)
    with pytest.raises(InputError, match=f"--tasks {name}: .*{message}.*; check the YAML of the task and its data"):
        scores(scorer, tmp_path, (name,))


def test_a_broken_file_is_one_error(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("task: [\n")
    with pytest.raises(InputError, match=r"x\.yaml: ParserError"):
        scores(scorer, None, (str(tmp_path / "x.yaml"),))


def test_a_token_that_pads_the_vocabulary_is_not_written(
    weights: dict[str, torch.Tensor],
    folder: Path,
    mesh: Mesh,  # noqa: F811
) -> None:
    from llm.harness import HarnessModel

    table, nothing, bias = weights["embedding.weight"].clone(), torch.zeros(WIDTH), torch.ones(WIDTH)
    table[TRAINED_V + 3], table[65] = 99.0, 9.0  # the likeliest tokens, whatever came before
    trained = trained_of(weights | {"embedding.weight": table, "norm.weight": nothing, "norm.bias": bias}, folder)
    asked = instances("generate_until", [("def f", {"max_gen_toks": 4}), ("", {"max_gen_toks": 4})])
    assert HarnessModel(Scorer(trained, mesh, 2)).generate_until(asked) == [trained.tokenizer.decode([65] * 4)] * 2


def test_a_rank_without_work_refuses_what_the_others_refuse(
    weights: dict[str, torch.Tensor],
    folder: Path,
    mesh: Mesh,  # noqa: F811
) -> None:
    from llm.harness import HarnessModel

    idle = Scorer(trained_of(weights, folder), mesh, 2)
    idle.mine = slice(1, None, 2)
    with pytest.raises(InputError, match="top_p is 0"):
        HarnessModel(idle).generate_until(instances("generate_until", [("a", {"top_p": 0, "max_gen_toks": 4})]))


def test_generation_stops_when_every_row_has_ended_one_at_its_first_token(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm.harness import HarnessModel

    steps = iter([[None, 65], [None, 66], [None, 67]])
    monkeypatch.setattr("llm.harness.generate", lambda *_, **__: steps)
    stop = scorer.trained.tokenizer.decode([66])
    rows = HarnessModel(scorer).continued([[1], [2]], [stop], 4, SamplingConfig())
    assert rows == [[], [65, 66]] and next(steps) == [None, 67]
