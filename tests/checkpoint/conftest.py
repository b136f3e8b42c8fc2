"""Hugging Face folders that tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_helpers import make_tensors
from checkpoint_helpers import save as save_tensors
from hf_models import make, save

FORMS = ("gpt2", "llama", "mistral")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each form, not to be changed."""
    root = tmp_path_factory.mktemp("forms")
    return {form: save(make(form), root / form) for form in FORMS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 2, not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    (path,) = save_tensors(root, 2, make_tensors(1))
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, alone in its `checkpoints`."""
    target = tmp_path / "run/checkpoints" / whole.name
    target.mkdir(parents=True, mode=0o700)
    for path in whole.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
