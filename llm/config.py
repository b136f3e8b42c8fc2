"""A run is one YAML file plus `--section.field=value` overrides, parsed once into these frozen dataclasses.

Nothing else configures a run: the DeepSpeed config is generated from it (llm/train/engines/deepspeed_config.py).
Each class checks its own fields; `RunConfig` checks those that only make sense together.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal


class InputError(Exception):
    """The config, the input or the machine cannot be used as asked: the process exits with 2.

    The message says what was found, what was expected and what to do.
    """


class Agreed(InputError):
    """An InputError that every rank raises alike, so that one of them may speak for all."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: all that must agree between a checkpoint and the run that reads it."""

    n_layer: int = 4
    """Number of transformer blocks."""
    n_head: int = 4
    """Number of query heads."""
    n_kv_head: int | None = None
    """Number of key/value heads (grouped-query attention); null: as many as query heads."""
    d_model: int = 128
    """Width of the residual stream."""
    d_ff: int | None = None
    """Width of the feed-forward layer; null: 4 d_model for gelu, 8/3 d_model (to a multiple of 32) for swiglu."""
    vocab_size: int = 1024
    """Number of token ids, the end-of-document token included."""
    max_seq_len: int = 128
    """Longest sequence: the size of the learned position table."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sublayer and at the end."""
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
    dropout: float = 0.0
    """Dropout on the embedding, the attention weights and each residual branch, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in (
            "n_layer",
            "n_head",
            "n_kv_head",
            "d_model",
            "d_ff",
            "vocab_size",
            "max_seq_len",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} is {value}; expected at least 1")
        require(
            self.d_model % self.n_head == 0,
            f"model.d_model {self.d_model} is not a multiple of model.n_head {self.n_head}",
        )
        require(
            self.n_head % self.kv_heads == 0,
            f"model.n_head {self.n_head} is not a multiple of model.n_kv_head {self.kv_heads}",
        )
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"model.position rope needs an even head width; d_model / n_head is {self.head_dim}",
        )
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; expected above 0")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; expected 0 <= dropout < 1")

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
class DataConfig:
    """Where the text comes from and how it is cut into samples."""

    source: str = "stdlib"
    """`stdlib` (the Python standard library's own source) or a .txt, .jsonl, .jsonl.gz, .jsonl.zst file or a folder."""
    tokenizer: str = "train"
    """`train` (a byte-level BPE of model.vocab_size is trained on the corpus) or the path of a tokenizer.json."""
    path: str | None = None
    """Folder of the token shards; null: data/<name of the source>-<vocab_size>."""
    seq_len: int = 128
    """Tokens per sample (T)."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that is kept for validation."""
    validation_samples: int | None = None
    """Validate on this many samples; null: on all of the validation split."""
    loader: Literal["native", "numpy"] = "native"
    """The C++ loader or its NumPy twin; both give the same batches."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, f"data.seq_len is {self.seq_len}; expected at least 1")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; expected between 0 and 1",
        )
        require(
            self.validation_samples is None or self.validation_samples >= 1,
            f"data.validation_samples is {self.validation_samples}; expected at least 1, or null for all",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning-rate schedule."""

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
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr is {self.lr}; expected above 0")
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr is {self.min_lr}; expected 0 <= min_lr <= lr ({self.lr})",
        )
        require(
            self.warmup_steps >= 0,
            f"optim.warmup_steps is {self.warmup_steps}; expected at least 0",
        )
        require(
            0 < self.decay_fraction <= 1,
            f"optim.decay_fraction is {self.decay_fraction}; expected in (0, 1]",
        )
        require(
            self.weight_decay >= 0,
            f"optim.weight_decay is {self.weight_decay}; expected at least 0",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {self.betas}; expected each in [0, 1)",
        )
        require(self.eps > 0, f"optim.eps is {self.eps}; expected above 0")
        require(
            self.grad_clip >= 0,
            f"optim.grad_clip is {self.grad_clip}; expected at least 0 (0: no clipping)",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. None of it changes the result."""

    tensor_parallel: int = 1
    """Ranks that share each layer (Megatron tensor parallelism); the rest of the world is data parallel."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    timeout_seconds: int = 600
    """A collective that waits longer than this ends the process with an error."""

    def __post_init__(self) -> None:
        require(
            self.tensor_parallel >= 1,
            f"parallel.tensor_parallel is {self.tensor_parallel}; expected at least 1",
        )
        require(
            self.timeout_seconds >= 1,
            f"parallel.timeout_seconds is {self.timeout_seconds}; expected at least 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """DeepSpeed, or a short plain PyTorch engine (one process or data parallel), the oracle of the tests."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of parameters and activations; bf16 and fp16 keep fp32 master weights, moments and accumulation."""
    global_batch_size: int = 32
    """Samples per step over all ranks."""
    micro_batch_size: int = 16
    """Samples per rank in one forward pass; the rest of the step's share is accumulated."""
    max_steps: int = 1000
    """Optimizer steps in the run."""
    eval_interval: int = 100
    """Steps between validations; there is always one after the last step."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """`full`: keep only each block's input and recompute the block in the backward pass."""
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Kernel implementation; `auto`: Triton on a GPU, PyTorch's own operators on a CPU."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "max_steps", "eval_interval"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    interval: int = 100
    """Steps between checkpoints; there is always one after the last step."""
    keep_last: int = 2
    """Complete checkpoints that are kept."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"checkpoint.interval is {self.interval}; expected at least 1")
        require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; expected at least 1")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run reports."""

    interval: int = 1
    """Steps between metric lines."""
    tensorboard: bool = True
    """Write TensorBoard events to runs/<name>/tensorboard."""
    sample_prompt: str = "def "
    """Text that the finished model continues."""
    sample_tokens: int = 120
    """Tokens of that sample; 0 prints none."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"logging.interval is {self.interval}; expected at least 1")
        require(
            self.sample_tokens >= 0,
            f"logging.sample_tokens is {self.sample_tokens}; expected at least 0",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    name: str = "run"
    """The run's folder is runs/<name>."""
    seed: int = 1234
    """Of initial weights, sample order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout over processes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reporting."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for the DeepSpeed config; those that Ingot owns are refused."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            f"name is {self.name!r}; expected letters, digits, '_', '.' and '-', not first '_', '.' or '-': it "
            "names the run's folder",
        )
        require(
            self.data.seq_len <= self.model.max_seq_len,
            f"data.seq_len {self.data.seq_len} is above model.max_seq_len {self.model.max_seq_len}",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; expected 0 to 2^32 - 1")
        _check_finite(self)
        _check_engine(self.train, self.parallel)
        _check_tensor_parallel(self.model, self.parallel.tensor_parallel)


def check_world(config: RunConfig, world_size: int) -> None:
    """Check that `world_size` ranks can share this run's layers and batch.

    The data-parallel size is world_size / tensor_parallel; each of those ranks takes
    global_batch_size / dp samples of a step, in micro-batches of micro_batch_size.

    Raises:
        InputError: with the numbers and the nearest valid choice.
    """
    tp, train = config.parallel.tensor_parallel, config.train
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    require(
        world_size % tp == 0,
        f"the world of {world_size} ranks is not a multiple of parallel.tensor_parallel {tp}; "
        f"use parallel.tensor_parallel={min(divisors, key=lambda n: abs(n - tp))}",
    )
    dp = world_size // tp
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (dp * micro) == 0:
        return
    if batch % dp == 0:
        fitting = [n for n in range(1, batch // dp + 1) if batch // dp % n == 0]
        advice = f"train.micro_batch_size={min(fitting, key=lambda n: abs(n - micro))}"
    else:
        advice = f"train.global_batch_size={max(1, round(batch / (dp * micro))) * dp * micro}"
    raise InputError(
        f"train.global_batch_size {batch} is not a multiple of {dp} data-parallel ranks x "
        f"train.micro_batch_size {micro} = {dp * micro}; use {advice}"
    )


def _check_finite(config: RunConfig) -> None:
    """Refuse infinities and NaN, which pass many range checks."""
    for section in ("model", "data", "optim"):
        for name, value in vars(getattr(config, section)).items():
            for number in value if isinstance(value, tuple) else (value,):
                finite = not isinstance(number, float) or math.isfinite(number)
                require(finite, f"{section}.{name} is {number}; expected a finite number")


def _check_engine(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts that the engine does not have."""
    if train.engine == "plain":
        require(
            parallel.zero_stage == 0,
            f"train.engine plain has no ZeRO; found parallel.zero_stage {parallel.zero_stage}, "
            "use parallel.zero_stage=0 or train.engine=deepspeed",
        )
        require(
            parallel.tensor_parallel == 1,
            "train.engine plain has no tensor parallelism; found parallel.tensor_parallel "
            f"{parallel.tensor_parallel}, use parallel.tensor_parallel=1 or train.engine=deepspeed",
        )
    else:
        require(
            train.precision == "fp32" or parallel.zero_stage > 0,
            f"train.precision {train.precision} with parallel.zero_stage 0: DeepSpeed would "
            f"accumulate gradients in {train.precision}; use parallel.zero_stage=1",
        )


def _check_tensor_parallel(model: ModelConfig, tp: int) -> None:
    """Refuse a degree that does not cut heads and feed-forward width into equal parts."""
    require(
        tp <= model.kv_heads,
        f"TP degree above the key/value heads: parallel.tensor_parallel is {tp}, model.n_kv_head "
        f"is {model.kv_heads}; use parallel.tensor_parallel={model.kv_heads} or less",
    )
    widths = {"n_kv_head": model.kv_heads, "n_head": model.n_head, "d_ff": model.ff_dim}
    valid = [n for n in range(1, tp + 1) if all(width % n == 0 for width in widths.values())]
    for name, width in widths.items():
        require(
            width % tp == 0,
            f"model.{name} {width} is not a multiple of parallel.tensor_parallel {tp}; "
            f"use parallel.tensor_parallel={valid[-1]}",
        )
