"""The sections of a run's config. Each checks its own fields; checks.py checks sections against one another."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from llm.errors import require

# Fields of the model that an LSTM has.
LSTM_FIELDS = (
    "family", "n_layer", "d_model", "vocab_size", "max_seq_len", "tie_embeddings", "bias", "init_std", "dropout",
)  # fmt: skip


def check_at_least(low: int, key: str, section: object, *names: str) -> None:
    """Refuse fields below `low`; null passes. `key` is the section's in the config, with its dot."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= low, f"{key}{name} is {value}; expected at least {low}")


@dataclass(frozen=True)
class SparseAttention:
    """The strided pattern of Sparse Transformers (Child et al. 2019, section 4.3), in blocks of positions.

    A query in block i sees the keys up to its own in block j if i - j < local or (i - j) % stride == 0.
    """

    block: int
    """Positions in a block: a multiple of 64."""
    local: int
    """Blocks that are seen up to the query's own, that one included."""
    stride: int
    """Of the blocks farther back every `stride`-th is seen."""

    def __post_init__(self) -> None:
        require(self.block > 0 and self.block % 64 == 0, f"block is {self.block}; expected a positive multiple of 64")
        check_at_least(1, "", self, "local", "stride")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: all that must agree between a checkpoint and the run that reads it."""

    family: Literal["gpt", "lstm"] = "gpt"
    """A transformer, or the recurrent network before it, which has only the fields of LSTM_FIELDS (docs/lstm.md)."""
    n_layer: int = 4
    """Number of transformer blocks, or of LSTM layers."""
    n_head: int = 4
    """Number of query heads."""
    n_kv_head: int | None = None
    """Number of key/value heads (grouped-query attention); null: as many as query heads."""
    d_model: int = 128
    """Width of the residual stream; of an LSTM, of its states and of the embedding."""
    d_ff: int | None = None
    """Width of the feed-forward layer; null: 4 d_model for gelu, 8/3 d_model (to a multiple of 32) for swiglu."""
    vocab_size: int = 1024
    """Number of token ids, the end-of-document token included."""
    max_seq_len: int = 128
    """Longest sequence: the size of the learned position table."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sublayer and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance (layernorm) or the mean square (rmsnorm) before the root."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Nonlinearity of the feed-forward layer."""
    position: Literal["learned", "rope"] = "learned"
    """Position encoding: a learned table added to the embedding, or rotation of queries and keys."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    bias: bool = True
    """Biases in the linear layers and in layer norm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; those that end a residual branch have it over sqrt(2 n_layer)."""
    dropout: float = 0.0
    """Dropout on the embedding, the attention weights and each residual branch, in [0, 1)."""
    attention_window: int | tuple[int | None, ...] | None = None
    """Keys that a query sees, its own and those before it (sliding window); null: all; a list repeats over layers."""
    attention_sparse: SparseAttention | tuple[SparseAttention | None, ...] | None = None
    """Strided block-sparse attention, as {block: 64, local: 1, stride: 4}; null: none; a list repeats over layers."""
    attention_softcap: float = 0.0
    """Attention scores s become softcap * tanh(s / softcap) (Gemma 2: 50); 0: none."""

    def __post_init__(self) -> None:
        check_at_least(1, "model.", self, "n_layer", "n_head", "n_kv_head", "d_model", "d_ff")
        check_at_least(1, "model.", self, "vocab_size", "max_seq_len")
        require(self.init_std > 0, f"model.init_std is {self.init_std}; expected above 0")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; expected 0 <= dropout < 1")
        if self.family == "lstm":
            given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
            extra = ", ".join(f"model.{name} {getattr(self, name)}" for name in given if name not in LSTM_FIELDS)
            require(not extra, f"model.family lstm has none of what {extra} sets; leave it at its default")
            return
        width, heads, kv_heads = self.d_model, self.n_head, self.kv_heads
        require(width % heads == 0, f"model.d_model {width} is not a multiple of model.n_head {heads}")
        require(heads <= 256, f"model.n_head is {heads}; attention takes at most 256 heads")
        require(heads % kv_heads == 0, f"model.n_head {heads} is not a multiple of model.n_kv_head {kv_heads}")
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"model.position rope needs an even head width; d_model / n_head is {self.head_dim}",
        )
        require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}; expected above 0")
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; expected above 0")
        check_at_least(0, "model.", self, "attention_softcap")
        period = 1
        for name in ("attention_window", "attention_sparse"):
            given = getattr(self, name)
            length = len(given) if isinstance(given, tuple) else 1
            require(
                1 <= length <= self.n_layer,
                f"model.{name} lists {length} layers; expected 1 to model.n_layer ({self.n_layer})",
            )
            period = math.lcm(period, length)
        for layer in range(min(period, self.n_layer)):
            window, sparse = self.layer_window(layer), self.layer_sparse(layer)
            found = f"model.attention_window of layer {layer} is {window}"
            require(window is None or window >= 1, f"{found}; expected at least 1 key, or null for all")
            require(window is None or sparse is None, f"{found} and model.attention_sparse {sparse}; use one of them")

    def layer_window(self, layer: int) -> int | None:
        """Keys that a query of block `layer` sees at most, its own among them; None: all up to it."""
        given = self.attention_window
        return given[layer % len(given)] if isinstance(given, tuple) else given

    def layer_sparse(self, layer: int) -> SparseAttention | None:
        """The pattern of block `layer`; None: dense."""
        given = self.attention_sparse
        return given[layer % len(given)] if isinstance(given, tuple) else given

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def ff_dim(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.activation == "gelu" else -(-8 * self.d_model // 3 // 32) * 32


@dataclass(frozen=True)
class PhaseChange:
    """What changes once `samples` have been consumed; null: stays as it is."""

    samples: int
    """Consumed samples from which this holds."""
    seq_len: int | None = None
    """Tokens per sample."""
    global_batch_size: int | None = None
    """Samples per step over all ranks."""
    blend: dict[str, float] | None = None
    """Corpora and their weights."""

    def __post_init__(self) -> None:
        check_at_least(1, "", self, "samples", "seq_len", "global_batch_size")
        check_blend("blend", self.blend)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into samples."""

    source: str = "stdlib"
    """`stdlib` (the Python standard library's own source), or a file, folder or glob of text, JSON or tables."""
    text_key: str = "text"
    """The field of JSON, Parquet and Arrow files that holds the text; `a.b` is field b of field a."""
    empty: Literal["skip", "error"] = "skip"
    """What follows when a document has no text: it is passed over and counted, or an error."""
    tokenizer: str = "train"
    """`train` (a byte-level BPE of model.vocab_size, trained on the corpus), `char` (its characters), or the path of a
    tokenizer.json or of the ranks of a tiktoken encoding (cl100k_base.tiktoken, Llama 3's tokenizer.model)."""
    end_token: str | int | None = None
    """The token, or its id, that ends documents; null: found by its name, such as <|endoftext|> or </s>."""
    path: str | None = None
    """Folder of the token shards, or its URL; null: data/<name of the source>-<vocab_size>."""
    cache: str = "data/cache"
    """Folder where prepare_data.py keeps copies of remote corpora."""
    blend: dict[str, float] | None = None
    """Training corpora (a prepared folder, a token file, a glob or a URL) and their weights; null: data.path alone."""
    seq_len: int = 128
    """Tokens per sample (T)."""
    phases: tuple[PhaseChange, ...] = ()
    """Changes of the sequence length, the batch size and the blend, keyed by consumed samples."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """Samples are cut from the stream of all tokens, or packed from whole documents by a plan made beforehand."""
    document_masks: bool = False
    """Documents of a sample do not attend to one another, and each counts its positions from 0."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that is kept for validation; of fewer than 20, each one's end."""
    validation_samples: int | None = None
    """Validate on this many samples; null: on all of the validation split."""
    loader: Literal["native", "numpy"] = "native"
    """The C++ loader or its NumPy twin; both give the same batches."""
    damaged: Literal["stop", "skip"] = "stop"
    """What follows when a sample cannot be read: an error, or another sample of its corpus is taken and counted."""
    verify: Literal["none", "blocks", "background"] = "blocks"
    """Compare token files with their checksums, a block as it is first read; `background`: with their SHA-256 too."""

    def __post_init__(self) -> None:
        check_at_least(1, "data.", self, "seq_len", "validation_samples")
        fraction = self.validation_fraction
        require(0 < fraction < 1, f"data.validation_fraction is {fraction}; expected between 0 and 1")
        require(
            self.end_token is None or self.tokenizer not in ("train", "char"),
            f"data.end_token is {self.end_token}; expected null, as data.tokenizer {self.tokenizer} makes its own",
        )
        require(
            self.packing == "chunk" or self.document_masks,
            "data.packing best_fit puts unrelated documents into one sample; set data.document_masks=true",
        )
        check_blend("data.blend", self.blend)


def check_blend(key: str, blend: dict[str, float] | None) -> None:
    """Refuse a blend of nothing, and weights that are no shares. The weights need not sum to 1."""
    require(blend != {}, f"{key}: the blend is empty; expected at least one corpus with its weight")
    for name, weight in (blend or {}).items():
        require(weight > 0, f"{key}: the weight of {name!r} is {weight}; expected above 0 (or leave the corpus out)")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019); `muon` updates the matrices of the blocks by Muon (Jordan et al. 2024)."""
    lr: float = 4e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a half cosine, or stable then linear decay (warm-up-stable-decay)."""
    decay_fraction: float = 0.2
    """Share of train.max_steps that the decay of `wsd` takes."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moments."""
    eps: float = 1e-8
    """Adam's denominator term."""
    momentum: float = 0.95
    """Muon's decay rate of the mean gradient, with Nesterov's look ahead."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr is {self.lr}; expected above 0")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr is {self.min_lr}; expected 0 <= min_lr <= lr ({self.lr})")
        check_at_least(0, "optim.", self, "warmup_steps", "weight_decay", "grad_clip")
        require(0 < self.decay_fraction <= 1, f"optim.decay_fraction is {self.decay_fraction}; expected in (0, 1]")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas is {self.betas}; expected each in [0, 1)")
        require(self.eps > 0, f"optim.eps is {self.eps}; expected above 0")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; expected in [0, 1)")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. None of it changes the result."""

    tensor_parallel: int = 1
    """Ranks that share each layer (Megatron tensor parallelism); the rest of the world is data parallel."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the sequence between the layers they split (Megatron sequence parallelism)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards optimizer state over the data-parallel ranks, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in CPU memory: master weights and moments (`optimizer`, ZeRO 1-3), parameters too (`all`, ZeRO 3)."""
    timeout_seconds: int = 600
    """A collective that waits longer than this ends the process with an error."""

    def __post_init__(self) -> None:
        check_at_least(1, "parallel.", self, "tensor_parallel", "timeout_seconds")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    engine: Literal["deepspeed", "fsdp", "plain"] = "deepspeed"
    """DeepSpeed, PyTorch's FSDP2, or a short plain engine (one process or data parallel), the oracle of `verify`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of parameters and activations; bf16 and fp16 keep fp32 master weights, moments and accumulation."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Operands of the products of the blocks' linear layers are in FP8, with a scale for a tensor or for each row."""
    fp8_weight_grad: Literal["fp8", "high"] = "fp8"
    """With train.fp8, the operands of a weight's gradient: in FP8 too, or in train.precision."""
    global_batch_size: int = 32
    """Samples per step over all ranks."""
    micro_batch_size: int = 16
    """Samples per rank in one forward pass; the rest of the step's share is accumulated."""
    max_steps: int = 1000
    """Optimizer steps in the run."""
    max_minutes: float | None = None
    """The run saves and ends, with exit code 75, so many minutes after its start; null: only when it is finished."""
    stall_seconds: int | None = 300
    """The run ends when a rank makes no progress for so long, which it names; null: never. Above the longest step."""
    eval_interval: int = 100
    """Steps between validations; there is always one after the last step."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward pass computes again: nothing, whole blocks (`full`), or attention between its products."""
    checkpoint_every: int = 1
    """Activation checkpointing applies to every n-th block."""
    compile: Literal["none", "blocks"] = "none"
    """Compile each transformer block with torch.compile (`blocks`): blocks of a kind share one graph."""
    z_loss: float = 0.0
    """Weight of the mean of log(Z)^2 added to the training loss, Z being the softmax's denominator; PaLM: 1e-4."""
    guard_interval: int = 100
    """Steps between comparisons of each parameter's replicas over ranks, also made before saving; 0: never."""
    guard_action: Literal["stop", "warn"] = "stop"
    """What follows when replicas differ."""
    state_check_interval: int = 1
    """Steps between comparisons of masters and moments with what the step before has written; 0: never."""
    replay_interval: int = 0
    """Steps between those whose gradients are computed twice more, to be compared bit by bit; 0: never."""
    spike_sigmas: float = 6.0
    """A step is left out if its loss or gradient norm is so many deviations above the mean of late; 0: never."""
    spike_window: int = 128
    """Steps that `of late` means; in the first so many of a phase nothing is called a spike."""
    spike_patience: int = 3
    """Steps left out one after the other, as spikes or as not finite, after which the run goes back to a checkpoint."""
    rollbacks: int = 10
    """How often it does so, passing over the samples in between, before it ends instead; 0: it ends at once."""
    init_from: str | None = None
    """A run's folder, a checkpoint or a Hugging Face folder whose weights a new run begins with; null: random ones."""
    impl: Literal["auto", "triton", "gluon", "torch", "reference"] = "auto"
    """Kernels; `auto`: on a GPU the fastest, measured, on a CPU PyTorch's; `gluon`: Triton's, attention in Gluon."""
    deterministic: bool = True
    """On a GPU `auto` takes only forms whose results have the same bits on every run; false: the fastest of all."""

    def __post_init__(self) -> None:
        check_at_least(1, "train.", self, "global_batch_size", "micro_batch_size", "max_steps", "eval_interval")
        check_at_least(1, "train.", self, "checkpoint_every", "spike_patience")
        check_at_least(2, "train.", self, "spike_window")
        check_at_least(0, "train.", self, "z_loss", "guard_interval", "max_minutes", "spike_sigmas", "rollbacks")
        check_at_least(0, "train.", self, "state_check_interval", "replay_interval")
        require(
            self.deterministic or self.replay_interval == 0,
            f"train.replay_interval is {self.replay_interval} and train.deterministic is false: gradients would differ "
            "without a fault; set train.deterministic=true",
        )
        check_at_least(10, "train.", self, "stall_seconds")
        require(
            self.checkpoint_every == 1 or self.activation_checkpointing != "none",
            f"train.checkpoint_every is {self.checkpoint_every} and train.activation_checkpointing is none; "
            "use train.activation_checkpointing=full",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    interval: int = 100
    """Steps between checkpoints; there is always one after the last step."""
    keep_last: int = 2
    """The newest complete checkpoints, as many as are kept."""
    keep_every: int | None = None
    """Also keep, for ever, each checkpoint whose step is a multiple of this; null: none."""
    resume_step: int | None = None
    """Resume from the checkpoint of this step and put aside what came after it; null: from the newest."""
    asynchronous: bool = False
    """Train on while a checkpoint is written: from a copy in host memory, 12 bytes per parameter over all ranks."""
    copy_to: str | None = None
    """Copy each checkpoint below this fsspec URL (s3://..., file://...) too, and resume from there; null: no copy."""

    def __post_init__(self) -> None:
        require(
            self.copy_to is None or "://" in self.copy_to,
            f"checkpoint.copy_to is {self.copy_to}; expected a URL, such as s3://bucket/folder or file:///mnt/folder",
        )
        check_at_least(1, "checkpoint.", self, "interval", "keep_last", "keep_every", "resume_step")
        require(
            self.keep_every is None or self.keep_every % self.interval == 0,
            f"checkpoint.keep_every is {self.keep_every}; expected a multiple of checkpoint.interval, {self.interval}",
        )
