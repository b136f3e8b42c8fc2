"""Executes a kernel module's own source with the emulator's modules in place of Gluon's.

Functions under @gluon.jit or @triton.jit become Python functions that check their constants. What a module imports from
elsewhere is the real thing, except for jit functions, which are executed in the same way from their module's source.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import triton
from triton.experimental.gluon import language as real
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .language import constant, language
from .machine import Machine
from .values import INT32, Value

GLUON = "triton.experimental.gluon"
KERNELS = (JITFunction, InterpretedFunction)  # the second where TRITON_INTERPRET is set


class Loader:
    """The kernel modules of one run. sources: texts that stand for those of modules, by name."""

    def __init__(self, machine: Machine, sources: Mapping[str, str]) -> None:
        self.machine, self.sources = machine, sources
        self.spaces: dict[str, SimpleNamespace] = {}
        gl = language(machine)
        gluon = SimpleNamespace(jit=jit, constexpr_function=lambda fn: fn, language=gl)
        hopper = f"{GLUON}.language.nvidia.hopper"
        top = SimpleNamespace(gluon=gluon)
        self.fakes = {
            "triton": _Delegate(triton, experimental=top, language=gl, jit=jit),
            "triton.language": gl,
            "triton.experimental": top,
            GLUON: gluon,
            f"{GLUON}.language": gl,
            f"{GLUON}.language.nvidia": gl.nvidia,
            hopper: gl.nvidia.hopper,
            f"{hopper}.tma": gl.nvidia.hopper.tma,
            f"{hopper}.mbarrier": gl.nvidia.hopper.mbarrier,
        }

    def module(self, name: str) -> SimpleNamespace:
        """The namespace of a kernel module, executed at its first use."""
        if name not in self.spaces:
            text = self.sources.get(name) or inspect.getsource(importlib.import_module(name))
            self.spaces[name] = self.execute(text, name)
        return self.spaces[name]

    def execute(self, text: str, name: str) -> SimpleNamespace:
        self.machine.lines[name] = text.splitlines()
        hooks = {"__import__": functools.partial(self._import, name), "range": self._range}
        space = {"__name__": name, "__builtins__": vars(builtins) | hooks}
        exec(compiled(text, name), space)
        return SimpleNamespace(**space)

    def _import(self, importer: str, name: str, *args: Any) -> Any:
        """What `import name` gives in a kernel module."""
        if name in self.fakes:
            return self.fakes["triton"] if not (len(args) > 2 and args[2]) else self.fakes[name]
        found = __import__(name, {"__package__": importer.rpartition(".")[0], "__name__": importer}, *args[1:])
        return _Delegate(found, self.replaced)

    def replaced(self, found: Any) -> Any:
        """A jit function, a module that has some, or a constexpr as the emulator has it; others as they are."""
        if isinstance(found, KERNELS) and not found.fn.__module__.startswith("triton."):
            return getattr(self.module(found.fn.__module__), found.fn.__name__)
        if isinstance(found, real.constexpr):
            return found.value
        if isinstance(found, ModuleType) and any(isinstance(x, KERNELS) for x in vars(found).values()):
            return self.module(found.__name__)
        return found

    def _range(self, *bounds: Any) -> Iterator[Value]:
        """A loop over `range` in a kernel counts in int32."""
        numbers = [bound.data if isinstance(bound, Value) else bound for bound in bounds]
        for i in range(*numbers):
            yield Value(i, real.int32 if i in INT32 else real.int64, self.machine)


class _Delegate:
    """A module whose attributes go through `change`, but for those given by name."""

    def __init__(self, module: Any, change: Callable[[Any], Any] = lambda x: x, **own: Any) -> None:
        self.__dict__.update(own, _module=module, _change=change)

    def __getattr__(self, name: str) -> Any:
        return self._change(getattr(self._module, name))


@functools.lru_cache(256)
def compiled(text: str, name: str) -> CodeType:
    """The code of a kernel module, without its classes and without functions that other decorators register."""
    tree = ast.parse(text)
    tree.body = [part for part in tree.body if not isinstance(part, (ast.ClassDef, ast.Expr)) and only_jit(part)]
    return compile(tree, f"<emulated {name}>", "exec")


def only_jit(part: ast.stmt) -> bool:
    return all("jit" in ast.unparse(decorator) for decorator in getattr(part, "decorator_list", ()))


def jit(function: Callable | None = None, **options: Any) -> Callable:
    """A kernel function: parameters annotated constexpr must be given constants."""
    if function is None:
        return jit
    signature = inspect.signature(function)
    names = [name for name, each in signature.parameters.items() if is_constant(each.annotation)]

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name in names:
            if isinstance(given.get(name), Value):
                raise TypeError(f"{function.__name__}: {name} is constexpr, found {given[name]}")
        return function(*args, **kwargs)

    called.constants = names
    return called


def is_constant(annotation: Any) -> bool:
    return annotation is constant or str(annotation).endswith("constexpr")
