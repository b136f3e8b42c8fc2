"""`make gpu-cache`: compiles for sm_90, without a GPU, what the proof launches, and packs it into one file.

Triton's own JIT compiles for CPU tensors of the proof's types and shapes, and launches nothing. It finds a kernel again
by a key of its build, ptxas, the source, the options and some environment variables; torch has no part in it. Packed
kernels come with the keys of source and options. `unpack` makes the whole key anew with the Triton that is there, so
that another build of the same version takes them too, and tells what differs.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager, triton_key

from benchmarks.gpu_proof import correctness, speed, training
from benchmarks.gpu_proof.stage import Compilations, measured
from benchmarks.kernels.attention import case
from benchmarks.kernels.case import Case
from benchmarks.kernels.launches import pretended
from benchmarks.kernels.tune import pass_of
from benchmarks.report import Record
from kernels.dispatch import INTERPRETED, expect

ARCH = 90
CACHE = Path("build/gpu-cache/cache.tar.xz")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
INDEX = "index.json"
KEPT = (".json", ".cubin")  # of what Triton keeps of a kernel; the rest is for reading


def compiler() -> dict[str, str]:
    """The parts of Triton's keys that are the machine's own."""
    backend: Any = make_backend(GPUTarget("cuda", ARCH, 32))
    return {
        "python": platform.python_version(),
        "triton": triton.__version__,
        "triton's files": " ".join(part[:6] for part in triton_key().split("-")),
        "backend": backend.hash(),  # ptxas and the architecture
        "options": backend.parse_options({}).hash(),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
    }


def hashed(source: str, options: str) -> str:
    """The name by which the Triton here finds the kernel of these two keys."""
    parts = [SimpleNamespace(hash=lambda part=part: part) for part in (source, options)]
    backend = make_backend(GPUTarget("cuda", ARCH, 32))
    key = get_cache_key(parts[0], backend, parts[1], env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def work() -> dict[str, Callable[[], Any]]:
    """By name, calls that launch what the stages do."""
    made = correctness.cases(CPU, small=False, layer_rows=64) | correctness.gluon_cases(CPU)
    timed = [replace(shape, atomics=atomics) for shape in speed.SHAPES for atomics in (False, True)]
    timed += [replace(shape, gluon=True) for shape in speed.GLUON_SHAPES]
    made |= {f"timed {shape}": partial(case, CPU, BF16, shape) for shape in timed}
    found: dict[str, Callable[[], Any]] = {name: partial(results, make) for name, make in made.items()}
    for kind, shape, tile in speed.candidates(CPU, small=False):
        found[f"{kind} {shape} {tile}"] = lambda *a, tile=tile, of=(kind, shape): pass_of(*of, case(CPU, BF16, of[1]))(
            tile
        )
    return found | {f"step of {name}": partial(short_step, model) for name, model in training.MODELS.items()}


def results(make: Callable[[], Case]) -> list[torch.Tensor]:
    case = make()
    return case.results(case.impl)


def short_step(model: dict[str, Any]) -> None:
    """A step of one block, on two rows that are just too long for the tiles of short ones."""
    short = model | {"n_layer": 1, "max_seq_len": 528, "vocab_size": 1024}
    with patch("llm.train.optim.why_not_triton", lambda device, dtype: None):
        engine, batch = training.engine_of(CPU, short, "triton")
        engine.forward_backward([batch], batch.targets.numel())
        engine.step()


def launch(name: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Do one part of `work`. Returns the keys of source and options of each kernel by its name in Triton's cache, and
    what to print.
    """
    used: dict[str, tuple[str, str]] = {}

    def note(source: Any, backend: Any, options: Any, env_vars: Any) -> str:
        key = get_cache_key(source, backend, options, env_vars=env_vars)
        used[hashlib.sha256(key.encode()).hexdigest()] = source.hash(), options.hash()
        return key

    torch.set_num_threads(1)
    listener = knobs.compilation.listener = Compilations()
    nothing_drawn = patch("torch.randn", torch.empty)  # for nothing is computed
    with pretended(ARCH), patch("triton.compiler.compiler.get_cache_key", note), nothing_drawn:
        found = measured(lambda: {"outputs": work()[name]()}, CPU)
    return used, f"{name}: {len(used)} kernels, compiled: {listener.compiled}{found.get('error', '')}"


def pack(used: dict[str, tuple[str, str]]) -> None:
    """Write the kernels that were used, with their keys and what compiled them."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(CACHE, "w:xz") as packed:
        index = Path(folder, INDEX)
        index.write_text(json.dumps({"compiler": compiler(), "kernels": used}), encoding="utf-8")
        packed.add(index, INDEX)
        for name in used:
            for path in sorted(Path(get_cache_manager(name).cache_dir).iterdir()):  # pyright: ignore
                if path.suffix in KEPT and not path.name.startswith("__grp__"):
                    packed.add(path, f"{name}/{path.name}")


def unpack() -> Record:
    """Put the packed kernels where the Triton here looks for them (TRITON_CACHE_DIR).

    kernels: how many; renamed: those that it would not have found by the name of the other machine; differs: the parts
    of the keys that do, there and here. Raises FileNotFoundError where nothing was packed.
    """
    renamed = 0
    with tarfile.open(CACHE) as packed:  # read, not extracted: its names are looked at below alone
        contents = {Path(m.name): packed.extractfile(m).read() for m in packed if m.isfile()}  # pyright: ignore
    index = json.loads(contents[Path(INDEX)])
    for name, keys in index["kernels"].items():
        manager = get_cache_manager(hashed(*keys))
        renamed += hashed(*keys) != name
        own = {path.name: data for path, data in contents.items() if path.parent == Path(name)}
        files = {file: manager.put(data, file) for file, data in own.items()}
        manager.put_group(next(file for file in files if file.endswith(".json")), files)
    there, here = index["compiler"], compiler()
    differs = {part: [there[part], here[part]] for part in here if there[part] != here[part]}
    return {"kernels": len(index["kernels"]), "renamed": renamed, "differs": differs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof.cache", description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="a regular expression to be found in the names of what is launched")
    options = parser.parse_args(arguments)
    expect(not INTERPRETED, "found TRITON_INTERPRET=1, expected compiled kernels: unset it and run again")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE.parent.resolve() / "triton")  # kept: the next time is short
    began, used, failed = time.perf_counter(), {}, 0
    with pretended(ARCH):
        names = [name for name in work() if re.search(options.only, name)]
    # Fresh processes: Triton's compiler must not be forked.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as workers:
        for found, text in workers.map(launch, names):
            used |= found
            failed += "Error" in text
            print(text, flush=True)
    pack(used)
    print(f"{CACHE}: {len(used)} kernels, {CACHE.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
