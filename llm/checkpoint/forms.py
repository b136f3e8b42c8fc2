"""How a Hugging Face folder says what ours say: the fields of its config.json, the names and the order of its weights.

There are three forms: GPT-2's (learned positions, layer norm, GELU), Llama's (rotary positions, RMS norm, SwiGLU), and
Mistral's, which is Llama's with a window. What changes the mathematics and is not in both is refused, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from llm.config import ModelConfig
from llm.errors import InputError, require
from llm.typed import dotted_keys, read, shown


@dataclass(frozen=True)
class Form:
    """What the folders of one `model_type` have in common."""

    model_type: str
    architecture: str
    model: dict[str, Any]
    """Fields of ModelConfig, with the values that this form stands for."""
    fields: dict[str, str]
    """Other fields of ModelConfig by name, and what config.json calls them."""
    defaults: dict[str, Any]
    """What `transformers` takes where config.json leaves out one of these."""
    fixed: dict[str, tuple[Any, ...]]
    """Further fields, with the values under which the mathematics is Ingot's; the first is written."""
    names: dict[str, str]
    """Modules by Ingot's names; several where one of Ingot's weights holds the rows of several."""
    blocks: str
    """Before a block's number."""
    transposed: bool = False
    """Whether a linear's weight is [in, out] (GPT-2's Conv1D)."""


GPT2 = Form(
    "gpt2",
    "GPT2LMHeadModel",
    model={"position": "learned", "norm": "layernorm", "activation": "gelu"},
    fields={
        "vocab_size": "vocab_size", "max_seq_len": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
        "d_model": "n_embd", "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range",
    },
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    names={
        "embedding": "transformer.wte", "position_table": "transformer.wpe", "norm": "transformer.ln_f",
        "head": "lm_head", "norm_1": "ln_1", "qkv": "attn.c_attn", "attention_output": "attn.c_proj",
        "norm_2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj",
    },
    blocks="transformer.h.",
    transposed=True,
)  # fmt: skip
LLAMA = Form(
    "llama",
    "LlamaForCausalLM",
    model={"position": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    fields={
        "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "d_model": "hidden_size",
        "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    defaults={
        "num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    fixed={"hidden_act": ("silu", "swish"), "attention_dropout": (0.0, None), "sliding_window": (None,)},
    names={
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "norm_1": "input_layernorm",
        "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attention_output": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm", "up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj",
    },
    blocks="model.layers.",
)  # fmt: skip
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    # Not num_key_value_heads: `transformers` takes 8.
    defaults={name: LLAMA.defaults[name] for name in ("rms_norm_eps", "tie_word_embeddings", "initializer_range")},
    fixed={name: LLAMA.fixed[name] for name in ("hidden_act", "attention_dropout")},
)
FORMS = (GPT2, LLAMA, MISTRAL)
# Fields of any form that would change the mathematics; those that `transformers` does not read are of models made from
# one of the three. A field that is not named here says nothing about it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,), "auto_map": (None,), "clip_qkv": (None,), "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,), "is_encoder_decoder": (False, None), "logit_scale": (None, 1),
    "no_rope_layers": (None, []), "num_experts": (None, 0, 1), "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1), "per_layer_config": (None, {}), "quantization_config": (None,),
    "residual_multiplier": (None, 1), "use_qk_norm": (None, False),
}  # fmt: skip
ROPE = {"rope_type": ("default", None), "type": ("default", None), "partial_rotary_factor": (None, 1)}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def form_of(config: ModelConfig) -> Form:
    """The form that a model is exported in; raises InputError, with the reason, where there is none."""
    form = next((form for form in FORMS if all(getattr(config, n) == v for n, v in form.model.items())), None)
    windows, layers = _windows(config), range(config.n_layer)
    found = ", ".join(f"{name} {getattr(config, name)}" for name in GPT2.model)
    reasons = {
        f"{found} (GPT-2's form has {', '.join(GPT2.model.values())}; Llama's {', '.join(LLAMA.model.values())})": (
            form is None
        ),
        "attention_sparse": any(config.layer_sparse(layer) for layer in layers),
        "attention_softcap": config.attention_softcap > 0,
        "an attention_window that differs between layers": len(windows) > 1,
        "n_kv_head below n_head, in GPT-2's": form is GPT2 and config.kv_heads < config.n_head,
        "attention_window, in GPT-2's": form is GPT2 and windows != {None},
        "bias, in Mistral's, which attention_window needs": form is LLAMA and windows != {None} and config.bias,
    }
    for reason, given in reasons.items():
        require(not given, f"no form of Hugging Face's has model.{reason}; export the weights as they are (--plain)")
    assert form is not None
    return MISTRAL if windows != {None} else form


