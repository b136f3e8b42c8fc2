"""Attention's options in a config: one for all layers or a list, from a file and from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llm.config import ModelConfig, RunConfig
from llm.config.parse import from_dict, parse_config, to_dict, to_yaml
from llm.config.sections import SparseAttention
from llm.errors import InputError

STRIDED = SparseAttention(64, 1, 4)
DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"

READ = {
    "attention_window: 128": dict(attention_window=128),
    "attention_window: [128, null]": dict(attention_window=(128, None)),
    "attention_sparse: {block: 64, local: 1, stride: 4}": dict(attention_sparse=STRIDED),
    "attention_sparse: [null, {block: 64, local: 1, stride: 4}]": dict(attention_sparse=(None, STRIDED)),
    "attention_softcap: 50": dict(attention_softcap=50.0),
}


@pytest.mark.parametrize("text", READ)
def test_one_value_or_a_list_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{{text}}}\n")
    key, _, value = text.partition(": ")
    config = parse_config([f"--config={path}"])
    assert config == parse_config([f"--model.{key}={value}"]) == RunConfig(model=ModelConfig(**READ[text]))
    assert config == from_dict(to_dict(config)) == from_dict(yaml.safe_load(to_yaml(config)))


def test_a_list_repeats_over_the_layers() -> None:
    model = ModelConfig(n_layer=5, attention_window=(8, None, 3), attention_sparse=(None, STRIDED, None))
    assert [model.layer_window(i) for i in range(5)] == [8, None, 3, 8, None]
    assert [model.layer_sparse(i) for i in range(5)] == [None, STRIDED, None, None, STRIDED]
    both = ModelConfig(n_layer=4, attention_window=7)
    assert {both.layer_window(i) for i in range(4)} == {7} and both.layer_sparse(3) is None


SPARSE = "--model.attention_sparse="
WINDOW = "--model.attention_window="


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([f"{WINDOW}0"], "model.attention_window of layer 0 is 0; expected at least 1 key, or null for all"),
        ([f"{WINDOW}[4, null, -1]"], "model.attention_window of layer 2 is -1; expected at least 1 key"),
        ([f"{WINDOW}[]"], "model.attention_window lists 0 layers; expected 1 to model.n_layer (4)"),
        ([f"{SPARSE}[null, null, null, null, null]"], "model.attention_sparse lists 5 layers; expected 1 to"),
        ([f"{WINDOW}[1.5]"], "model.attention_window[0]: found 1.5; expected int | null"),
        ([f"{WINDOW}true"], "model.attention_window: found True; expected int"),
        ([f"{WINDOW}{{a: 1}}"], "model.attention_window: found {'a': 1}; expected int"),
        ([f"{SPARSE}3"], "model.attention_sparse: found 3; expected {block, local, stride}"),
        ([f"{SPARSE}{{block: 64}}"], "found no model.attention_sparse.local, model.attention_sparse.stride"),
        ([f"{SPARSE}{{block: 60, local: 1, stride: 4}}"], "model.attention_sparse: block is 60; expected a positive"),
        ([f"{SPARSE}{{block: 0, local: 1, stride: 4}}"], "model.attention_sparse: block is 0; expected a positive"),
        ([f"{SPARSE}[{{block: 64, local: 0, stride: 4}}]"], "model.attention_sparse[0]: local is 0; expected"),
        ([f"{SPARSE}[{{block: 64, local: 1, stride: 0}}]"], "model.attention_sparse[0]: stride is 0; expected"),
        ([f"{SPARSE}[{{block: 64, local: 1, strid: 4}}]"], "unknown key 'model.attention_sparse[0].strid'"),
        (
            [f"{WINDOW}[null, 9]", f"{SPARSE}[null, null, null, {{block: 64, local: 1, stride: 4}}]"],
            "model.attention_window of layer 3 is 9 and model.attention_sparse SparseAttention(block=64",
        ),
        (["--model.attention_softcap=-1"], "model.attention_softcap is -1.0; expected at least 0"),
        (["--model.attention_softcap=.inf"], "model.attention_softcap: found inf; expected float, finite"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_what_was_expected(argv: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(argv)
    assert str(caught.value).startswith(message)


def test_a_model_of_very_many_layers_is_checked_at_once() -> None:
    assert ModelConfig(n_layer=2**62, attention_window=(3, None, 4), attention_sparse=(None, STRIDED, None)).n_layer


def test_the_documented_configs_are_configs() -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    models = [from_dict(yaml.safe_load(text)).model for text in snippets]
    assert len(models) == 3
    gpt3, gemma, mistral = models
    assert [gpt3.layer_sparse(i) is None for i in range(4)] == [True, False] * 2
    assert [gemma.layer_window(i) for i in range(4)] == [4096, None] * 2 and gemma.attention_softcap == 50
    assert {mistral.layer_window(i) for i in range(mistral.n_layer)} == {4096}
