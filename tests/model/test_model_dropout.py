"""Every dropout of the model draws a mask of its own: no two share a key, in whatever layers the factory gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.philox import DropoutKey, keep_mask
from llm.config import ModelConfig
from llm.model import layers
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers
from llm.parallel.layers import TensorParallel, TensorParallelLayers

L, T, C, P, SEED = 3, 16, 32, 0.3, 11
FACTORIES: dict[str, type[DenseLayers]] = {
    "dense": DenseLayers,
    "tp-rank-0": lambda **fields: TensorParallelLayers(TensorParallel(0, 2, "none"), **fields),
    "tp-rank-1": lambda **fields: TensorParallelLayers(TensorParallel(1, 2, "none"), **fields),
    "tp-sp": lambda **fields: TensorParallelLayers(TensorParallel(1, 2, "none", sequence_parallel=True), **fields),
}  # pyright: ignore[reportAssignmentType]


def build(factory: str, norm: str = "layernorm", seed: int = SEED) -> GPT:
    config = ModelConfig(n_layer=L, n_head=4, d_model=C, vocab_size=50, max_seq_len=T, dropout=P, norm=norm)  # pyright: ignore
    return GPT(config, FACTORIES[factory](seed=seed))


def keys_by_place(model: GPT) -> dict[str, DropoutKey]:
    """The key of each module that drops, by the module's name."""
    keys: dict[str, DropoutKey] = {}
    for name, module in model.named_modules():
        if isinstance(key := getattr(module, "key", None), DropoutKey):
            keys[name] = key
    return keys


PLACES = ["embedding_dropout"] + [
    f"blocks.{i}.{name}" for i in range(L) for name in ("attention", "norm_2.dropout", "down_dropout")
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_place_has_a_key_of_its_own(factory: str) -> None:
    keys = keys_by_place(build(factory))
    assert sorted(keys) == sorted(PLACES)
    assert {(key.p, key.seed) for key in keys.values()} == {(P, SEED)}
    assert len({key.site for key in keys.values()}) == 1 + 3 * L, keys
    assert keys == keys_by_place(build("dense")), "a layout draws other masks"


def test_a_part_of_the_model_has_the_keys_of_the_whole() -> None:
    config = ModelConfig(n_layer=L, n_head=4, d_model=C, vocab_size=50, max_seq_len=T, dropout=P)
    part = keys_by_place(GPT(config, DenseLayers(seed=SEED), blocks=range(1, 2)))
    whole = keys_by_place(build("dense"))
    assert part == {name: key for name, key in whole.items() if "blocks" not in name or "blocks.1." in name}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_training_pass_applies_each_key_once(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that reach the kernels, and the masks that they stand for."""
    used: list[DropoutKey] = []

    def spy(name: str) -> None:
        honest = getattr(layers, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            used.append(arguments[1] if name == "dropout" else options["dropout"])
            return honest(*arguments, **options)

        monkeypatch.setattr(layers, name, recorded)

    for name in ("dropout", "attention_packed", "add_layer_norm", "add_rms_norm"):
        spy(name)
    model, samples = build("dense", norm), torch.arange(2)
    tokens = torch.zeros(2, T, dtype=torch.long)
    model(tokens, torch.arange(T), samples)
    assert sorted(key.site for key in used) == sorted(key.site for key in keys_by_place(model).values())
    masks: list[Tensor] = [keep_mask(key, samples, torch.arange(T), C) for key in used]
    same = [(a == b).float().mean() for i, a in enumerate(masks) for b in masks[:i]]
    # Two independent masks agree on p^2 + (1 - p)^2 of the elements, 0.58: 1024 of them stray by 0.1 at 6 sigma.
    assert max(same) < 0.7
    used.clear()
    model.eval()(tokens, torch.arange(T), samples)
    assert used == [None] * L * 2  # attention and the norm, in each block
