"""What slows a step, found in the profiles of its ranks: each finding with a cure and an estimate of what it gains.

What ranks have in common is the lower median over them: so a slow rank is blamed on the rank, not on its parts. Each
function states the model of its estimate. Gains are of the profiled step, and overlap: they cannot be added up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import mean, median_low
from typing import NamedTuple, TypeAlias

from llm.page import in_bytes
from llm.profile.ranges import STEP_PARTS
from llm.profile.record import Op, Part, Record

MOST = 10
LEAST = 0.005  # of the step: what gains less is no bottleneck
ELEMENTWISE = frozenset((
    "abs", "add", "addcmul", "clamp", "copy", "div", "eq", "erf", "exp", "ge", "gt", "le", "log", "lt", "masked_fill",
    "mean", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "silu", "sqrt", "square", "sub",
    "sum", "tanh", "var", "where",
))  # fmt: skip
REACHED = 1 / 3  # of the roofline: what a part of the model is expected to reach, so that less is worth a look
LAUNCH_MS = 0.025  # of a CPU for one operation beside its arithmetic: Python, dispatch and autograd
READS = frozenset(("item", "_local_scalar_dense", "is_nonzero"))
UNFUSED = 4  # kinds of elementwise operation in a part, at least: a fused part has two, and some additions
Records: TypeAlias = Sequence[Record]


class Finding(NamedTuple):
    """Something that takes time or memory, and what would change it."""

    name: str
    where: str
    ms: float
    """What it takes of a step now."""
    share: float
    """gain_ms over the time of a step."""
    advice: str
    gain_ms: float


def bottlenecks(records: Records) -> list[Finding]:
    """The ten findings that would gain most, best first; that of the memory, which gains no time, is last."""
    found = [finding for search in SEARCHES for finding in search(records)]
    found = [finding for finding in found if finding.share >= LEAST]
    return [*sorted(found, key=lambda finding: -finding.gain_ms)[: MOST - 1], *memory_peak(records)]


def finding(records: Records, name: str, where: str, ms: float, gain_ms: float, advice: str) -> Finding:
    return Finding(name, where, ms, ratio(gain_ms, step_ms(records)), advice, gain_ms)


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 where the whole is nothing."""
    return part / whole if whole > 0 else 0.0


def step_ms(records: Records) -> float:
    """The time of a step: that of the slowest rank."""
    return max(record.step_ms for record in records)


def usual(records: Records, measure: Callable[[Record], float]) -> float:
    """The lower median of a measure over the ranks."""
    return median_low(map(measure, records))


def part_names(records: Records) -> list[str]:
    """Of all ranks, in the order of the records."""
    return list(dict.fromkeys(part.name for record in records for part in record.parts))


def part_of(record: Record, name: str) -> Part:
    """One of the rank's parts; nothing but zeros where it has no such part."""
    return next((part for part in record.parts if part.name == name), Part(name, 0, 0, 0, 0, 0, 0))


def part_ms(record: Record, name: str) -> float:
    """Milliseconds of a part: of its kernels on a GPU, of the thread on a CPU."""
    part = part_of(record, name)
    return part.forward_ms + part.backward_ms + part.recompute_ms if record.device == "cpu" else part.device_ms


def recompute_ms(record: Record, name: str) -> float:
    """The recomputation in `part_ms`: on a GPU its share of the thread's time, which alone is known by pass."""
    part = part_of(record, name)
    thread = part.forward_ms + part.backward_ms + part.recompute_ms
    return part_ms(record, name) * ratio(part.recompute_ms, thread)


def roofline_ms(record: Record, name: str) -> float:
    """The least time of a part on this machine: its arithmetic at matmul_tflops, or its bytes at copy_gbs."""
    part, machine = part_of(record, name), record.machine
    return max(ratio(part.flops, machine.matmul_tflops * 1e9), ratio(part.bytes, machine.copy_gbs * 1e6))


def overhead_ms(record: Record) -> float:
    """What the profiler adds to a step: to the host's time for each operation."""
    return max(0.0, record.step_ms - record.unprofiled_step_ms)


