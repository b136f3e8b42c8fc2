"""Whatever a page or a file of a crawl holds, csrc/crawl reads no foreign memory and says the same of it again."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
from fuzzing import build, fuzz

SECONDS = 10
SHARE = 6  # `make fuzz` gives the token files so many times as long
SOURCES = [f"crawl/{name}.cpp" for name in ("statistics", "signatures", "clusters", "html", "words")]
HTML, WORDS, STATISTICS, SIGNATURES, CLUSTERS = range(5)  # as in csrc/tests/fuzz_crawl.cpp
PAGE = b"<table><tr><td><b a=1 b='x>' c>x<!-- <i> --></td></tr><div><script>if (a</b>) </script></div></b>"
TEXT = '- Don\'t stop... U.S. and http://a.b/c?d=e (10km), up-to-date: "quoted"!\n\n• Where? 3.14%\n\n\nthe end…\n'
OTHERS = "日本語の文章です。ไทย ខ្មែរ မြန်မာ ລາວ naïve café e\u0301 \U0001f389\u200d\u2028a\x85\x1cb\u00a0c\u061f\r\nend"


def write_seeds(folder: Path) -> None:
    """Inputs of csrc/tests/fuzz_crawl.cpp."""
    folder.mkdir()
    texts = [TEXT.encode(), OTHERS.encode(), (TEXT * 9).encode(), b"\xff\xc3\xe3\x81\xf0\x9f\x8e"]
    seeds = [(kind, text) for kind in (WORDS, STATISTICS, SIGNATURES) for text in texts]
    seeds += [(HTML, PAGE), (HTML, PAGE * 9), (CLUSTERS, bytes([1, 2, 1, 3, 4, 0, 1, 3, 4, 4])), (CLUSTERS, bytes(40))]
    for i, (kind, content) in enumerate(seeds):
        (folder / f"{i}").write_bytes(bytes([kind, 67 + i]) + content)


@pytest.mark.slow
def test_native_code_of_the_corpus_under_libfuzzer(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    wanted = request.config.getoption("--fuzz-seconds", default=None)
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared library to embed")
    place, library = (sysconfig.get_config_var(name) for name in ("LIBDIR", "LDVERSION"))
    libraries = [f"-L{place}", f"-Wl,-rpath,{place}", f"-lpython{library}", "-rdynamic"]
    (tmp_path / "ignored.txt").write_text("src:*/pybind11/*\n")  # the compiler takes several times as long with it
    flags = ["-O0", "-gline-tables-only", "-fvisibility=hidden", f"-fsanitize-ignorelist={tmp_path / 'ignored.txt'}"]
    flags += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    why_not = build(tmp_path, ["tests/fuzz_crawl.cpp", *SOURCES], flags, libraries)
    if why_not:
        assert wanted is None, why_not
        pytest.skip(why_not)
    write_seeds(tmp_path / "seeds")
    python = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": ":".join(sys.path), "PYTHONMALLOC": "malloc"}
    seconds = max(1, int(wanted) // SHARE) if wanted else SECONDS
    # Python keeps what it has; a text of 2 kB that takes 5 s is a defect.
    assert fuzz(tmp_path, seconds, "-detect_leaks=0", "-timeout=5", **python) > 100  # more than the seeds