def _windows(config: ModelConfig) -> set[int | None]:
    return {config.layer_window(layer) for layer in range(config.n_layer)}


def read_config(found: dict[str, Any]) -> tuple[Form, ModelConfig]:
    """The form and the model of a config.json; raises InputError where Ingot would compute something else."""
    known = ", ".join(form.model_type for form in FORMS)
    kind = found.get("model_type")
    form = next((form for form in FORMS if form.model_type == kind), None)
    if form is None:
        raise InputError(f"model_type is {shown(kind)}; expected one of {known}")
    for name, allowed in {**NEUTRAL, **form.fixed}.items():
        value = found.get(name, allowed[0])
        require(value in allowed, f"{name} is {shown(value)}; Ingot has no other than {shown(allowed[0])}")
    values, kinds = dict(form.model), dotted_keys(ModelConfig)
    for ours, theirs in form.fields.items():
        value = form.defaults.get(theirs) if found.get(theirs) is None else found[theirs]
        require(value is not None or theirs in form.defaults, f"{theirs} is missing")
        values[ours] = read(kinds[ours], value, theirs)
    if form is GPT2:
        dropouts = {name: read(float, found.get(name, 0.1), name) for name in DROPOUTS}
        require(len(set(dropouts.values())) == 1, f"{dropouts}: Ingot has one dropout for the three")
        return form, ModelConfig(**values, dropout=dropouts["attn_pdrop"])
    biases = {name: read(bool, found.get(name, False), name) for name in ("attention_bias", "mlp_bias")}
    require(len(set(biases.values())) == 1, f"{biases}: Ingot has biases in every linear or in none")
    if form is MISTRAL:
        values["attention_window"] = read(int | None, found.get("sliding_window", 4096), "sliding_window")
    types, kind = found.get("layer_types") or [], "sliding" if values.get("attention_window") else "full"
    same = isinstance(types, list) and {*map(str, types)} <= {f"{kind}_attention"}
    require(same, f"layer_types is {shown(types)}; Ingot has the window of sliding_window in every layer or in none")
    config = ModelConfig(**values, rope_theta=_rope_theta(found), bias=biases["mlp_bias"])
    width = found.get("head_dim")
    require(width in (None, config.head_dim), f"head_dim is {shown(width)}; Ingot's is hidden_size / heads")
    return form, config


