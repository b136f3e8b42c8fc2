"""Megatron's layers against their torch twins on the whole weight: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llm.config import ParallelConfig
from llm.errors import CheckpointError, InputError
from llm.model.layers import IGNORED_TARGET
from llm.parallel import collectives
from llm.parallel.agreement import broadcast, exchange, together
from llm.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    TensorParallelLayers,
    VocabParallelEmbedding,
    VocabParallelHead,
    split,
)
from llm.parallel.mesh import Mesh
from llm.slices import slice_of
from pool import RankPool


def tensor_parallel(size: int) -> TensorParallel:
    return TensorParallel.of(Mesh.create(ParallelConfig(tensor_parallel=size), "cpu").tp_group)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def mlp_case(size: int) -> None:
    """down(gelu(up(x))): f and g appear once each, forward and backward."""
    tp = tensor_parallel(size)
    torch.manual_seed(0)
    x, w1, b1 = torch.randn(2, 5, 8).double(), torch.randn(16, 8).double(), torch.randn(16).double()
    w2, b2 = torch.randn(8, 16).double(), torch.randn(8).double()
    whole = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2)]
    expected = F.linear(F.gelu(F.linear(whole[0], whole[1], whole[2])), whole[3], whole[4])
    expected.square().sum().backward()

    up = ColumnParallelLinear(8, 16, bias=True, tp=tp).double()
    down = RowParallelLinear(16, 8, bias=True, tp=tp).double()
    assert up.bias is not None and down.bias is not None
    held = {up.weight: w1, up.bias: b1, down.weight: w2, down.bias: b2}
    with torch.no_grad():
        for parameter, value in held.items():
            parameter.copy_(parameter.slice.take(value))
    mine = x.clone().requires_grad_()
    y = down(F.gelu(up(mine)))
    y.square().sum().backward()
    close(y, expected)
    close(mine.grad, whole[0].grad)
    for parameter, reference in zip(held, whole[1:], strict=True):
        close(parameter.grad, parameter.slice.take(reference.grad))
    assert getattr(up.weight, "tensor_model_parallel", False)
    assert not getattr(down.bias, "tensor_model_parallel", False)


def sequence_case(size: int, per_row: bool) -> None:
    """x + row(gelu(column(norm(x)))) with x split by T: the sequence-parallel block in small, its every gradient.

    per_row: each row has positions of its own.
    """
    tp = replace(tensor_parallel(size), sequence_parallel=True)
    torch.manual_seed(0)
    B, T, C, O = 2, 8, 6, 12  # noqa: E741
    layers = TensorParallelLayers(tp, seed=0)
    up = layers.linear("up", C, O, bias=True).double()
    down = layers.linear("down", O, C, bias=True).double()
    norm, table = layers.norm("layernorm", C, bias=True, eps=1e-5).double(), layers.position_table(T, C).double()
    whole = {}
    for module in (norm, up, down, table):
        for parameter in module.parameters():
            value = torch.randn(slice_of(parameter).global_shape).double()
            whole[parameter] = value.requires_grad_()
            parameter.data = slice_of(parameter).take(value).detach().clone()
    x, direction = torch.randn(B, T, C).double(), torch.randn(B, T, C).double()
    mine = x.chunk(size, dim=1)[tp.rank].clone().requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]) if per_row else torch.arange(T)
    stream = mine + table(positions)
    y = stream + down(F.gelu(up(norm(stream))))
    (y * direction.chunk(size, dim=1)[tp.rank]).sum().backward()

    x.requires_grad_()
    w = [whole[p] for module in (norm, up, down, table) for p in module.parameters()]
    stream = x + w[6][positions]
    normed = F.layer_norm(stream, (C,), w[0], w[1])
    expected = stream + F.linear(F.gelu(F.linear(normed, w[2], w[3])), w[4], w[5])
    (expected * direction).sum().backward()
    torch.testing.assert_close(y, expected.chunk(size, dim=1)[tp.rank], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.grad, x.grad.chunk(size, dim=1)[tp.rank], atol=1e-5, rtol=1e-5)
    for parameter, reference in whole.items():
        held = slice_of(parameter).take(reference.grad)
        torch.testing.assert_close(parameter.grad, held, atol=1e-5, rtol=1e-5)


def test_sequence_parallel_block(two_ranks: RankPool, four_ranks: RankPool) -> None:
    for per_row in (False, True):
        two_ranks.run(sequence_case, 2, per_row)
        four_ranks.run(sequence_case, 4, per_row)


def frozen_case(sequence_parallel: bool) -> None:
    """Gradients that nobody asked for are not computed: a frozen weight, and an input without gradient."""
    tp = replace(tensor_parallel(2), sequence_parallel=sequence_parallel)
    up = ColumnParallelLinear(4, 6, bias=False, tp=tp)
    torch.nn.init.ones_(up.weight)
    x = torch.ones(1, 4, 4, requires_grad=True)
    up.weight.requires_grad_(False)
    up(x).sum().backward()
    assert up.weight.grad is None and x.grad is not None and float(x.grad[0, 0, 0]) == 6.0
    up.weight.requires_grad_(True)
    up(torch.ones(1, 4, 4)).sum().backward()
    assert up.weight.grad is not None and float(up.weight.grad[0, 0]) == (8.0 if sequence_parallel else 4.0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_frozen(sequence_parallel: bool, two_ranks: RankPool) -> None:
    two_ranks.run(frozen_case, sequence_parallel)


def test_mlp(two_ranks: RankPool, four_ranks: RankPool) -> None:
    two_ranks.run(mlp_case, 2)
    four_ranks.run(mlp_case, 4)


def vocabulary_case(size: int, V: int) -> None:
    """Embedding and head share a table of V rows, padded on the ranks; some targets are not counted."""
    tp = tensor_parallel(size)
    torch.manual_seed(0)
    table = torch.randn(V, 6).double()
    tokens, targets = torch.randint(0, V, (3, 7)), torch.randint(0, V, (3, 7))
    targets[1, :4] = IGNORED_TARGET
    whole = table.clone().requires_grad_()
    logits = F.linear(F.embedding(tokens, whole).tanh(), whole)
    expected = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        reduction="sum",
        ignore_index=IGNORED_TARGET,
    )
    expected.backward()

    embedding = VocabParallelEmbedding(V, 6, tp=tp)
    rows = -(-V // size)
    held = embedding.weight.slice
    embedding.weight = split(torch.zeros(rows, 6).double(), held)
    with torch.no_grad():
        embedding.weight[: held.stop - held.start].copy_(held.take(table))
    head = VocabParallelHead(embedding.weight, z_loss=0.0, tp=tp)
    x = embedding(tokens).tanh()
    loss = head(x, targets)
    loss.backward()
    grad = embedding.weight.grad
    assert grad is not None
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad[: held.stop - held.start], held.take(whole.grad), atol=1e-6, rtol=1e-5)
    assert not grad[held.stop - held.start :].any(), "padding rows must stay untouched"
    with torch.no_grad():
        gathered = head(x)
    assert gathered.shape == (3, 7, V)
    torch.testing.assert_close(gathered, logits.float().detach())


def test_vocabulary(two_ranks: RankPool, four_ranks: RankPool) -> None:
    two_ranks.run(vocabulary_case, 2, 10)
    two_ranks.run(vocabulary_case, 2, 11)
    four_ranks.run(vocabulary_case, 4, 10)
    four_ranks.run(vocabulary_case, 4, 5)  # the last rank holds padding alone


def extreme_logits_case() -> None:
    """exp would overflow without the maximum; a uniform row gives ln V."""
    tp = tensor_parallel(2)
    weight = split(torch.zeros(4, 1), tp.slice((8, 1), 0))
    head = VocabParallelHead(weight, z_loss=0.0, tp=tp)
    with torch.no_grad():
        weight.copy_(weight.slice.take(torch.tensor([[1000.0], *[[0.0]] * 7])))
    x = torch.tensor([[1.0], [1.0], [0.0]])
    losses = [float(head(x[i : i + 1], torch.tensor([t]))) for i, t in enumerate((0, 3, 5))]
    torch.testing.assert_close(losses, [0.0, 1000.0, 2.0794415])


def test_extreme_logits(two_ranks: RankPool) -> None:
    two_ranks.run(extreme_logits_case)


def traced_case() -> None:
    """The collectives can be traced: a function of them gives the same when torch.compile's front end captures it."""
    tp = tensor_parallel(2)
    x = torch.randn(2, 4, 3) + tp.rank

    def function(x: torch.Tensor) -> torch.Tensor:
        gathered = collectives.gather_sequence(x, 2, tp.name)
        return collectives.scatter_sequence(collectives.g(gathered, tp.name), 2, tp.name)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))


