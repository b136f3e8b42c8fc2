"""Hugging Face folders: with their weights Ingot computes what `transformers` does, and nothing odd is taken in."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hf_models import loaded, logits, make, save
from hf_step import T, tokens
from safetensors.torch import load_file, save_file
from states import state_of
from thread_ranks import ranks_in_threads
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from llm import files
from llm.checkpoint import convert
from llm.checkpoint.convert import open_hf, write_hf, write_plain
from llm.checkpoint.forms import FORMS as ALL_FORMS
from llm.checkpoint.forms import GPT2, Form, form_of, read_config, weights
from llm.checkpoint.reader import CheckpointReader, open_checkpoint
from llm.checkpoint.writer import write_checkpoint
from llm.config import ModelConfig
from llm.errors import CheckpointError, InputError
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers
from llm.slices import Slice

FORMS = ("gpt2", "llama", "mistral")
FORMS_BY_NAME = {form.model_type: form for form in ALL_FORMS}
LIKE_LLAMA = dict(norm="rmsnorm", activation="swiglu", position="rope", bias=False)
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    "llama": ("llama", {}),
    "llama-biased-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
}


def loss_of(found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    """Logits to 2e-6; of each weight's gradient, the norm of the difference to 5e-6 of the norm."""
    form, changes = VARIANTS[variant]
    theirs, ids = make(form, **changes).train(), tokens(3)
    ours = loaded(open_hf(save(theirs, tmp_path / "weights"))).train()
    expected, found = theirs(ids).logits, logits(ours, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    loss_of(expected, ids).backward()
    loss_of(found, ids).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    gradients = open_hf(save(theirs, tmp_path / "gradients"))
    for name, parameter in ours.named_parameters():
        gradient = gradients.read_slice(name, "master", Slice.full(gradients.shape(name)))
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 5e-6 * gradient.norm(), name


def test_every_parameter_of_a_model_has_its_place(folders: dict[str, Path]) -> None:
    changes = [{}, {"bias": False}, {"tie_embeddings": False}]
    kinds = [dict(n_kv_head=1, norm="rmsnorm", activation="swiglu", position="rope", d_ff=40), {}]
    for config in [ModelConfig(**kind, **change) for kind in kinds for change in changes]:
        found = {name: weight.shape for name, weight in weights(form_of(config), config).items()}
        model = GPT(config, DenseLayers(seed=0))
        assert found == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_any_part_of_a_weight_is_read(form: str, folders: dict[str, Path]) -> None:
    reader = open_hf(folders[form])
    for name, parameter in loaded(reader).named_parameters():
        shape = tuple(parameter.shape)
        for dim, size in enumerate(shape):
            for start, stop in [(0, size // 2), (size // 2, size), (3, 8), (size, size)]:
                part = Slice(shape, dim, start, stop)
                assert torch.equal(reader.read_slice(name, "master", part), part.take(parameter)), (name, part)


def as_checkpoint(folder: Path, root: Path) -> CheckpointReader:
    with ranks_in_threads(1):
        return open_checkpoint(write_checkpoint(root, 0, open_hf(folder).pieces(), state_of(0), keep_last=1))


def exported(source: CheckpointReader, config: ModelConfig, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    write_hf(source, config, folder, end=0, **options)
    return folder


def same_files(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_read_is_written_back(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = open_hf(folders[form]).config
    source = as_checkpoint(folders[form], tmp_path)
    whole = exported(source, config, tmp_path / "whole")
    assert same_files(whole, folders[form])
    assert open_hf(whole).config == replace(config, d_ff=config.ff_dim)
    sharded = exported(source, config, tmp_path / "sharded", shard_bytes=40_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 1
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, sharded))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(loaded(open_hf(sharded)), tokens(3)), logits(loaded(open_hf(whole)), tokens(3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = as_checkpoint(folders["llama"], tmp_path)
    reader = open_hf(exported(source, open_hf(folders["llama"]).config, tmp_path / "rounded", dtype=dtype))
    for name in ("embedding.weight", "blocks.1.qkv.weight", "blocks.0.up.weight"):
        expected = source.read(name).to(convert.DTYPES[dtype]).float()
        assert torch.equal(reader.read_slice(name, "master", Slice.full(source.shape(name))), expected)


def test_a_weight_that_a_dtype_cannot_hold_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["llama"], tmp_path / "large", {"lm_head.weight": torch.full((301, 32), 1e5)})
    source = as_checkpoint(folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"head\.weight has values up to .*float16"):
        exported(source, open_hf(folder).config, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_refused(value: float, folders: dict[str, Path], tmp_path: Path) -> None:
    """Both ways: a comparison of logits need not meet it."""
    rows = torch.zeros(301, 32)
    rows[300, 31] = value
    reader = open_hf(changed(folders["llama"], tmp_path / "folder", {"lm_head.weight": rows}))
    with pytest.raises(CheckpointError, match=r"head\.weight has values that are not finite"):
        reader.read_slice("head.weight", "master", Slice.full((301, 32)))
    with pytest.raises(InputError, match="values that are not finite"):
        convert._whole(cast(CheckpointReader, SimpleNamespace(read=lambda name: rows)), "head.weight", torch.bfloat16)


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form.model_type)
def test_what_a_config_leaves_out_is_as_transformers_takes_it(form: Form) -> None:
    theirs = {"gpt2": GPT2Config, "llama": LlamaConfig, "mistral": MistralConfig}[form.model_type]()
    needed = {names: getattr(theirs, names) for names, *default in form.fields.values() if not default}
    _, config = read_config({"model_type": form.model_type, **needed})
    for ours, (names, *_) in form.fields.items():
        for name in names.split():
            assert getattr(config, "kv_heads" if ours == "n_kv_head" else ours) == getattr(theirs, name, False), name
    if form is not GPT2:
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.attention_window == getattr(theirs, "sliding_window", None)


def changed(folder: Path, target: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the folder with some tensors replaced, added, or with None left out."""
    shutil.copytree(folder, target)
    stored = {**load_file(target / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_names_without_the_prefix_and_constants_of_old_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the files of the original GPT-2 have them."""
    stored = load_file(folders["gpt2"] / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    constants = {"h.0.attn.bias": torch.ones(1, 1, T, T), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    copies = {"lm_head.weight": bare["wte.weight"].clone()}
    folder = changed(folders["gpt2"], tmp_path / "bare", {**dict.fromkeys(stored), **bare, **constants, **copies})
    assert torch.equal(logits(loaded(open_hf(folder)), tokens(3)), logits(loaded(open_hf(folders["gpt2"])), tokens(3)))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        open_hf(changed(folder, tmp_path / "other", {"lm_head.weight": bare["wte.weight"] + 1}))


def test_the_weights_of_a_checkpoint_are_one_plain_file(folders: dict[str, Path], tmp_path: Path) -> None:
    source = as_checkpoint(folders["gpt2"], tmp_path)
    write_plain(source, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {name for name, _ in source.manifest.tensors}
    assert all(torch.equal(found[name], source.read(name)) for name in found)


@pytest.fixture
def few_objects() -> Iterator[None]:
    """What is there before the test is not looked at again: there are some 400,000 objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Of the storages of all tensors that the collector knows."""
    found = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_one_tensor_at_a_time_is_in_memory(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_objects: None
) -> None:
    sizes = {
        "vocab_size": 301,
        **({"n_embd": 128} if form == "gpt2" else {"hidden_size": 128, "intermediate_size": 512}),
    }
    folder = save(make(form, **sizes), tmp_path / "folder")
    monkeypatch.setattr(convert, "BLOCK", 8192)
    source = as_checkpoint(folder, tmp_path)
    largest = max(entry.shape[0] * 128 * 4 for entry in source.manifest.tensors.values() if len(entry.shape) == 2)
    peak = [0]

    def sampled(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            peak[0] = max(peak[0], live_bytes())
            return result

        return wrapper

    for owner, name in [(torch, "empty"), (CheckpointReader, "_flat"), (files, "write_all"), (convert, "_whole")]:
        monkeypatch.setattr(owner, name, sampled(getattr(owner, name)))
    exported(source, open_hf(folder).config, tmp_path / "out")
    print(f"{peak[0] / largest:.3f} of the largest tensor")
    assert largest <= peak[0] <= 2.1 * largest  # with the numbers of its rows
    peak[0] = 0
    monkeypatch.setattr("llm.checkpoint.writer.SHARD_BYTES", 32768)
    as_checkpoint(folder, tmp_path / "in")
    assert 0 < peak[0] <= largest
