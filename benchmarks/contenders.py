"""What `benchmarks.step` and the proof on a GPU compare: training steps of the same model by Ingot and by others.

Each is made by a function that returns a step: a call queues one, on random tokens, and returns its loss on the device.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.plain_gpt import PlainGPT, Shape, trainer
from llm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from llm.parallel.mesh import Mesh
from llm.parity.batches import micro_batches, target_count
from llm.train.build import build_engine

Step = Callable[[], Tensor]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(n_layer=4, n_head=4, d_model=128, vocab_size=1024, max_seq_len=128),
    "124M": dict(n_layer=12, n_head=12, d_model=768, vocab_size=50304, max_seq_len=1024),
    "350M": dict(n_layer=24, n_head=16, d_model=1024, vocab_size=50304, max_seq_len=1024),
}
LLAMA = dict(position="rope", activation="swiglu", norm="rmsnorm", bias=False)
FORMS: dict[str, dict[str, Any]] = {"Llama": LLAMA, "GPT-2": {}}
# Ingot's layouts by name: engine, ZeRO stage, tensor-parallel degree. Those of two ranks come last.
LAYOUTS: dict[str, tuple[str, int, int]] = {
    "Ingot, plain": ("plain", 0, 1),
    **{f"Ingot, DeepSpeed ZeRO {stage}": ("deepspeed", stage, 1) for stage in range(4)},
    "Ingot, FSDP": ("fsdp", 3, 1),
    "Ingot, plain, compiled": ("plain", 0, 1),
    "Ingot, DeepSpeed ZeRO 1, compiled": ("deepspeed", 1, 1),
    "Ingot, FSDP, compiled": ("fsdp", 3, 1),
}
TWO_RANKS: dict[str, tuple[str, int, int]] = {
    "Ingot, DeepSpeed ZeRO 0, 2 ranks": ("deepspeed", 0, 1),
    "Ingot, DeepSpeed ZeRO 1, 2 ranks": ("deepspeed", 1, 1),
    "Ingot, DeepSpeed ZeRO 1, TP 2": ("deepspeed", 1, 2),
    "Ingot, DeepSpeed ZeRO 1, TP 2, compiled": ("deepspeed", 1, 2),
}
PLAIN, COMPILED, TRANSFORMERS, LIGER = "plain PyTorch", "plain PyTorch, compiled", "transformers", "transformers, Liger"


def is_compiled(name: str) -> bool:
    return name.endswith(", compiled")


def config_of(size: str, form: str, batch: int, precision: Literal["fp32", "bf16"]) -> RunConfig:
    """Of a model and a batch, as the plain engine has it."""
    model = ModelConfig(**SIZES[size] | FORMS[form])
    train = TrainConfig(engine="plain", global_batch_size=batch, micro_batch_size=batch, precision=precision)
    return RunConfig(model=model, data=DataConfig(seq_len=model.max_seq_len), train=train)


def layout(config: RunConfig, name: str, ranks: int) -> RunConfig:
    """The config of an Ingot contender: a rank's share of the global batch is one micro-batch."""
    engine, stage, tp = (LAYOUTS | TWO_RANKS)[name]
    compile = "blocks" if is_compiled(name) else "none"
    micro_batch_size = config.train.global_batch_size * tp // ranks
    train = replace(config.train, engine=engine, micro_batch_size=micro_batch_size, compile=compile)
    parallel = replace(config.parallel, zero_stage=stage, tensor_parallel=tp)
    # By default DeepSpeed allocates a bucket for reductions of 500 million elements, however small the model.
    section = {"zero_optimization": {"reduce_bucket_size": 10_000_000}} if engine == "deepspeed" and stage else {}
    return replace(config, train=train, parallel=parallel, deepspeed=section)


def ingot(config: RunConfig, device: torch.device) -> Step:
    """Steps of a layout; the default process group is there. Collective."""
    mesh = Mesh.create(config.parallel, device.type)
    engine = build_engine(config, mesh, device)
    ranks: dict[str, Any] = dict(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, ragged=False)
    batches, count = micro_batches(config, 0, device, **ranks), target_count(config, ragged=False)

    def step() -> Tensor:
        engine.set_lr(1e-3)
        loss = engine.forward_backward(batches, count)
        engine.step()
        return loss

    return step


def shape_of(model: ModelConfig) -> Shape:
    sizes = model.n_layer, model.n_head, model.d_model, model.ff_dim, model.vocab_size, model.max_seq_len
    return Shape(*sizes, llama=model.position == "rope")


def tokens_of(config: RunConfig, device: torch.device) -> Tensor:
    """int64 [G, T + 1], uniform over the vocabulary."""
    size = config.train.global_batch_size, config.data.seq_len + 1
    return torch.randint(config.model.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)


def plain(config: RunConfig, device: torch.device, *, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    model = PlainGPT(shape_of(config.model)).to(device)
    nn.init.normal_(model.embedding.weight, std=0.02)
    if compiled:
        model.compile()
    return partial(trainer(model, model, config.train.precision), tokens_of(config, device))


def transformers(config: RunConfig, device: torch.device, *, liger: bool = False) -> Step:
    """Its GPT-2 or Llama with SDPA and its own loss, over T - 1 targets; liger: with all kernels of Liger."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape = shape_of(config.model)
    sizes: dict[str, Any] = dict(vocab_size=shape.vocabulary, use_cache=False, attn_implementation="sdpa")
    sizes |= dict(bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)
    if liger:  # which changes the model's functions in this process
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    if shape.llama:
        sizes |= dict(hidden_size=shape.width, intermediate_size=shape.feed_forward, num_hidden_layers=shape.layers)
        sizes |= dict(num_attention_heads=shape.heads, max_position_embeddings=shape.length)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        sizes |= dict(n_embd=shape.width, n_inner=shape.feed_forward, n_layer=shape.layers, n_head=shape.heads)
        dropout: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(n_positions=shape.length, **sizes, **dropout))
    model = model.to(device).train()  # pyright: ignore[reportArgumentType]
    ids = tokens_of(config, device)[:, :-1].contiguous()
    loss_of: Callable[[Tensor], Tensor] = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
    return partial(trainer(model, loss_of, config.train.precision), ids)


def absent(name: str, config: RunConfig, device: torch.device, ranks: int) -> str | None:
    """Why a contender is left out, or None."""
    if name in (TRANSFORMERS, LIGER) and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'ingot[hf]')"
    if name == LIGER and (device.type == "cpu" or importlib.util.find_spec("liger_kernel") is None):
        return "Liger's kernels run on a GPU alone" if device.type == "cpu" else "liger-kernel is not installed"
    if name == LIGER and config.model.position != "rope":
        return "measured with Llama"
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        return f"it needs {ranks} GPUs"
    if config.train.precision == "bf16" and name.startswith("Ingot, DeepSpeed ZeRO 0"):
        return "DeepSpeed would accumulate gradients in bf16"
    return None


def make(name: str, config: RunConfig, device: torch.device, ranks: int = 1) -> Step:
    """The contender of this name; config: of the model, the global batch and the precision. Collective."""
    if name in LAYOUTS or name in TWO_RANKS:
        return ingot(layout(config, name, ranks), device)
    kinds: dict[str, Callable[..., Step]] = {
        PLAIN: plain,
        COMPILED: partial(plain, compiled=True),
        TRANSFORMERS: transformers,
        LIGER: partial(transformers, liger=True),
    }
    return kinds[name](config, device)
