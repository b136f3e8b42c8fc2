"""`verify`: what is compared, gathered, shrunk and reported."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llm.checkpoint.manifest import Piece
from llm.config import ModelConfig, RunConfig
from llm.errors import InputError
from llm.files import claim, write_json
from llm.model.layers import IGNORED_TARGET
from llm.parity import report as reports
from llm.parity.batches import counted_targets, micro_batches, target_count
from llm.parity.compare import Check, Scalar, distance, gradient_check, scalar_checks, state_check, worst
from llm.parity.layout import gather_state, global_shapes, shared_names
from llm.parity.oracle import oracle_config
from llm.parity.report import Report, group_of
from llm.slices import Slice
from matrix import verified
from pool import RankPool
from tiny_run import BASE, case

CPU = torch.device("cpu")

# What is compared.


def check(error: float, bound: float = 1.0, name: str = "norm.weight", quantity: str = "gradient") -> Check:
    return Check(quantity, name, 1, error, bound, 1.0)


def test_only_an_error_within_its_bound_passes() -> None:
    assert check(1.0).passed and not check(1.01).passed
    assert check(0.0, 0.0).passed and not check(1e-30, 0.0).passed
    assert not check(math.nan).passed and not check(1.0, math.nan).passed and not check(math.inf).passed
    assert not check(1.0, math.inf).passed


def test_nan_is_the_worst() -> None:
    assert worst([check(5.0), check(math.nan), check(0.5)]).share == math.inf
    assert worst([check(0.1), check(0.0, 0.0), check(0.2)]).error == 0.2
    assert worst([]) is None


def test_nan_and_other_shapes_are_far_away() -> None:
    nan = torch.tensor([1.0, math.nan])
    assert not gradient_check("a", 1, nan, torch.ones(2), torch.ones(2), 1.0).passed
    assert not state_check("master", "a", 1, nan, nan, same=False).passed
    assert distance(torch.ones(3, 1), torch.ones(3)) == math.inf


def test_bounds_of_gradients() -> None:
    exact = torch.full((100,), 0.1)  # of norm 1
    assert gradient_check("a", 1, exact * (1 + 0.9e-5), exact, exact, 0.0).passed
    assert not gradient_check("a", 1, exact * (1 + 1.1e-5), exact, exact, 0.0).passed
    assert gradient_check("a", 1, exact + 1e-6, exact, exact, 100.0).passed  # 1e-7 of all gradients
    low = exact * 1.01
    assert gradient_check("a", 1, exact * 0.961, low, exact, 0.0).passed
    assert not gradient_check("a", 1, exact * 0.959, low, exact, 0.0).passed


def test_bounds_of_states() -> None:
    weight = torch.full((100,), 0.1)
    assert state_check("master", "a", 1, weight * (1 + 0.8e-6), weight, same=False).passed
    assert not state_check("master", "a", 1, weight * (1 + 1.3e-6), weight, same=False).passed
    assert state_check("exp_avg", "a", 1, weight, weight, same=True).passed
    assert not state_check("exp_avg", "a", 1, weight * (1 + 2e-7), weight, same=True).passed


def test_bounds_of_scalars() -> None:
    """In bf16 the oracle's largest error of any step counts, for that of one step may be zero by luck."""
    exact = [Scalar("loss", step, 4.0 + error, 4.0, 4.0) for step, error in enumerate((3e-6, 5e-6))]
    assert [c.passed for c in scalar_checks(exact, "fp32", 100)] == [True, False]
    low = [Scalar("loss", 1, 4.03, 4.0, 4.0), Scalar("loss", 2, 4.05, 4.01, 4.0)]
    assert [c.passed for c in scalar_checks(low, "bf16", 10**9)] == [True, False]
    assert [c.passed for c in scalar_checks(low[:1], "bf16", 10**9)] == [False]
    assert [c.passed for c in scalar_checks(low[:1], "bf16", 4)] == [True]


# The batches.


def test_ranks_and_micro_batches_count_unequally() -> None:
    assert counted_targets(4, 8) == [8, 6, 4, 2]
    assert min(counted_targets(1000, 8)) == 1
    config = case(train=dict(global_batch_size=8, micro_batch_size=2))
    batches = micro_batches(config, 1, torch.device("cpu"))
    counts = [int((b.targets != IGNORED_TARGET).sum()) for b in batches]
    assert len(set(counts)) == len(counts) == 4 and sum(counts) == target_count(config)
    assert torch.cat([b.samples for b in batches]).tolist() == list(range(8, 16))


def test_every_target_may_count() -> None:
    batches = micro_batches(BASE, 1, torch.device("cpu"), ragged=False)
    counts = [int((b.targets != IGNORED_TARGET).sum()) for b in batches]
    assert sum(counts) == target_count(BASE, ragged=False) == sum(b.targets.numel() for b in batches)


