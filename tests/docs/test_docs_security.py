"""SECURITY.md names the tests that show what it claims."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = [" ".join(text.split()) for text in (ROOT / "SECURITY.md").read_text().split("\n- ")[1:]]
NAMED = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")
# What Ingot does not do, and what cannot be shown.
WARNINGS = ("**Hashes are for integrity, not authenticity.**", "**The rendezvous has no authentication.**")


@pytest.mark.parametrize("claim", CLAIMS, ids=[text.split("**")[1] for text in CLAIMS])
def test_each_claim_names_tests_that_exist(claim: str) -> None:
    found = NAMED.findall(claim)
    assert bool(found) != claim.startswith(WARNINGS)
    assert len(found) == claim.count("tests/") and not re.search(r"(?<![/:\w])test_", claim)
    for path, name in found:
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in names if name else names, (path, name)
