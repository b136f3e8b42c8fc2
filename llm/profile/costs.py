"""Arithmetic and bytes of an operation, from the shapes of its inputs in a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

# Where the two factors stand among the inputs.
PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
    "aten::_addmm_activation": 1,
}  # fmt: skip
SIZES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned short": 2}
SIZES |= {"unsigned char": 1, "signed char": 1, "bool": 1, "TensorList": 4}
# They move nothing: views, and memory that is only given.
VIEWS = {
    "view", "_unsafe_view", "_reshape_alias", "reshape", "as_strided", "transpose", "t", "permute", "expand", "slice",
    "select", "narrow", "squeeze", "unsqueeze", "flatten", "unflatten", "split", "split_with_sizes", "chunk", "unbind",
    "detach", "alias", "movedim", "view_as", "expand_as", "empty", "empty_like", "empty_strided", "new_empty",
    "resize_", "resolve_conj", "resolve_neg", "to", "result_type", "promote_types", "item", "is_nonzero",
    "_local_scalar_dense", "record_stream", "lift_fresh",
}  # fmt: skip
# They write no tensor beside their inputs, or a small one.
NO_OUTPUT = {
    "copy_", "fill_", "zero_", "sum", "mean", "amax", "logsumexp", "linalg_vector_norm", "norm", "_foreach_norm",
}  # fmt: skip
# They read the chosen rows of a table, which are as many as the result.
LOOKUPS = {"embedding", "index_select", "gather", "index"}


def matmul_flops(name: str, dims: Sequence[Any]) -> float:
    """2 m k n of each product of [..., m, k] and [..., k, n]; 0 for all that is none."""
    at = PRODUCTS.get(name)
    return 0.0 if at is None or len(dims) < at + 2 else 2.0 * prod(dims[at]) * dims[at + 1][-1]


def fused_attention(name: str) -> float:
    """How many forward passes of attention an operator is: 2.5 for the backward, which computes the scores again."""
    if "attention" not in name or "::" not in name:
        return 0.0
    return 2.5 if "backward" in name.lower() else 1.0


def bytes_moved(name: str, dims: Sequence[Any], kinds: Sequence[str]) -> float:
    """Read and written: every input once, and a result that is a product's, or as large as the largest input.

    An estimate: caches may keep what is read, and a result's shape is not in a trace. name "": of the inputs alone.
    """
    short = name.rpartition("::")[2]
    if short in VIEWS:
        return 0.0
    sizes = [
        (prod(shape), SIZES.get(kind, 0))
        for shapes, kind in zip(dims, kinds, strict=False)
        for shape in shapes_of(shapes)
    ]
    inputs = [count * size for count, size in sizes]
    if not inputs:
        return 0.0
    if short in LOOKUPS and len(sizes) > 1 and len(dims[0]) > 1:
        return 2.0 * sizes[1][0] * dims[0][-1] * sizes[0][1]
    if products := matmul_flops(name, dims):
        at = PRODUCTS[name]
        return sum(inputs) + products / (2.0 * dims[at][-1]) * sizes[at][1]
    return float(sum(inputs)) + (0 if short in NO_OUTPUT or not name else max(inputs))


def shapes_of(dims: Any) -> Iterator[list[int]]:
    """The shapes of a tensor, or of a list of them; none of a number."""
    if dims and isinstance(dims[0], list):
        for inner in dims:
            yield from shapes_of(inner)
    elif isinstance(dims, list):
        yield dims
