"""csrc/core under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # make fuzz runs it too
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_core_is_clean(tmp_path: Path, sanitizers: str):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    build = [compiler, *flags, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    for command in (build, [str(tmp_path / "empty")]):
        probe = subprocess.run(command, capture_output=True, text=True)
        if probe.returncode != 0:  # no libraries, or a kernel that they cannot run on
            pytest.skip(f"the sanitizers do not work here: {probe.stderr.strip()[-200:]}")
    tests = (ROOT / "csrc/tests").glob("*_test.cpp")
    sources = [*sorted((ROOT / "csrc/core").glob("*.cpp")), *sorted(tests)]
    driver = tmp_path / "core_test"
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(driver)], check=True)
    folder = tmp_path / "files"
    folder.mkdir()
    result = subprocess.run([str(driver), str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "passed" in result.stdout
