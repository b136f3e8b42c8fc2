"""Kernels with one fault each, made by rule from a kernel module's source.

Each mutant changes one place: a barrier call is removed, a phase flipped, a stage or a count shifted, a wait for
products weakened, a dependency or a fence dropped, a comparison changed, a bound moved, or two neighbours swapped.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

BARRIERS = ("init", "invalidate", "expect", "arrive", "wait")
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SETS = {"mbarrier.init", "mbarrier.invalidate", "tma.async_copy_global_to_shared", "tma.async_copy_shared_to_global"}
FIXED = ("desc", "tiles", "STAGES")  # of a helper's parameters: no numbers, or constants


class Mutant(NamedTuple):
    """kind: the rule; place: "function: the statement before"; after: the statement it became; source: the module's."""

    kind: str
    place: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind} | {self.place} -> {self.after}"


def called(node: ast.AST) -> str:
    """The function that an expression or statement calls, such as "mbarrier.wait"; "" if it is no call."""
    value = getattr(node, "value", None) if isinstance(node, (ast.Expr, ast.Assign)) else node
    return ast.unparse(value.func) if isinstance(value, ast.Call) else ""


def is_barrier(node: ast.AST) -> bool:
    module, _, name = called(node).rpartition(".")
    return module == "mbarrier" and name in BARRIERS


def synchronises(node: ast.AST) -> bool:
    """Whether the order of a statement among its neighbours matters to other partitions or to what is in flight."""
    name = called(node)
    return is_barrier(node) or name.startswith("tma.") or name in ("warpgroup_mma_wait", "fence_async_shared")


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def functions(tree: ast.Module) -> dict[int, ast.FunctionDef]:
    """The jit functions of a module, by their place in its body."""
    found = {i: part for i, part in enumerate(tree.body) if isinstance(part, ast.FunctionDef)}
    return {i: part for i, part in found.items() if any("jit" in ast.unparse(each) for each in part.decorator_list)}


def helpers(*sources: str) -> dict[str, list[str]]:
    """Functions that are made of barrier calls, by name, and their parameters: calls of them are changed as well."""
    found = {}
    for source in sources:
        for function in functions(ast.parse(source)).values():
            if any(is_barrier(node) for node in function.body) and not any(map(blocks, function.body)):
                found[function.name] = [each.arg for each in function.args.args]
    return found


def blocks(node: ast.AST) -> bool:
    return isinstance(node, (ast.For, ast.While, ast.If))


def mutants(source: str, known: dict[str, list[str]]) -> Iterator[Mutant]:
    """Every mutant of the jit functions of a module; known: the `helpers` of its kernels."""
    tree = ast.parse(source)
    texts = [ast.unparse(part) for part in tree.body]
    for index, function in functions(tree).items():
        for kind, path, changed in changes(function, known):
            other = copy.deepcopy(function)
            before, after = replaced(other, path, changed)
            if kind == "stage shifted" and before.startswith("mbarrier.init("):
                continue  # a loop initialises all of them, in whichever order
            text = "\n".join([*texts[:index], ast.unparse(other), *texts[index + 1 :]])
            yield Mutant(kind, f"{function.name}: {before}", after, text)


Path = tuple[tuple[str, int | None], ...]


def changes(function: ast.FunctionDef, known: dict[str, list[str]]) -> Iterator[tuple[str, Path, list[ast.AST]]]:
    """(rule, where, what stands there instead) of every change to a function."""
    for path, node in nodes(function, ()):
        if isinstance(node, ast.stmt):
            for kind, changed in statement_changes(node, known):
                yield kind, path, changed
        elif not any(name == "annotation" for name, _ in path):
            for kind, changed in expression_changes(node, known):
                yield kind, path, [changed]
    yield from swaps(function, known)


def nodes(node: ast.AST, path: Path) -> Iterator[tuple[Path, ast.AST]]:
    """All nodes under a function's statements but those of assertions, with the way to each."""
    for name, value in ast.iter_fields(node):
        if name in ("decorator_list", "args") and isinstance(node, ast.FunctionDef):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not called(child).endswith("static_assert"):
                here = (*path, (name, index))
                yield here, child
                yield from nodes(child, here)


def replaced(function: ast.AST, path: Path, changed: list[ast.AST]) -> tuple[str, str]:
    """Put `changed` in the place that `path` names (as many nodes as it has); the statement before and after."""
    node, at = function, function
    for name, index in path[:-1]:
        node = getattr(node, name) if index is None else getattr(node, name)[index]
        at = node if isinstance(node, ast.stmt) and not hasattr(node, "body") else at
    name, index = path[-1]
    whole = at is function
    before = "; ".join(map(ast.unparse, _slot(node, name, index, len(changed)))) if whole else ast.unparse(at)
    if index is None:
        setattr(node, name, changed[0])
    else:
        getattr(node, name)[index : index + len(changed)] = changed
    ast.fix_missing_locations(function)
    after = "; ".join(map(ast.unparse, changed)) if whole else ast.unparse(at)
    return before, after


def _slot(node: ast.AST, name: str, index: int | None, size: int) -> list[ast.AST]:
    return [getattr(node, name)] if index is None else getattr(node, name)[index : index + size]


