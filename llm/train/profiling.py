"""Profiles steps of a run: those of profile.steps, or when a file `profile` in the run's folder asks for it.

For n profiled steps: n steps before them are timed, torch.profiler records the n, and the step after them is recorded
once more with its allocations. Each rank writes its trace and its record, then rank 0 joins the traces.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llm import files
from llm.config.phases import Phase
from llm.errors import CheckpointError, ReadError
from llm.parallel.agreement import exchange
from llm.plan.flops import visible_pairs
from llm.profile.machine import measure
from llm.profile.memory import WaitPlaces, analyse_memory, live_blocks
from llm.profile.ranges import Ranges, mark_range
from llm.profile.record import Loader, Machine, Record, Tokens
from llm.profile.timeline import ALIGN, join_traces, trace_path
from llm.profile.trace import analyse, load
from llm.sinks import Say, Sink
from llm.train.engines.base import DTYPES
from llm.train.start import Run

T = TypeVar("T")
DEFAULT_STEPS, MAX_STEPS = 3, 100


@dataclass
class Window:
    """The steps of a profile, and what is measured on the way. Seconds, over all steps of their kind."""

    first: int
    last: int
    folder: Path
    before: int = 0
    """Steps timed before the first."""
    before_seconds: float = 0.0
    profiled: list[float] = field(default_factory=list[float])
    """Of each step."""
    waited: list[float] = field(default_factory=list[float])
    """For the loader, in each profiled step."""
    recording: profile | None = None
    machine: Machine | None = None

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


class Profiler:
    """Of a run under way. Every method is collective but `read_request`."""

    def __init__(self, run: Run, say: Say, folder: Path | None = None) -> None:
        """folder: where profiles go; None: a folder of their own each, in the run's."""
        self.run, self.say, self.folder, self.window = run, say, folder, None
        self.on_gpu = run.device.type == "cuda"
        activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
        self.activities = activities if self.on_gpu else activities[:1]
        if (steps := run.config.profile.steps) is not None:
            if run.step + 1 < steps[0]:
                self._plan(*steps)
            else:
                say(f"warning: profile.steps {list(steps)}: the run is at step {run.step} already; none is profiled")

    def _plan(self, first: int, last: int) -> None:
        folder = self.folder or self.run.folder.path / f"profile-{first}-{last}"
        self.window: Window | None = Window(first, last, folder)

    def step(self, action: Callable[[], T]) -> T:
        """`action`, a step of the run, profiled if it is its turn."""
        number, window = self.run.step + 1, self.window
        try:
            if window is None or number < window.first - window.steps:
                result = action()
            elif number < window.first:
                result, seconds = self._timed(action, first=window.before == 0, last=number + 1 == window.first)
                window.before, window.before_seconds = window.before + 1, window.before_seconds + seconds
            elif number <= window.last:
                result = self._profiled(action, window, number)
            else:
                result = self._finish(action, window)
        except torch.OutOfMemoryError:
            Sink("the memory's snapshot", self.say)(lambda: self._dump_snapshot(self.run.folder.path))
            raise
        self._take_request(number)
        return result

    def _timed(self, action: Callable[[], T], *, first: bool, last: bool) -> tuple[T, float]:
        """The result of a step and its seconds; a GPU is waited for before the first of several and after the last."""
        if self.on_gpu and first:
            torch.cuda.synchronize(self.run.device)
        start = time.perf_counter()
        result = action()
        if self.on_gpu and last:
            torch.cuda.synchronize(self.run.device)
        return result, time.perf_counter() - start

    def _profiled(self, action: Callable[[], T], window: Window, number: int) -> T:
        run, waited = self.run, self.run.feed.wait_seconds
        if number == window.first and not self._begin(window):
            return action()
        first, last = number == window.first, number == window.last
        with self._ranges():
            result, seconds = self._timed(lambda: self._in_step(number, action, wait=last), first=first, last=last)
        window.profiled.append(seconds)
        window.waited.append(run.feed.wait_seconds - waited)
        if last and window.recording is not None:
            run.heartbeat.enter("profile")
            recording, window.recording = window.recording, None
            recording.stop()
            self._all_managed(lambda: recording.export_chrome_trace(str(trace_path(window.folder, run.mesh.rank))))
        return result

    def _in_step(self, number: int, action: Callable[[], T], *, wait: bool) -> T:
        """wait: for the GPU too, within the range."""
        with mark_range(f"step {number}"):
            result = action()
            if self.on_gpu and wait:
                torch.cuda.synchronize(self.run.device)
            return result

    def _ranges(self) -> Ranges:
        run = self.run
        methods: list[tuple[str, Any, str]] = [
            ("data", run.feed, "next_step"), ("forward_backward", run.engine, "forward_backward"),
            ("update", run.engine, "step"), ("vote", run.ballot, "begin"), ("vote", run.ballot, "end"),
        ]  # fmt: skip
        return Ranges(run.engine.model, methods, nvtx=self.on_gpu)

    def _begin(self, window: Window) -> bool:
        """Measure the machine and start the profiler on all ranks; False where the profile cannot be written."""
        run = self.run
        run.heartbeat.enter("profile")
        if not self._all_managed(lambda: empty_folder(window.folder) if run.lead else None):
            return False
        window.machine = measure(run.device, DTYPES[run.config.train.precision])
        window.recording = profile(activities=self.activities, record_shapes=True, acc_events=True)
        window.recording.start()
        exchange(None)
        with mark_range(ALIGN):
            exchange(None)
        return True

    def _finish(self, action: Callable[[], T], window: Window) -> T:
        """The step whose allocations are recorded; then the records are written, and the profile is done."""
        run, self.window = self.run, None
        before = live_blocks(self._known(), run.device)
        total, places = sum(block.bytes for block in before.values()), WaitPlaces()
        total = torch.cuda.memory_allocated(run.device) if self.on_gpu else total
        path = window.folder / f".memory-rank-{run.mesh.rank}.json"
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        with profile(activities=self.activities, profile_memory=True) as recording, self._ranges(), places:
            result = self._in_step(run.step + 1, action, wait=True)
        run.heartbeat.enter("profile")

        def write() -> None:
            if self.on_gpu:
                self._dump_snapshot(window.folder)
            recording.export_chrome_trace(str(path))
            memory = analyse_memory(load(path), before, total, run.device)
            path.unlink()
            self._record(window, places.places, memory).write(window.folder / f"rank-{run.mesh.rank}.json")

        hosts = [host or "" for host in exchange(socket.gethostname())]
        done = self._all_managed(write, window)
        if done and self._all_managed(lambda: join_traces(window.folder, hosts) if run.lead else None, window):
            self.say(f"profile of steps {window.first} to {window.last}: {window.folder}")
        return result

    def close(self) -> None:
        """Give up the profile that the run's end has cut off."""
        if self.window is not None and self.window.recording is not None:
            self.window.recording.stop()
            self.say(f"warning: no profile of steps {self.window.first} to {self.window.last}: the run has stopped")

    def _known(self) -> Iterator[tuple[str, str, Tensor]]:
        """What lives between steps: (category, owner, tensor)."""
        engine = self.run.engine
        for name in engine.parameters:
            yield "weights", name, engine.local_weight(name)
        for group in engine.optimizer.param_groups:
            for master in group["params"]:
                yield "weights", "fp32 masters", master.detach()
                if master.grad is not None:
                    yield "gradients", "fp32 masters", master.grad
        for state in engine.optimizer.state.values():
            owner = "AdamW" if "exp_avg_sq" in state else "Muon"
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    yield "moments", owner, tensor

    def _record(self, window: Window, places: list[str], memory: Any) -> Record:
        run = self.run
        phase = [phase for phase in run.config.phases if phase.first_step < window.first][-1]
        sizes = {"tp": run.mesh.tp_size, "dp": run.mesh.dp_size, "world": run.mesh.world_size}
        events = load(trace_path(window.folder, run.mesh.rank))
        found = analyse(events, sizes, self._attention_flops(phase), places)
        assert window.machine is not None
        tokens = phase.global_batch_size * phase.seq_len
        steps = zip(window.profiled, window.waited, found.exposed_ms, strict=True)
        busy = [max(0.0, (seconds - waited) * 1e3 - exposed) for seconds, waited, exposed in steps]
        return Record(
            run.mesh.rank, run.mesh.world_size, socket.gethostname(),
            torch.cuda.get_device_name(run.device) if self.on_gpu else "cpu",
            self._layout(phase), (window.first, window.last), Tokens(tokens // run.mesh.dp_size, tokens),
            mean(window.profiled) * 1e3, window.before_seconds / window.before * 1e3,
            (mean(busy),) if self.on_gpu else tuple(busy), window.machine, found.parts, found.unattributed_ms,
            found.collectives, found.host, found.syncs, found.ops, Loader(mean(window.waited) * 1e3), memory,
        )  # fmt: skip

    def _layout(self, phase: Phase) -> dict[str, str | int]:
        config, mesh = self.run.config, self.run.mesh
        model, train, parallel = config.model, config.train, config.parallel
        return {
            "tp": mesh.tp_size, "dp": mesh.dp_size, "sequence_parallel": int(parallel.sequence_parallel),
            "engine": train.engine, "zero_stage": parallel.zero_stage, "offload": parallel.offload,
            "micro_batch": train.micro_batch_size, "global_batch": phase.global_batch_size,
            "grad_accum": phase.global_batch_size // (train.micro_batch_size * mesh.dp_size), "seq_len": phase.seq_len,
            "recompute": train.activation_checkpointing, "recompute_every": train.checkpoint_every,
            "precision": train.precision, "impl": train.impl, "n_layer": model.n_layer, "d_model": model.d_model,
            "vocab_size": model.vocab_size,
        }  # fmt: skip

    def _attention_flops(self, phase: Phase) -> float:
        """Of a layer's forward pass for one micro-batch on this rank, mean over layers; masks of documents apart."""
        model = self.run.config.model
        layers = range(model.n_layer)
        pairs = sum(visible_pairs(phase.seq_len, model.layer_window(i), model.layer_sparse(i)) for i in layers)
        width = model.n_head * model.head_dim / self.run.mesh.tp_size
        return 4 * width * pairs / model.n_layer * self.run.config.train.micro_batch_size

    def _all_managed(self, action: Callable[[], object], window: Window | None = None) -> bool:
        """Whether no rank failed to write; else all give the profile up, with a warning, and the run goes on."""
        error, window = None, window or self.window
        try:
            action()
        except (OSError, CheckpointError) as failure:
            error = f"rank {self.run.mesh.rank}: {failure}"
        first = next((text for text in exchange(error) if text is not None), None)
        if first is not None and window is not None:
            self.say(f"warning: no profile of steps {window.first} to {window.last}: {first}")
            self.window = None
        return first is None

    def _dump_snapshot(self, folder: Path) -> None:
        """A GPU's blocks of memory, with the stacks that made them where they were recorded, as JSON."""
        files.write_json(folder / f"memory-rank-{self.run.mesh.rank}.json", torch.cuda.memory._snapshot())
        torch.cuda.memory._record_memory_history(enabled=None)

    def read_request(self) -> None:
        """Rank 0: read and remove the file `profile` in the run's folder; the next vote asks all ranks for its steps.

        Called when a step is logged.
        """
        run = self.run
        path = run.folder.profile
        if not run.lead or self.window is not None or run.ballot.wanted or not os.path.lexists(path):
            return
        try:
            short = files.regular_size(path) < 100
            text = files.read_regular(path, 100).decode(errors="replace").strip() if short else "..."
            path.unlink()
        except (CheckpointError, ReadError, OSError) as error:
            run.ballot.wanted = -1  # asked for no more
            self.say(f"warning: no profile: {error}")
            return
        steps = int(text) if text.isascii() and text.isdigit() else DEFAULT_STEPS if text == "" else 0
        needed = 2 * steps + 2  # one for the vote, as many unprofiled, and one for the memory
        left = run.config.train.max_steps - run.step
        if not 1 <= steps <= MAX_STEPS:
            self.say(f"warning: {path}: found {text!r}; expected a number of steps, 1 to {MAX_STEPS}, or nothing")
        elif run.config.train.compile != "none":
            self.say(f"warning: {path}: no profile: train.compile hides the parts of a block; use train.compile=none")
        elif left < needed:
            self.say(f"warning: {path}: {steps} steps need {needed} steps of the run, and {left} are left")
        else:
            run.ballot.wanted = steps

    def _take_request(self, number: int) -> None:
        steps = self.run.ballot.requested
        if steps > 0 and self.window is None:
            self.run.ballot.wanted = self.run.ballot.requested = 0
            self._plan(number + 1 + steps, number + 2 * steps)
            self.say(f"profiling steps {number + 1 + steps} to {number + 2 * steps}, as asked")


def empty_folder(folder: Path) -> None:
    """Make the folder of a profile, without what an earlier one has left there: it may be of more ranks."""
    folder.mkdir(0o700, parents=True, exist_ok=True)
    for pattern in ("rank-*.json", "trace-rank-*.json.gz", "timeline.json.gz", "report.*"):
        for path in folder.glob(pattern):
            path.unlink()
