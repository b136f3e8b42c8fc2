"""Finds requests that cannot run although their config is right, before anything is allocated."""

from __future__ import annotations

import torch

from kernels.attention.gluon import why_not_gluon
from kernels.attention.op import limits as attention_limits
from kernels.dispatch import IMPLS, KernelError, choose
from kernels.norm.op import no_triton as norm_limit
from llm.config import RunConfig
from llm.config.phases import consumed_samples
from llm.data.corpora import Corpora
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError, require
from llm.model.forms import Forms
from llm.model.fp8 import E4M3, E5M2, largest, product, quantise
from llm.plan.budget import far_off
from llm.train.engines.base import DTYPES

# Text read so often teaches nearly as much as new text would, and beyond it ever less (Muennighoff et al. 2023,
# Scaling Data-Constrained Language Models).
EPOCHS = 4


def check_kernels(config: RunConfig, device: torch.device, forms: Forms | None = None) -> str:
    """Say which of `forms` (None: train.impl) each kernel will take; InputError if one cannot run there, or FP8."""
    if config.train.fp8 != "none" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        require(
            found >= (8, 9),
            f"train.fp8 {config.train.fp8} needs a GPU of compute capability 8.9 or more, which multiplies FP8 (Ada, "
            f"Hopper, Blackwell); {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use train.fp8=none",
        )
        try_fp8(config, device)
    forms, model, dtype = forms or Forms.of(config.train.impl), config.model, DTYPES[config.train.precision]
    sparse = any(model.layer_sparse(layer) for layer in range(model.n_layer))
    no_triton, no_torch = attention_limits(model.head_dim, model.dropout, sparse, model.attention_softcap)
    no_gluon = why_not_gluon(device, dtype, model.head_dim, model.dropout, sparse, model.attention_softcap)
    norm = "layer_norm" if model.norm == "layernorm" else "rms_norm"
    limits = {
        "attention": {"no_triton": no_triton, "no_torch": no_torch, "no_gluon": no_gluon},
        norm: {"no_triton": norm_limit(model.d_model)},
    }
    rope, dropout = model.position == "rope", model.dropout > 0
    asked = {"attention": forms.attention, "embedding": forms.embedding} | ({"rope": forms.rope} if rope else {})
    asked |= {norm: forms.norm} | ({"dropout": forms.dropout} if dropout else {})
    asked |= {model.activation: forms.activation, "cross_entropy": forms.loss}
    if model.family == "lstm":  # its layers are PyTorch's own
        asked = {op: form for op, form in asked.items() if op in ("embedding", "dropout", "cross_entropy")}
    chosen: dict[str, list[str]] = {}
    try:
        for op, form in asked.items():
            taken = choose(form, op, device=device, dtype=dtype, **limits.get(op, {})) if form in IMPLS else form
            chosen.setdefault(taken, []).append(op)
    except KernelError as error:
        raise InputError(f"train.impl: {error}") from error
    return "; ".join(f"{form}: {', '.join(ops)}" for form, ops in chosen.items())


def try_fp8(config: RunConfig, device: torch.device) -> None:
    """Multiply two small matrices as train.fp8 does: some GPUs have scales for rows only with newer libraries."""
    x, dims = torch.ones(16, 16, device=device), (1,) if config.train.fp8 == "rowwise" else ()
    for form in (E4M3, E5M2):
        a, b = (quantise(x, each, largest(x, dims)) for each in (form, E4M3))
        try:
            product(a, b, DTYPES[config.train.precision])
        except RuntimeError as error:
            found = f"PyTorch {torch.__version__} does not multiply {form} by {E4M3} on {device}: {error}"
            raise InputError(f"train.fp8 {config.train.fp8}: {found}; use another train.fp8, or none") from error


def check_tokenizer(corpora: Corpora) -> str:
    """Say what tokens there are; InputError unless the closing sample can be drawn and ends as the documents do."""
    config, manifest = corpora.config, corpora.manifest
    tokenizer = Tokenizer.load(corpora.folder / "tokenizer.json", config.data.end_token)
    require(
        tokenizer.eod_id == manifest.eod_id,
        f"documents in {corpora.folder} end with token {manifest.eod_id}, data.end_token is {config.data.end_token}: "
        f"{tokenizer.end_token} ({tokenizer.eod_id}); set --data.end_token={manifest.eod_id}",
    )
    longest, size = config.model.max_seq_len, config.model.vocab_size
    prompt = tokenizer.encode(config.logging.sample_prompt) if config.logging.sample_tokens > 0 else []
    expected = f"fewer than model.max_seq_len ({longest}), or logging.sample_tokens=0"
    require(len(prompt) < longest, f"logging.sample_prompt has {len(prompt)} tokens; expected {expected}")
    padded = f", padded to {size} (model.vocab_size)" if size > tokenizer.vocab_size else ""
    return f"{tokenizer.vocab_size} tokens{padded}; {tokenizer.end_token} ends a document"


def remarks(corpora: Corpora) -> list[str]:
    """What a start says of its tokens: `repetitions`, and whether they are far from compute-optimal (`far_off`)."""
    far = far_off(corpora.config)
    return [*(f"warning: {warning}" for warning in repetitions(corpora)), *([far] if far else [])]


def repetitions(corpora: Corpora) -> list[str]:
    """A warning for each corpus that the whole run reads more than EPOCHS times."""
    config = corpora.config
    epochs = corpora.curriculum().epochs(consumed_samples(config.phases, config.train.max_steps))
    return [
        f"the run reads {name} {times:,.0f} times ({corpora.training[name].shards.n_tokens:,} tokens); beyond about "
        f"{EPOCHS} times repeated text teaches ever less: give it more text, or fewer train.max_steps"
        for name, times in epochs.items()
        if times > EPOCHS
    ]