def slow_rank(records: Records) -> Iterator[Finding]:
    """A rank is busy for longer than the others, which wait for it.

    Gain: the difference from the lower median, of three in four steps at least: what is slow once is chance.
    """

    def excess(record: Record) -> float:
        usually = map(median_low, zip(*(other.busy_ms for other in records), strict=True))
        over = sorted(own - other for own, other in zip(record.busy_ms, usually, strict=True))
        return over[len(over) // 4]

    slowest = max(records, key=excess)

    def over(name: str) -> float:
        return part_ms(slowest, name) - usual(records, lambda record: part_ms(record, name))

    if (gain := excess(slowest)) > 0:
        part = max(part_names(records), key=over, default="all parts")
        where = f"rank {slowest.rank} on {slowest.host}, most of all in {part}"
        advice = "compare this host's clocks, temperature and other processes; leave it out of the hostfile if it stays"
        yield finding(records, "slow rank", where, mean(slowest.busy_ms), gain, advice)


def slow_loader(records: Records) -> Iterator[Finding]:
    """The trainer waits for data. Gain: the longest wait of a rank, since the loader can read ahead of the step."""
    slowest = max(records, key=lambda record: record.loader.wait_ms)
    wait = slowest.loader.wait_ms
    advice = "data.loader=native; a data.path on a local disk; a free core for each rank's loader"
    yield finding(records, "slow loader", f"rank {slowest.rank} on {slowest.host}", wait, wait, advice)


def host_syncs(records: Records) -> Iterator[Finding]:
    """The host reads a number that the device has to compute first, at one place of the code.

    Gain: that time on a CPU; on a GPU at most the time that it stands idle, as the wait itself may be hidden.
    """
    for where in dict.fromkeys(sync.where for record in records for sync in record.syncs):
        of_place = [[sync for sync in record.syncs if sync.where == where] for record in records]
        ms, count = (median_low(sum(getattr(s, key) for s in found) for found in of_place) for key in ("ms", "count"))
        idle = usual(records, lambda record: record.host_time.gap_ms)
        gain = ms if records[0].device == "cpu" else min(ms, idle)
        advice = "keep the number on the device, and read it only in steps that log (logging.interval)"
        yield finding(records, "host synchronisation", f"{where}, {count:.0f} times a step", ms, gain, advice)


def unfused_parts(records: Records) -> Iterator[Finding]:
    """A part of the model is made of many elementwise operations, each of which reads and writes its whole input.

    Gain: fused they would take two passes, a forward and a backward one, as long as the longest of them now, and as
    often as the rarest of them. On a GPU their time is the part's, by their share of its operations.
    """
    for name in (part.name for part in model_parts(records[0])):
        kinds = len({op.name for op in ops_of(records[0], name, ELEMENTWISE)})
        if kinds >= UNFUSED:
            ms = usual(records, lambda record, name=name: unfused_ms(record, name))
            gain = usual(records, lambda record, name=name: unfused_ms(record, name, but_for_two_passes=True))
            impl = records[0].layout.get("impl", "unknown")
            advice = "one fused operation" + ("" if impl == "auto" else f": train.impl=auto (it is {impl})")
            yield finding(records, "unfused part", f"{name}, {kinds} kinds of pass", ms, gain, advice)


def ops_of(record: Record, part: str, names: Collection[str]) -> list[Op]:
    """The listed operations of a part with these names, in place or not."""
    return [op for op in record.ops if op.part == part and op.name.removeprefix("aten::").rstrip("_") in names]


def unfused_ms(record: Record, part: str, *, but_for_two_passes: bool = False) -> float:
    """The time of a part's elementwise operations; 0 where they are few."""
    passes = ops_of(record, part, ELEMENTWISE)
    if len({op.name for op in passes}) < UNFUSED:
        return 0.0
    ms = sum(op.ms for op in passes)
    if record.device != "cpu":
        ms = part_ms(record, part) * ratio(ms, sum(op.ms for op in record.ops if op.part == part))
    whole = ratio(ms, sum(op.ms for op in passes))
    fused = 2 * min(op.count for op in passes) * max(ratio(op.ms, op.count) for op in passes) * whole
    return max(0.0, ms - fused) if but_for_two_passes else ms


def recomputation(records: Records) -> Iterator[Finding]:
    """The backward pass computes activations again. Gain: all of that time, if there is memory to keep them."""
    names = part_names(records)
    ms = usual(records, lambda record: sum(recompute_ms(record, name) for name in names))
    memory = max((record.memory for record in records), key=lambda memory: memory.peak_bytes)
    held = ratio(memory.categories.get("activations", 0), memory.peak_bytes)
    kind = records[0].layout.get("recompute", "unknown")
    instead = "none" if kind == "selective" else "none, or selective, if they fit"
    peak = f"activations are {held:.0%} of a peak of {in_bytes(memory.peak_bytes)}"
    advice = f"train.activation_checkpointing={instead}: {peak}"
    yield finding(records, "recomputation", f"train.activation_checkpointing={kind}", ms, ms, advice)


def above_ms(record: Record) -> float:
    """What the model's parts take above REACHED of the roofline."""
    return sum(max(0.0, own_ms(record, part.name) - reachable_ms(record, part.name)) for part in model_parts(record))


def fixed_ms(record: Record) -> float:
    """What the model's passes take that does not grow with their tokens.

    On a GPU its time without a kernel, less the profiler's overhead. On a CPU `above_ms`, but no more than the time
    between its operations, or LAUNCH_MS for each if that is more.
    """
    idle = record.host_time.gap_ms - record.loader.wait_ms
    if record.device == "cpu":
        return min(above_ms(record), max(idle, record.host_time.launches * LAUNCH_MS))
    return max(0.0, idle - overhead_ms(record))


def micro_batches(record: Record) -> int:
    """How often a step goes through the model."""
    return max(1, int(record.layout.get("grad_accum", 1)))


def repeated_share(record: Record) -> float:
    """What larger micro-batches would gain of `above_ms`; on a GPU nothing, as that is the time of its kernels."""
    again = 1 - 1 / micro_batches(record)
    return again * ratio(fixed_ms(record), above_ms(record)) if record.device == "cpu" else 0.0


def own_ms(record: Record, name: str) -> float:
    """A part's time without what other findings are about, and, on a CPU, without the profiler's share."""
    ms = part_ms(record, name) - recompute_ms(record, name) - unfused_ms(record, name)
    if record.device != "cpu":
        return ms
    reads = sum(op.ms for op in ops_of(record, name, READS))
    calls = ratio(sum(op.count for op in record.ops if op.part == name), sum(op.count for op in record.ops))
    return ms - reads - overhead_ms(record) * calls


def reachable_ms(record: Record, name: str) -> float:
    """What a part's forward and backward passes take at REACHED of the roofline."""
    once = 1 - ratio(recompute_ms(record, name), part_ms(record, name))
    return roofline_ms(record, name) * once / REACHED


def model_parts(record: Record) -> list[Part]:
    return [part for part in record.parts if part.name not in STEP_PARTS]


def small_micro_batches(records: Records) -> Iterator[Finding]:
    """A step goes through the model several times with few tokens.

    Gain: of all times but one `fixed_ms`, and adding up the gradients, which are as many as the weights each time.
    """
    layout, times = records[0].layout, micro_batches(records[0])
    samples = int(layout.get("micro_batch", 1))
    fixed = usual(records, lambda record: fixed_ms(record) + part_ms(record, "gradients"))
    if times > 1:
        where = f"{times} micro-batches of {samples} x {layout.get('seq_len', '?')} tokens a step"
        advice = f"train.micro_batch_size up to {samples * times}, as memory allows (it is {samples})"
        yield finding(records, "small micro-batches", where, fixed, fixed * (1 - 1 / times), advice)


def host_gaps(records: Records) -> Iterator[Finding]:
    """Nothing is computed while Python prepares the next operation, in a step of one micro-batch.

    Gain: half of it, for each token, when twice as many tokens go through the model at once.
    """
    gap = usual(records, lambda r: max(0.0, r.host_time.gap_ms - r.loader.wait_ms - overhead_ms(r)))
    if micro_batches(records[0]) == 1:
        launches = usual(records, lambda record: record.host_time.launches)
        advice = "twice train.micro_batch_size (and train.global_batch_size): the same launches for twice the tokens"
        yield finding(records, "host gaps", f"between {launches:.0f} launches a step", gap, gap / 2, advice)


def exposed_collectives(records: Records) -> Iterator[Finding]:
    """The rank waits for a kind of collective while it computes nothing.

    Gain: the least exposed time over the ranks, since what others have more is waiting for the last to come; and no
    more than the backward pass, behind which it can be hidden.
    """
    backward = usual(records, lambda r: sum(part.backward_ms + part.recompute_ms for part in r.parts))
    for kind in dict.fromkeys((c.name, c.group_size) for record in records for c in record.collectives):
        of_kind = [[c for c in record.collectives if (c.name, c.group_size) == kind] for record in records]
        exposed, count, size = (
            min(sum(getattr(c, field) for c in found) for found in of_kind)
            for field in ("exposed_ms", "count", "bytes")
        )
        where = f"{kind[0]} of {kind[1]} ranks, {count:.0f} times a step, {in_bytes(size)}"
        advice = communication_advice(records[0], kind[1])
        yield finding(records, "exposed collective", where, exposed, min(exposed, backward), advice)


def communication_advice(record: Record, group_size: int) -> str:
    """The settings that make less of this communication, or hide it."""
    layout, advice = record.layout, []
    tp, dp, stage = (int(layout.get(key, default)) for key, default in (("tp", 1), ("dp", 1), ("zero_stage", 0)))
    if group_size == tp > 1:
        advice.append(f"a smaller parallel.tensor_parallel (it is {tp}), within one host")
        advice += [] if layout.get("sequence_parallel") else ["parallel.sequence_parallel=true"]
    if group_size == dp > 1:
        advice += ["parallel.zero_stage=2, which gathers no weights in the forward pass"] if stage == 3 else []
        if layout.get("engine") == "deepspeed":
            advice.append("deepspeed.zero_optimization.overlap_comm=true")
        else:
            advice.append("train.engine=deepspeed, which sends gradients during the backward pass")
        advice.append("a larger train.global_batch_size: fewer reductions for each token")
    return "; ".join(advice) or "call it less often, or while something is computed"


def slow_update(records: Records) -> Iterator[Finding]:
    """Clipping, the optimizer and publishing the weights take a part of the step that does not depend on its tokens.

    Gain: under ZeRO 0 all but 1 / dp of the optimizer, which ZeRO 1 shares; else half of it all, for each token, when
    a step has twice as many.
    """
    layout, names = records[0].layout, ("clip", "optimizer", "publish")
    dp, shared = int(layout.get("dp", 1)), int(layout.get("zero_stage", 0)) > 0 or layout.get("engine") == "fsdp"
    ms = usual(records, lambda record: sum(part_ms(record, name) for name in names))
    gain, advice = ms / 2, "twice train.global_batch_size halves it for each token"
    if dp > 1 and not shared:
        gain = usual(records, lambda record: part_ms(record, "optimizer")) * (1 - 1 / dp)
        advice = "parallel.zero_stage=1 with train.engine=deepspeed: each rank updates its share of the weights"
    yield finding(records, "optimizer", "clip, optimizer, publish", ms, gain, advice)


def below_roofline(records: Records) -> Iterator[Finding]:
    """A part of the model takes far longer than its arithmetic and its bytes need. Gain: up to REACHED of the roofline.

    Recomputation, the elementwise operations of an unfused part, what the host reads and what small micro-batches cost
    are findings of their own.
    """
    advice = {
        "attention": "train.impl=auto and, on a GPU, train.precision=bf16",
        "head_loss": "model.vocab_size a multiple of 128; train.impl=auto",
    }
    usually = "a larger train.micro_batch_size or model.d_model; on a GPU train.precision=bf16"
    for name in (part.name for part in model_parts(records[0])):
        ms = usual(records, lambda record, name=name: own_ms(record, name))
        least = usual(records, lambda record, name=name: reachable_ms(record, name))
        left = usual(records, lambda record: 1 - repeated_share(record))
        where = f"{name}, at {ratio(least * REACHED, ms):.0%} of the machine's roofline"
        yield finding(records, "slow part", where, ms, (ms - least) * left, advice.get(name, usually))


def memory_peak(records: Records) -> Iterator[Finding]:
    """What holds most memory at the peak of the rank that needs most. It gains no time."""
    record = max(records, key=lambda record: record.memory.peak_bytes)
    kinds = record.memory.categories
    if record.memory.peak_bytes <= 0 or not kinds:
        return
    most = max(kinds, key=lambda kind: kinds[kind])
    advice = {
        "weights": "parallel.zero_stage=3 or parallel.tensor_parallel",
        "gradients": "parallel.zero_stage=2",
        "moments": "parallel.zero_stage=1 or parallel.offload=optimizer",
        "activations": "a smaller train.micro_batch_size or train.activation_checkpointing=selective",
    }.get(most, "a smaller train.micro_batch_size")
    owner = f", most of all by {record.memory.owners[0].name}" if record.memory.owners else ""
    where = f"{in_bytes(kinds[most])} of {in_bytes(record.memory.peak_bytes)} on rank {record.rank} are {most}{owner}"
    yield finding(records, "memory peak", where, 0.0, 0.0, f"if memory is short: {advice}")


SEARCHES = (
    slow_rank, slow_loader, host_syncs, unfused_parts, recomputation, small_micro_batches, host_gaps,
    exposed_collectives, slow_update, below_roofline,
)  # fmt: skip
