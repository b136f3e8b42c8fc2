"""The presets: published sizes, FLOPs as PyTorch counts them, layouts that fit, no data by default, and their plans."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from chosen import slow_but
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.data.corpus import TextCorpus
from llm.errors import InputError
from llm.plan.budget import OPTIMAL_TOKENS, far_off, tokens_per_parameter
from llm.plan.flops import flops_by_part, flops_per_token, recomputed_flops
from llm.plan.memory import parameters, rank_memory
from llm.train.build import build_model
from llm.train.checks import check_kernels
from meta_model import flops_of_step, meta_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch/configs"
# OpenAI's and Meta's checkpoints, TinyLlama's; of GPT-3 XL no weights were published: its table says 1.3 B.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-1.5b": 1_557_611_200,
    "gpt-1.3b": 1_315_723_264,
    "llama-1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
}
# The FLOPs of the LSTM: tests/model/test_model_lstm.py.
SMALL = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - PUBLISHED.keys() - {"lstm-cpu"})
GPUS = (1, 8, 64)


def preset(name: str, *overrides: str) -> RunConfig:
    return parse_config(["--config", str(CONFIGS / f"{name}.yaml"), *overrides])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_were_published(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        built = sum(p.numel() for p in build_model(config, None).parameters())
    assert built == parameters(config.model) == PUBLISHED[name]
    assert f"{built:,} parameters" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", slow_but(["gpt2-124m", "llama-1b"], [*SMALL, *PUBLISHED]))
def test_flops_are_those_that_pytorch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, once = preset(name), preset(name, "--train.activation_checkpointing=none")
    model, T = config.model, config.data.seq_len
    formula, counted = flops_per_token(model, T, "non-causal"), flops_of_step(meta_model(once, monkeypatch), 1, T) / T
    if name in PUBLISHED:
        assert formula == pytest.approx(counted, rel=1e-3)
    if config != once:
        again = flops_of_step(meta_model(config, monkeypatch), 1, T) / T
        assert formula + recomputed_flops(config, T, "non-causal") == pytest.approx(again, rel=1e-3)
    # The rest is what the formula counts of biases and norms, which multiply no matrix.
    parts, C, L = flops_by_part(model, T, "non-causal"), model.d_model, model.n_layer
    columns = (model.n_head + 2 * model.kv_heads) * model.head_dim + model.ff_dim + 2 * C if model.bias else 0
    assert formula == counted + parts["norm"] + 6 * L * columns


def advised(name: str) -> dict[int, list[str]]:
    """The overrides that a preset's comments advise, by number of GPUs."""
    found = re.findall(r"^# +(\d+) GPUs?: *(.*)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    return {int(gpus): shlex.split(words) for gpus, words in found}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_advised_layouts_pass_the_checks_and_fit_80_gb(name: str) -> None:
    layouts = advised(name)
    assert tuple(layouts) == GPUS
    for gpus, words in layouts.items():
        config = preset(name, *words)
        config.check_world(gpus)
        check_kernels(config, torch.device("cpu"))
        assert sum(rank_memory(config, gpus).values()) < 0.9 * 80e9, gpus
        changed = {word.partition("=")[0] for word in words}
        assert all(re.match(r"--(parallel|train\.(engine|micro_batch_size))", key) for key in changed), changed


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_says_which_text_it_needs_and_takes_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data\.source data/fineweb-edu/.* does not exist"):
        TextCorpus(config.data.source, config.data.text_key, config.data.empty)
    assert config.data.tokenizer.endswith("tokenizer.json")


@pytest.mark.parametrize("name", [*SMALL, *PUBLISHED])
def test_no_preset_is_far_from_compute_optimal_by_mistake(name: str) -> None:
    config = preset(name)
    assert far_off(config) is None
    assert name in SMALL or OPTIMAL_TOKENS / 2 < tokens_per_parameter(config) < 10 * OPTIMAL_TOKENS


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    path = sys.path[0]
    from launch.plan import main

    sys.path[0] = path  # the script puts the checkout there
    main(list(words))
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "gpus"), [*product(PUBLISHED, GPUS), *((name, 1) for name in SMALL)])
def test_every_preset_has_a_plan(
    name: str, gpus: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = advised(name).get(gpus, [])
    told = plan(capsys, "--config", str(CONFIGS / f"{name}.yaml"), f"--gpus={gpus}", *words)
    config = preset(name, *words)
    assert told.startswith(f"{name} on {gpus} GPU")
    assert re.search(rf"^all +{parameters(config.model):,} ", told, re.MULTILINE)
    assert re.search(rf"^all +{sum(rank_memory(config, gpus).values()) / 1e9:,.2f}$", told, re.MULTILINE)
    assert f"data.source {config.data.source} is not prepared" in told
    assert ("in the CPU's memory" in told) == (config.parallel.offload != "none")