def shares(config: RunConfig) -> list[torch.Tensor]:
    from llm.parallel.mesh import Mesh

    mesh = Mesh.create(config.parallel, "cpu")
    batches = micro_batches(config, 3, torch.device("cpu"), dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    return [torch.cat([getattr(b, field) for b in batches]) for field in ("tokens", "targets", "samples")]


def test_ranks_share_the_batch(two_ranks: RankPool) -> None:
    whole = micro_batches(BASE, 3, torch.device("cpu"))
    parts = two_ranks.run(shares, BASE)
    for i, field in enumerate(("tokens", "targets", "samples")):
        assert torch.equal(torch.cat([part[i] for part in parts]), torch.cat([getattr(b, field) for b in whole]))


def test_documents_begin_anywhere_and_in_every_split_alike() -> None:
    assert micro_batches(BASE, 3, torch.device("cpu"))[0].documents is None
    config = case(data=dict(document_masks=True))
    split = micro_batches(config, 3, torch.device("cpu"))
    (whole,) = micro_batches(case(data=dict(document_masks=True), train=dict(micro_batch_size=8)), 3, CPU)
    for batch in (whole, *split):
        assert batch.documents is not None
        position_ids, bounds = batch.documents.position_ids, batch.documents.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == position_ids.numel() and sorted(set(bounds)) == bounds
        expected = [i for start, stop in pairwise(bounds) for i in range(stop - start)]
        assert position_ids.flatten().tolist() == expected
        assert bool((position_ids[:, 0] == 0).all()) and len(bounds) > 2 * len(position_ids)
    assert torch.equal(torch.cat([batch.documents.position_ids for batch in split]), whole.documents.position_ids)
    assert torch.equal(whole.tokens, torch.cat([b.tokens for b in micro_batches(BASE, 3, CPU)]))


# What is gathered.

SHAPES = {"a": (4, 2), "b": (3,)}


def gathered(fault: str) -> tuple[Any, list[str]]:
    """Rank 0 holds the first rows of a and all of b, rank 1 the last rows of a."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = Slice((4, 2), 0, 2 * rank, 2 * rank + 2)
    pieces = [
        Piece("a", "master", rows, 0, torch.full((1,), rank + 1.0)),
        Piece("a", "master", rows, 1, torch.full((3,), rank + 10.0)),
    ]
    if rank == 0:
        pieces.append(Piece("b", "master", Slice.full((3,)), 0, torch.tensor([1e-30, -2.0, 3e30])))
    elif fault == "missing":
        pieces.pop()
    elif fault == "twice":
        pieces.append(pieces[0])
    elif fault == "shape":
        pieces.append(Piece("b", "master", Slice.full((4,)), 0, torch.ones(4)))
    elif fault == "range":
        pieces.append(Piece("a", "master", rows, 3, torch.ones(2)))
    elif fault == "name":
        pieces.append(Piece("c", "master", rows, 0, torch.ones(4)))
    state, problems = gather_state(pieces, SHAPES, {})
    return {key: value.tolist() for key, value in state.items()}, problems


def test_every_element_is_gathered_to_rank_0(two_ranks: RankPool) -> None:
    (state, problems), (nothing, _) = two_ranks.run(gathered, "none")
    assert problems == [] and nothing == {}
    assert state["a", "master"] == [[1, 10], [10, 10], [2, 11], [11, 11]]
    assert state["b", "master"] == torch.tensor([1e-30, -2.0, 3e30]).tolist()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "a (master): 3 of 8 elements are in no rank's state"),
        ("twice", "a (master): 1 of 8 elements are in more than one piece"),
        ("shape", "b (master): a piece of a tensor of shape (4,); expected (3,)"),
        ("range", "a (master): a piece of elements 3 to 5 of a slice of 4"),
        ("name", "c (master): a piece that was not expected"),
    ],
)
def test_pieces_that_do_not_fit_are_named_on_every_rank(fault: str, said: str, two_ranks: RankPool) -> None:
    assert [problems for _, problems in two_ranks.run(gathered, fault)] == [[said], [said]]


def names_here(names: list[list[str]]) -> tuple[list[str], list[str]]:
    import torch.distributed as dist

    return shared_names(names[dist.get_rank()], ["a", "b"])


def test_names_that_one_side_lacks(two_ranks: RankPool) -> None:
    assert two_ranks.run(names_here, [["b", "a"], ["a", "b"]]) == [(["a", "b"], [])] * 2
    for names, problems in two_ranks.run(names_here, [["a", "b"], ["a", "c"]]):
        assert names == ["a"]
        assert problems == [
            "b: the oracle has this parameter, the layout does not",
            "c: the layout has this parameter, the oracle does not",
        ]


# The report.


@pytest.fixture(scope="module")
def passing(two_ranks: RankPool) -> Report:
    config = case(parallel=dict(tensor_parallel=2), model=dict(position="learned", tie_embeddings=False))
    return two_ranks.run(verified, config)[0]


def test_a_layout_passes(passing: Report) -> None:
    assert passing.passed and passing.failures == []
    names = set(global_shapes(passing.config))
    for quantity, steps in (("gradient", {1, 2}), ("weight", {0, 1, 2}), ("exp_avg", {1, 2}), ("exp_avg_sq", {1, 2})):
        assert {(c.name, c.step) for c in passing.of(quantity)} == {(n, s) for n in names for s in steps}
    assert len(passing.of("loss")) == 2 and len(passing.of("validation loss")) == 1


def test_the_oracle_knows_no_layout() -> None:
    config = case(
        parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=3),
        train=dict(activation_checkpointing="full", checkpoint_every=2, precision="bf16", z_loss=1e-4),
    )
    oracle = oracle_config(config, exact=True)
    train = replace(config.train, engine="plain", precision="fp32", activation_checkpointing="none", checkpoint_every=1)
    assert oracle == replace(case(train={}), train=train, parallel=oracle.parallel)
    assert oracle.parallel.tensor_parallel == 1 and not oracle.parallel.sequence_parallel


def text_of(report: Report) -> str:
    terminal = Console(file=io.StringIO(), width=160)
    reports.show(report, terminal)
    return terminal.file.getvalue()


def test_the_table_has_a_row_for_each_group(passing: Report) -> None:
    text = text_of(passing)
    groups = [group for group in reports.GROUPS if group not in ("input", "recurrent")]  # which are an LSTM's
    for row in (*groups, "loss", "gradient norm", "validation loss", "names, pieces, replicas"):
        assert any(line.strip("│ ").startswith(row) and "pass" in line for line in text.splitlines()), row
    layout, oracle, *_ = " ".join(text.splitlines()).split(" compared with ")
    assert layout.startswith("verify: ") and "tensor_parallel 2" in layout and "zero_stage 0" in layout
    assert "in one process, of the same code: a fault that both share does not show" in oracle
    assert text.endswith("PASS\n")


def test_the_table_names_what_failed(passing: Report) -> None:
    bad = check(math.nan, name="blocks.1.up.bias")
    failed = replace(passing, checks=(*passing.checks, bad), problems=("a (exp_avg): gone",), passed=False)
    text = text_of(failed)
    assert text.endswith("FAIL\n")
    assert "blocks.1.up.bias gradient, step 1: error nan" in text and "a (exp_avg): gone" in text
    rows = {line.strip("│ ").split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    assert "fail" in rows["up"] and "blocks.1.up.bias gradient" in rows["up"]
    assert "fail" in rows["names, pieces, replicas"] and "pass" in rows["down"]


def test_the_json_has_every_parameter(passing: Report, tmp_path: Path) -> None:
    bad = check(math.nan, name="norm.weight")
    failed = replace(passing, checks=(*passing.checks, bad), passed=False)
    write_json(tmp_path / "verify.json", reports.to_json(failed))
    found = json.loads((tmp_path / "verify.json").read_text(), parse_constant=pytest.fail)
    assert found.keys() == {
        "passed", "compared_with", "layout", "steps", "model", "requested_model", "scalars", "groups", "parameters",
        "problems", "failures",
    }  # fmt: skip
    assert found["passed"] is False and found["requested_model"] is None
    assert set(found["parameters"]) == set(global_shapes(passing.config))
    for numbers in found["parameters"].values():
        assert set(numbers) == set(reports.TENSORS)
    assert found["parameters"]["norm.weight"]["gradient"]["error"] == "nan"
    assert found["parameters"]["norm.weight"]["gradient"]["passed"] is False
    assert found["groups"]["up"]["weight"].keys() == {
        "parameter", "step", "error", "bound", "expected", "relative", "share", "passed",
    }  # fmt: skip
    assert set(found["scalars"]) == {"loss", "gradient norm", "validation loss"}


def test_every_parameter_has_a_row() -> None:
    models = ModelConfig(tie_embeddings=False), ModelConfig(family="lstm", n_layer=1)
    names = [name for model in models for name in global_shapes(replace(BASE, model=model, data=BASE.data))]
    assert {group_of(name) for name in names} == {*reports.GROUPS}


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "x.json")
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="choose another path"):
            claim(path)


def test_the_report_says_what_was_shrunk(passing: Report) -> None:
    text = text_of(replace(passing, requested=replace(passing.config.model, n_layer=96)))
    assert "too large for one process; a shrunk one was verified: n_layer 96 -> 2" in text.replace("\n", " ")