def test_collectives_can_be_traced(two_ranks: RankPool) -> None:
    two_ranks.run(traced_case)


def agreement_case() -> list[object]:
    rank = torch.distributed.get_rank()
    texts = exchange(None if rank == 0 else "é" * 3)

    def fail() -> None:
        if rank == 1:
            raise InputError("rank 1 cannot")

    try:
        together(fail)
        raised = None
    except InputError as error:
        raised = str(error)
    return [texts, raised, together(lambda: rank), broadcast(f"from {rank}")]


def test_agreement(two_ranks: RankPool) -> None:
    for rank, found in enumerate(two_ranks.run(agreement_case)):
        assert found == [[None, "ééé"], "rank 1 cannot", rank, "from 0"]


def group_agreement_case() -> list[object]:
    """Ranks 0 and 1 are one group, 2 and 3 the other; rank 3 fails."""
    rank, group = torch.distributed.get_rank(), Mesh.create(ParallelConfig(tensor_parallel=2), "cpu").tp_group

    def fail() -> None:
        if rank == 3:
            raise CheckpointError("rank 3 cannot")

    try:
        together(fail, group)
        raised = None
    except CheckpointError as error:
        raised = str(error)
    return [exchange(str(rank), group), raised, broadcast(f"from {rank}", group)]


def test_agreement_of_a_group(four_ranks: RankPool) -> None:
    first, second = [["0", "1"], None, "from 0"], [["2", "3"], "rank 3 cannot", "from 2"]
    assert four_ranks.run(group_agreement_case) == [first, first, second, second]


def mesh_case(tp: int) -> tuple[int, int, int, int]:
    mesh = Mesh.create(ParallelConfig(tensor_parallel=tp), "cpu")
    return mesh.dp_rank, mesh.tp_rank, mesh.dp_size, mesh.tp_size


def test_mesh(four_ranks: RankPool) -> None:
    """Tensor parallelism varies fastest."""
    assert four_ranks.run(mesh_case, 2) == [(0, 0, 2, 2), (0, 1, 2, 2), (1, 0, 2, 2), (1, 1, 2, 2)]
