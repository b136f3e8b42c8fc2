"""Hugging Face folders that mean something else, or nothing, are refused in one error; so are models without a form."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm.checkpoint.convert import open_hf
from llm.checkpoint.forms import NEUTRAL, form_of, read_config, write_config
from llm.config import ModelConfig
from llm.config.sections import SparseAttention
from llm.errors import InputError
from test_checkpoint_convert import FORMS, FORMS_BY_NAME, LIKE_LLAMA, changed


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        del found[name]
        (folder / "config.json").write_text(json.dumps(found))

    return change


def with_tensors(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """`__` stands for a dot."""

    def change(folder: Path) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        other = changed(folder, folder.with_name("changed"), named)
        shutil.rmtree(folder)
        other.rename(folder)

    return change


def with_index(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return change


def replaced(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


ROPE = "rope_parameters"
BAD = {
    "no-config": ("llama", replaced("config.json", None), "config.json cannot be read"),
    "config-is-no-json": ("llama", replaced("config.json", b"{"), "config.json is not JSON"),
    "config-is-a-list": ("llama", replaced("config.json", b"[]"), "config.json is not a JSON object"),
    "other-model": ("llama", with_config(model_type="phi3"), "model_type is 'phi3'; expected one of gpt2, llama"),
    "no-size": ("llama", without("hidden_size"), "hidden_size is missing"),
    "null-size": ("llama", with_config(intermediate_size=None), "intermediate_size is missing"),
    "heads-of-mistral": ("mistral", without("num_key_value_heads"), "num_key_value_heads is missing"),
    "size-of-text": ("llama", with_config(hidden_size="32"), "hidden_size: found '32'; expected int"),
    "odd-size": ("llama", with_config(num_attention_heads=5), "not a multiple of"),
    "many-blocks": ("llama", with_config(num_hidden_layers=2**40), "blocks by config.json"),
    "activation": ("llama", with_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "exact-gelu": ("gpt2", with_config(activation_function="gelu"), "activation_function is 'gelu'"),
    "unscaled": ("gpt2", with_config(scale_attn_weights=False), "scale_attn_weights is False"),
    "scaled": ("gpt2", with_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    "dropouts": ("gpt2", with_config(attn_pdrop=0.5), "one value, model.dropout, for all of these"),
    "cross-attention": ("gpt2", with_config(add_cross_attention=True), "add_cross_attention is True"),
    "attention-dropout": ("llama", with_config(attention_dropout=0.5), "attention_dropout is 0.5"),
    "some-biases": ("llama", with_config(attention_bias=True), "one value, model.bias, for all of these"),
    "head-dim": ("llama", with_config(head_dim=16), "head_dim is 16"),
    "rope-scaling": ("llama", with_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type is"),
    "rope-type": ("llama", with_config(**{ROPE: {"rope_type": "yarn"}}), "rope_parameters.rope_type is 'yarn'"),
    "rope-is-text": ("llama", with_config(**{ROPE: "yarn"}), "rope_parameters is 'yarn'"),
    "two-bases": ("llama", with_config(rope_theta=7.0), "rope_theta is given as 7.0, 500.0"),
    "partial": ("llama", with_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "experts": ("llama", with_config(num_local_experts=8), "num_local_experts is 8"),
    "quantized": ("llama", with_config(quantization_config={"bits": 4}), "quantization_config is"),
    "code": ("llama", with_config(auto_map={"AutoModel": "x.y"}), "auto_map is"),
    "window-of-llama": ("llama", with_config(sliding_window=7), "sliding_window is 7"),
    "layer-types-of-llama": ("llama", with_config(layer_types=["sliding_attention"] * 2), "layer_types is"),
    "layer-types": (
        "mistral",
        with_config(layer_types=["sliding_attention", "full_attention"]),
        "layer_types is",
    ),
    "no-weights": ("llama", replaced("model.safetensors", None), "model.safetensors cannot be read"),
    "pickles": ("llama", pickled, "pytorch_model.bin: pickled weights"),
    "cut-short": ("llama", cut_short, "model.safetensors cannot be read"),
    "garbage": ("llama", replaced("model.safetensors", b"garbage"), "model.safetensors cannot be read"),
    "index-leads-out": ("llama", with_index("../llama/model.safetensors"), "names the file"),
    "index-leads-nowhere": ("llama", with_index("other.safetensors"), "other.safetensors cannot be read"),
    "missing": ("llama", with_tensors(lm_head__weight=None), "lm_head.weight is missing"),
    "extra": ("llama", with_tensors(model__q_norm=torch.ones(8)), "model.q_norm: no such weights"),
    "shape": ("gpt2", with_tensors(transformer__wpe__weight=torch.ones(3, 32)), "transformer.wpe.weight has the shape"),
    "integers": ("llama", with_tensors(model__norm__weight=torch.ones(32).int()), "model.norm.weight is I32"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_means_something_else_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    form, change, words = BAD[name]
    folder = tmp_path / form
    shutil.copytree(folders[form], folder)
    change(folder)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        open_hf(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_config_gives_a_model_or_one_error(data: st.DataObject, folders: dict[str, Path]) -> None:
    form = FORMS_BY_NAME[data.draw(st.sampled_from(FORMS))]
    fields = [name for theirs, *_ in form.fields.values() for name in theirs.split()]
    known = [*fields, *form.fixed, *NEUTRAL, ROPE, "rope_scaling", "rope_theta", "model_type"]
    found = json.loads((folders[form.model_type] / "config.json").read_text())
    found |= data.draw(st.dictionaries(st.sampled_from([*known, "layer_types", "head_dim", "attention_bias"]), JSON))
    with contextlib.suppress(InputError):
        read_config(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "rmsnorm"}, "model.position learned, norm rmsnorm, activation gelu"),
        ({"n_kv_head": 2}, "n_kv_head below n_head"),
        ({"attention_window": 8}, "attention_window, in GPT-2's"),
        ({**LIKE_LLAMA, "attention_softcap": 50.0}, "attention_softcap"),
        ({**LIKE_LLAMA, "attention_sparse": SparseAttention(64, 1, 2)}, "attention_sparse"),
        ({**LIKE_LLAMA, "attention_window": (8, None)}, "differs between layers"),
        ({**LIKE_LLAMA, "attention_window": 8, "bias": True}, "bias, in Mistral's"),
    ],
)
def test_a_model_that_no_form_has_is_not_exported(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        form_of(ModelConfig(**changes))


def test_older_and_newer_versions_of_transformers_read_the_config() -> None:
    config = ModelConfig(**LIKE_LLAMA, rope_theta=500.0, attention_window=8)
    found = write_config(config, end=3, dtype="float32")
    assert (found["rope_theta"], found["rope_parameters"]["rope_theta"]) == (500.0, 500.0)
    for name in ("rope_theta", "rope_parameters"):
        one = {key: value for key, value in found.items() if key != name}
        assert read_config(one)[1] == replace(config, d_ff=config.ff_dim, n_kv_head=config.kv_heads)
