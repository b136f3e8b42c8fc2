"""Initial weights that depend only on the seed: not on ranks, shards or the order of creation."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.slices import Slice, slice_of


def initial_tensor(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole initial value of a parameter, fp32 on the CPU whatever the defaults are, keyed by (seed, name).

    As GPT-2's: normal with `init_std`, which is divided by sqrt(2 n_layer) for the linears that end a residual branch
    (Radford et al. 2019, 2.3). LoRA's are its own (llm/model/lora.py). Of an LSTM the biases of the forget gates are 1
    (Jozefowicz et al. 2015).
    """
    if name.endswith(("bias", "lora_b")):
        bias = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if config.family == "lstm":
            bias[config.d_model : 2 * config.d_model] = 1
        return bias
    if "norm" in name:
        return torch.ones(shape, dtype=torch.float32, device="cpu")
    ends_branch = name.endswith(("attention_output.weight", "down.weight"))
    std = config.init_std / math.sqrt(2 * config.n_layer) if ends_branch else config.init_std
    if name.endswith("lora_a"):
        std = 1 / math.sqrt(shape[1])
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


class InitialWeights:
    """The initial weights as an engine reads them: like a checkpoint of step 0 (fp32, on the CPU)."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """`part` of parameter `name`; `kind` is "master": there are no moments yet."""
        assert kind == "master", f"a run that has not begun has no {kind}"
        return part.take(initial_tensor(self.config, self.seed, name, part.global_shape))


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter with its slice of the initial tensor; padding rows become zero.

    Nothing is drawn for one on the meta device, which has no memory.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            fill(parameter, initial_tensor(config, seed, name, slice_of(parameter).global_shape))


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's slice of the global tensor `whole` into `parameter`; padding rows become zero."""
    held = slice_of(parameter)
    parameter.zero_()
    parameter.narrow(held.dim, 0, held.stop - held.start).copy_(held.take(whole))


@torch.no_grad()
def give_memory(parameter: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Give a parameter on the meta device its memory, filled with zeros.

    It stays the same object, so that ties, and marks such as its slice, hold: `Module.to_empty` keeps neither.
    """
    real = nn.Parameter(torch.zeros_like(parameter, dtype=dtype, device=device), parameter.requires_grad)
    vars(real).update(vars(parameter))
    torch.utils.swap_tensors(parameter, real)
