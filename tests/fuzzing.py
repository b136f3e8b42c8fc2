"""Builds and runs the libFuzzer targets of csrc/tests."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, sources: Sequence[str], flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> str:
    """Compile sources of csrc/ to FOLDER/fuzz, with the sanitizers; why that cannot be done here, else nothing."""
    compiler = shutil.which("clang++")
    if compiler is None:
        return "clang++ was not found"
    line = [compiler, "-std=c++17", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}", "-D_GLIBCXX_ASSERTIONS", *flags]
    line += ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    empty = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'
    (folder / "empty.cpp").write_text(empty)
    for command in ([*line, "empty.cpp", "-o", "empty", *libraries], ["./empty", "-runs=1"]):
        probe = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if probe.returncode != 0:  # no libraries, or a kernel that they cannot run on
            return f"libFuzzer does not work here: {probe.stderr.strip()[-200:]}"

    def compiled(source: str) -> str:
        target = f"{Path(source).stem}.o"
        subprocess.run([*line, "-c", str(ROOT / "csrc" / source), "-o", target], check=True, cwd=folder)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*line, *objects, "-o", "fuzz", *libraries], check=True, cwd=folder)
    return ""


def fuzz(folder: Path, seconds: int, *options: str, **environment: str) -> int:
    """Run FOLDER/fuzz from the inputs in FOLDER/seeds on; how many inputs it has tried. It must find no defect."""
    # The kernel counts what this process once had among the new one's most memory (ru_maxrss), which libFuzzer limits.
    limit = 2048 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    limits = [f"-rss_limit_mb={limit}", f"-max_total_time={seconds}", "-max_len=2048"]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as temporary:  # no disk
        result = subprocess.run(
            ["./fuzz", *limits, "-print_final_stats=1", *options, "seeds"],
            cwd=folder,  # an input that fails is left there
            env={**os.environ, "TMPDIR": temporary, **environment},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60 + 2 * seconds,
        )
    failed = [path.read_bytes().hex() for path in folder.glob("*-*") if path.is_file()]  # crash-<hash>, oom-<hash>
    assert result.returncode == 0, f"{result.stderr[-4000:]}\ninputs: {failed}"
    counted = re.search(r"number_of_executed_units: (\d+)", result.stderr)
    runs = int(counted[1]) if counted else 0
    print(f"{runs} inputs in {seconds} s")
    return runs