def statement_changes(node: ast.stmt, known: dict[str, list[str]]) -> Iterator[tuple[str, list[ast.AST]]]:
    name = called(node)
    if is_barrier(node) or (name in known and isinstance(node, ast.Expr)):
        yield f"no {name.rpartition('.')[2]}", [ast.Pass()]
    if name in ("fence_async_shared", "tma.store_wait"):
        yield f"no {name.rpartition('.')[2]}", [ast.Pass()]
    if name == "warpgroup_mma_wait" and isinstance(node, ast.Assign):
        call = node.value
        deps = next(keyword.value for keyword in call.keywords if keyword.arg == "deps")
        given = deps if len(deps.elts) > 1 else deps.elts[0]
        yield "no wait for products", [ast.Assign(node.targets, copy.deepcopy(given))]
        for i in range(len(deps.elts)) if len(deps.elts) > 1 else ():
            yield "dependency dropped", [without(node, i)]
    if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(getattr(node.value, "op", None), ast.FloorDiv):
        for step in ("({}) + 1", "({}) - 1"):
            changed = copy.deepcopy(node)
            changed.value = parsed(step.format(ast.unparse(node.value)))
            yield "bound moved", [changed]


def without(node: ast.Assign, i: int) -> ast.Assign:
    """A wait for products without its i-th dependency."""
    node = copy.deepcopy(node)
    deps = next(keyword.value for keyword in node.value.keywords if keyword.arg == "deps")
    targets = node.targets[0]
    del deps.elts[i], targets.elts[i]
    if len(targets.elts) == 1:
        node.targets = [targets.elts[0]]
    return node


def expression_changes(node: ast.AST, known: dict[str, list[str]]) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Call):
        yield from call_changes(node)
        if called(node) in known:
            yield from helper_changes(node, known[called(node)])
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and ast.unparse(node.right) == "1":
        yield "one dropped", copy.deepcopy(node.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        swapped = copy.deepcopy(node)
        swapped.ops = [SWAPPED[type(node.ops[0])]()]
        yield "comparison changed", swapped
        yield "comparison dropped", parsed(f"({ast.unparse(node)}) | ~({ast.unparse(node)})")


def helper_changes(node: ast.Call, parameters: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """Calls of functions that are made of barrier calls: other numbers, and no predicate."""
    for i, parameter in enumerate(parameters[: len(node.args)]):
        if parameter == "pred":
            changed = copy.deepcopy(node)
            del changed.args[i]
            yield "no pred", changed
        elif isinstance(node.args[i], (ast.Name, ast.Constant, ast.BinOp)) and parameter not in FIXED:
            yield "argument moved", with_argument(node, i, "({}) + 1")


def call_changes(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = called(node).rpartition(".")[2]
    if is_barrier(node) and name == "wait":
        yield "phase flipped", with_argument(node, 1, "({}) ^ 1")
    if name == "index" and isinstance(node.func, ast.Attribute):
        yield "stage shifted", with_argument(node, 0, "({}) + 1", f"%s % {ast.unparse(node.func.value)}.shape[0]")
    if name == "warpgroup_mma_wait":
        yield "weaker wait for products", with_argument(node, 0, "{} + 1")
    if name == "store_wait":
        yield "weaker wait for stores", with_argument(node, 0, "{} + 1")
    if is_barrier(node) and name == "expect":
        for text in ("2 * ({})", "({}) // 2"):
            yield "bytes changed", with_argument(node, 1, text)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg == "count":
            for step in (1, -1):
                changed = copy.deepcopy(node)
                changed.keywords[i].value = parsed(f"{ast.unparse(keyword.value)} + {step}")
                yield "count changed", changed
        if keyword.arg in ("pred", "mask"):
            changed = copy.deepcopy(node)
            del changed.keywords[i]
            yield f"no {keyword.arg}", changed
    if is_barrier(node) and name == "arrive" and not any(keyword.arg == "count" for keyword in node.keywords):
        changed = copy.deepcopy(node)
        changed.keywords.append(ast.keyword("count", ast.Constant(2)))
        yield "count changed", changed
    for i, step in itertools.product(range(len(node.args)), ("({}) + 1", "({}) - 1")) if name == "range" else ():
        yield "bound moved", with_argument(node, i, step)
    for step in ("+ 1", "- 1") if name == "cdiv" else ():
        yield "bound moved", parsed(f"{ast.unparse(node)} {step}")


def with_argument(node: ast.Call, i: int, text: str, around: str = "%s") -> ast.Call:
    """A call whose i-th argument went through `text`."""
    node = copy.deepcopy(node)
    new = text.format(ast.unparse(node.args[i]))
    node.args[i] = parsed(around.replace("%s", f"({new})"))
    return node


def alike(names: set[str]) -> bool:
    """Calls whose order among each other changes nothing: to the same function, or arrivals at two barriers."""
    return names <= {"mbarrier.arrive", "release"} or (len(names) == 1 and names <= SETS)


def swaps(function: ast.FunctionDef, known: dict[str, list[str]]) -> Iterator[tuple[str, Path, list[ast.AST]]]:
    """Two neighbouring statements swapped, if the order of both matters to others."""
    for path, node in [((), function), *nodes(function, ())]:
        body = getattr(node, "body", None)
        for i, (first, second) in enumerate(itertools.pairwise(body)) if isinstance(body, list) else ():
            names = {called(first), called(second)}
            if all(synchronises(each) or called(each) in known for each in (first, second)) and not alike(names):
                yield "neighbours swapped", (*path, ("body", i)), [copy.deepcopy(second), copy.deepcopy(first)]