def write_config(config: ModelConfig, *, end: int, dtype: str) -> dict[str, Any]:
    """The config.json that `transformers` 4 and 5 read as this model; end: the id that ends a document."""
    form = form_of(config)
    values = {"d_ff": config.ff_dim, "n_kv_head": config.kv_heads}
    found: dict[str, Any] = {"model_type": form.model_type, "architectures": [form.architecture]}
    found |= {theirs: values.get(ours, getattr(config, ours)) for ours, theirs in form.fields.items()}
    found |= {name: allowed[0] for name, allowed in form.fixed.items() if allowed[0] is not None}
    if form is GPT2:
        found |= dict.fromkeys(DROPOUTS, config.dropout)
    else:
        found |= {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        found |= dict.fromkeys(("attention_bias", "mlp_bias"), config.bias)
        found |= {"sliding_window": config.layer_window(0)} if form is MISTRAL else {}
    return found | {"bos_token_id": None, "eos_token_id": end, "torch_dtype": dtype}


def _rope_theta(found: dict[str, Any]) -> float:
    """The base of the rotary frequencies, wherever a version of `transformers` wrote it."""
    stated = [found.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        section = found.get(name) or {}
        require(isinstance(section, dict), f"{name} is {shown(section)}; expected an object")
        for key, value in section.items():
            plain = key == "rope_theta" or value in ROPE.get(key, ())
            require(plain, f"{name}.{key} is {shown(value)}; Ingot has rotary positions of type default alone")
        stated.append(section.get("rope_theta"))
    bases = {read(float, base, "rope_theta") for base in stated if base is not None}
    require(len(bases) <= 1, f"rope_theta is given as {', '.join(map(str, sorted(bases)))}")
    return bases.pop() if bases else 10000.0


class Part(NamedTuple):
    """The same rows of each group of rows of one of Ingot's weights, as they lie in a tensor of the folder."""

    tensor: str
    rows: int
    """Of each group."""
    offset: int
    """In the group."""
    start: int
    """In the folder's tensor, where those of the first group lie; the others follow."""

    def of(self, whole: Tensor, group: int) -> Tensor:
        """A view [groups, rows, ...] of these rows in one of Ingot's weights, whose groups have `group` rows."""
        return whole.unflatten(0, (len(whole) // group, group))[:, self.offset : self.offset + self.rows]


@dataclass(frozen=True)
class Weight:
    """One of Ingot's weights: its rows come in equal groups, whose parts lie in tensors of the folder.

    A group of qkv is a key/value head with its queries, [q_1 ... q_R, k, v]; of `up` with SwiGLU a gate and an up row;
    of anything else one row.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool

    @property
    def group(self) -> int:
        """Rows of a group."""
        return sum(part.rows for part in self.parts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the folder's tensors."""
        rows: dict[str, int] = {}
        for part in self.parts:
            rows[part.tensor] = rows.get(part.tensor, 0) + self.shape[0] // self.group * part.rows
        step = -1 if self.transposed else 1
        return {name: (count, *self.shape[1:])[::step] for name, count in rows.items()}


def weights(form: Form, config: ModelConfig) -> dict[str, Weight]:
    """Where each of the model's parameters, by name, lies in a folder of the form."""
    C, D, K, F, V = config.d_model, config.head_dim, config.kv_heads, config.ff_dim, config.vocab_size
    R, halves = config.n_head // K, (1, 1) if config.activation == "swiglu" else (1,)
    # Rows, columns (none: a vector), and the rows that each part has of a group.
    outer = {"embedding": (V, C, (1,)), "norm": (C, None, (1,))}
    if config.position == "learned":
        outer["position_table"] = (config.max_seq_len, C, (1,))
    if not config.tie_embeddings:
        outer["head"] = (V, C, (1,))
    linears = {
        "qkv": ((R + 2) * K * D, C, (R * D, D, D)), "attention_output": (C, R * K * D, (1,)),
        "up": (len(halves) * F, C, halves), "down": (C, F, (1,)),
    }  # fmt: skip
    block = {"norm_1": outer["norm"], "norm_2": outer["norm"], **linears}
    blocks = [(f"blocks.{i}.", f"{form.blocks}{i}.", block) for i in range(config.n_layer)]
    found = {}
    for ours, theirs, modules in [("", "", outer), *blocks]:
        for name, (rows, columns, sizes) in modules.items():
            shapes = {"weight": (rows,) if columns is None else (rows, columns)}
            if config.bias and (name in linears or (columns is None and config.norm == "layernorm")):
                shapes["bias"] = (rows,)
            for kind, shape in shapes.items():
                tensors = [f"{theirs}{module}.{kind}" for module in form.names[name].split()]
                transposed = form.transposed and name in linears
                found[f"{ours}{name}.{kind}"] = Weight(shape, _parts(tensors, sizes, rows), transposed)
    return found


def _parts(tensors: list[str], sizes: tuple[int, ...], rows: int) -> tuple[Part, ...]:
    """One part per tensor, or in one tensor all of them, one after the other."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    if len(tensors) == len(sizes):
        return tuple(Part(tensor, size, at, 0) for tensor, size, at in zip(tensors, sizes, offsets, strict=True))
    return tuple(Part(tensors[0], size, at, rows // sum(sizes) * at) for size, at in zip(sizes, offsets, strict=True))
