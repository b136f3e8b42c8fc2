"""Runs a launch: `run(launch, seed)`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .load import Loader
from .machine import Machine
from .memory import World
from .report import Report
from .schedule import Random, Timed
from .trace import Costs


def run(launch: Any, seed: int | None, sources: Mapping[str, str] | None = None, until_found: bool = False) -> Report:
    """Run a launch (kernel, grid, arguments by name, num_warps), one CTA after the other, on CPU tensors.

    What the kernel stores is written into the launch's tensors. A deadlock or a Python error in a kernel ends the run.

    seed: of the schedule; None: the schedule that the assumed costs give, to draw. sources: texts that stand for those
    of kernel modules, by the module's name. until_found: stop after the CTA with the first finding.
    """
    machine = Machine(launch.grid, Timed() if seed is None else Random(seed), {}, Costs())
    function = launch.kernel.fn
    kernel = getattr(Loader(machine, sources or {}).module(function.__module__), function.__name__)
    world = World(machine)
    arguments = {
        name: value if name in kernel.constants else world.argument(name, value)
        for name, value in launch.arguments.items()
    }
    for z, y, x in itertools.product(*(range(side) for side in reversed(machine.grid))):
        if not machine.run(lambda: kernel(**arguments), (x, y, z)) or (until_found and machine.found):
            break
    else:
        world.check_end()
    world.write_back()
    return machine.report_of()


def load(text: str, name: str) -> SimpleNamespace:
    """The namespace of a kernel module's source under the emulator, to see that it can be executed."""
    return Loader(Machine((1,), Random(0), {}, Costs()), {}).execute(text, name)
