"""What a run will cost, as the lines that launch/plan.py prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llm.config import RunConfig
from llm.config.phases import consumed_tokens
from llm.plan.budget import OPTIMAL_TOKENS, far_off, optimal_tokens, tokens_per_parameter
from llm.plan.flops import flops_by_part, flops_of_steps, flops_per_token, recomputed_flops
from llm.plan.memory import factors_by_part, frozen_masters, offloaded, parameters, parameters_by_part, rank_memory

GB = 1e9


def summary(
    config: RunConfig, gpus: int, *, mfu: float, peak_tflops: float, epochs: Mapping[str, float] | None
) -> Iterator[str]:
    """The lines of the plan for `gpus` ranks.

    mfu: the share of peak_tflops, of one GPU, that the run would use, by the non-causal formula. epochs: how often the
    run reads each corpus; None where the data is not prepared.
    """
    parallel, train = config.parallel, config.train
    fp8 = "" if train.fp8 == "none" else f" with {train.fp8} FP8"
    dp = gpus // parallel.tensor_parallel
    layout = [f"{train.engine}, {train.precision}{fp8}, ZeRO {parallel.zero_stage}", f"TP {parallel.tensor_parallel}"]
    layout += ["sequence parallel"] * parallel.sequence_parallel + [f"DP {dp}"]
    micro_batches = train.global_batch_size // (dp * train.micro_batch_size)
    layout += [f"{micro_batches} micro-batches of {train.micro_batch_size}"]
    yield f"{config.name} on {gpus} GPU{'s' * (gpus > 1)}: {', '.join(layout)}"
    yield ""
    yield from parts_table(config)
    yield ""
    yield from memory_table(config, gpus)
    yield ""
    yield from budget(config, epochs)
    work = flops_of_steps(config, 0, train.max_steps, "non-causal")
    hours = work / (gpus * peak_tflops * 1e12 * mfu) / 3600
    yield f"time        {hours:,.3g} hours at {mfu:.0%} MFU (non-causal) of {peak_tflops:g} TFLOP/s per GPU"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def parts_table(config: RunConfig) -> list[str]:
    """Parameters and FLOPs of each part, and the FLOPs of the whole under each formula."""
    model, T, lora = config.model, config.data.seq_len, config.lora
    sizes, factors = parameters_by_part(model), factors_by_part(model, lora)
    work = flops_by_part(model, T, "non-causal", lora)
    whole, total = sum(sizes.values()) + factors.total(), sum(work.values())
    rows = [["part", "parameters", "share", "MFLOP per token", "share"]]
    for name, flops in work.items():
        count = sizes[name] + factors[name]
        rows.append([name, f"{count:,}", f"{count / whole:.1%}", f"{flops / 1e6:,.1f}", f"{flops / total:.1%}"])
    rows.append(["all", f"{whole:,}", "", f"{total / 1e6:,.1f}", ""])
    causal, again = flops_per_token(model, T, lora=lora), recomputed_flops(config, T)
    note = f"non-causal, forward and backward at T = {T}; causal {causal / 1e6:,.1f}"
    note += f", with recomputation {(causal + again) / 1e6:,.1f}" if again else ""
    return [*table(rows), note, *[f"trained are {factors.total():,}, the factors of LoRA"] * (lora.rank > 0)]


def memory_table(config: RunConfig, gpus: int) -> list[str]:
    """Gigabytes on one rank, by the formulas of docs/parallelism.md."""
    sizes, host = rank_memory(config, gpus), sum(offloaded(config, gpus)) + frozen_masters(config, gpus)
    rows = [["memory of a rank", "GB"], *([name, f"{size / GB:,.2f}"] for name, size in sizes.items() if size)]
    rows.append(["all", f"{sum(sizes.values()) / GB:,.2f}"])
    rows += [["in the CPU's memory", f"{host / GB:,.2f}"]] if host else []
    return [*table(rows), "without CUDA's context, buckets of collectives and fragments: leave a tenth free"]


def budget(config: RunConfig, epochs: Mapping[str, float] | None) -> Iterator[str]:
    """Tokens, those that are compute-optimal, and epochs."""
    model, steps = config.model, config.train.max_steps
    tokens = consumed_tokens(config.phases, steps)
    yield f"tokens      {tokens:,} in {steps:,} steps, {tokens_per_parameter(config):.3g} per parameter"
    share = tokens / optimal_tokens(model)
    yield (
        f"optimal     {optimal_tokens(model):,} ({OPTIMAL_TOKENS} x {parameters(model):,}, Hoffmann et al. 2022): "
        f"the run has {share:.2f} of them"
    )
    remark = far_off(config)
    if remark is not None:
        yield remark
    if epochs is None:
        yield f"epochs      not known: data.source {config.data.source} is not prepared (launch/prepare_data.py)"
    for name, times in (epochs or {}).items():
        yield f"epochs      {times:.3g} of {name}"
