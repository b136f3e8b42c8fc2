"""Hugging Face folders that tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_models import make, save

FORMS = ("gpt2", "llama", "mistral")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each form, not to be changed."""
    root = tmp_path_factory.mktemp("forms")
    return {form: save(make(form), root / form) for form in FORMS}
