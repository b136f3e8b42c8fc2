"""Runs that nothing disturbed, which the others are compared with."""

from __future__ import annotations

import pytest

from runs import Workspace, succeeded
from test_faults_stop import command


@pytest.fixture(scope="session")
def whole(workspace: Workspace) -> dict[str, str]:
    """Their names, by launcher: of one rank under python, of two under the others."""
    for name, launcher in (("whole-1", "python"), ("whole-2", "torchrun")):
        succeeded(workspace.run(command(workspace, launcher, name=name)))
    return {"python": "whole-1", "torchrun": "whole-2", "deepspeed": "whole-2"}
