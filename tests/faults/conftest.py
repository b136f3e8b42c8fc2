from pathlib import Path

import pytest

from runs import Workspace, succeeded


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(Path(tmp_path_factory.mktemp("workspace")))
    succeeded(space.prepare())
    return space
