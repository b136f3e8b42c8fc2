"""Small models of `transformers` with random weights, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_step import T, V
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llm.checkpoint.convert import HuggingFaceReader
from llm.data.tokenizer import Tokenizer
from llm.model.gpt import GPT
from llm.model.init import fill
from llm.model.layers import DenseLayers
from llm.slices import Slice, slice_of

TEXTS = ["def f(x):\n    return x\n", "import os\nprint(os.name)\n", "class A:\n    pass  # 1234567890\n"]
SIZES = dict(vocab_size=V, eos_token_id=0, bos_token_id=None, initializer_range=0.1)
GPT2 = dict(
    **SIZES, n_positions=T, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
LLAMA = dict(
    **SIZES, max_position_embeddings=T, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip
MAKERS = {
    "gpt2": lambda **changes: GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes})),
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})),
    "mistral": lambda **changes: MistralForCausalLM(MistralConfig(**{**LLAMA, "sliding_window": 7, **changes})),
}


def make(form: str, **changes: Any) -> Any:
    """A model of `transformers` in which every parameter is random, norms and biases too."""
    torch.manual_seed(1)
    model = MAKERS[form](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """The model's folder, with a tokenizer."""
    model.save_pretrained(folder, **options)
    Tokenizer.train(TEXTS * 20, 270).save(folder / "tokenizer.json")
    return folder


def loaded(reader: HuggingFaceReader) -> GPT:
    """Ingot's model with the reader's weights."""
    model = GPT(reader.config, DenseLayers(seed=0))
    for name, parameter in model.named_parameters():
        fill(parameter, reader.read_slice(name, "master", Slice.full(slice_of(parameter).global_shape)))
    return model


def logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, torch.arange(ids.shape[1]), torch.arange(len(ids)))
