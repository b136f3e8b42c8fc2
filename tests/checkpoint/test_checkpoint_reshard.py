"""Any layout saves the same state under the same names, and any other goes on from it."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import state_of
from thread_ranks import ranks_in_threads

from chosen import slow_but
from llm.checkpoint.manifest import KINDS, Piece
from llm.checkpoint.reader import open_checkpoint
from llm.checkpoint.writer import write_checkpoint
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.build import build_engine, build_model
from llm.train.engines.base import Engine
from llm.train.engines.plain import PlainEngine
from pool import RankPool
from test_train_restart import save, steps
from tiny_run import batches, case, plain

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
ENGINES = {f"zero{stage}": dict(engine="deepspeed", zero_stage=stage) for stage in range(4)}
ENGINES["fsdp"] = dict(engine="fsdp", zero_stage=3)
# Tensor- times data-parallel ranks: a pool has at most four.
DEGREES = [(tp, dp) for tp, dp in product((1, 2), (1, 2, 4)) if tp * dp <= 4]
LAYOUTS = {f"{engine}-tp{tp}-dp{dp}": (engine, tp, dp) for engine in ENGINES for tp, dp in DEGREES}
BEFORE, AFTER = 3, 10  # steps of a run before it is saved, and those that it then makes
Ranks = Callable[[str], RankPool]


def config_of(layout: str) -> RunConfig:
    """51 is odd: under TP 2 the vocabulary has a row of padding, which no checkpoint may hold."""
    engine, tp, _ = LAYOUTS[layout]
    spread = ENGINES[engine]
    return case(
        model=dict(vocab_size=51),
        parallel=dict(zero_stage=spread["zero_stage"], tensor_parallel=tp),
        train=dict(engine=spread["engine"]),
    )


def drawn_pairs() -> list[tuple[str, str]]:
    """Fifteen times one layout and then another, five times one and the same."""
    draw, names = random.Random(15), list(LAYOUTS)
    return draw.sample(list(permutations(names, 2)), 15) + [(name, name) for name in draw.sample(names, 5)]


PAIRS = drawn_pairs()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """The pool that a layout fits."""

    def pool_of(layout: str) -> RankPool:
        _, tp, dp = LAYOUTS[layout]
        return request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[tp * dp])

    return pool_of


def opened(config: RunConfig, root: Path, step: int) -> tuple[Engine, Mesh]:
    """An engine of this layout with the state of a checkpoint. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    reader = open_checkpoint(root / f"step-{step:08}")
    scalars = reader.state["engine"]
    engine.load_scalar_state(scalars)
    engine.load_pieces(reader, scalars["optimizer_step"])
    return engine, mesh


def tensors(root: Path, step: int) -> dict[tuple[str, str], Any]:
    reader = open_checkpoint(root / f"step-{step:08}")
    return {key: reader.read(*key).numpy() for key in reader.manifest.tensors}


# -- The one state --


def canonical_pieces(config: RunConfig) -> list[Piece]:
    """Weights and moments of every parameter, drawn by name, each whole."""
    pieces = []
    for number, (name, parameter) in enumerate(build_model(config, None).named_parameters()):
        whole = Slice.full(tuple(parameter.shape))
        for index, kind in enumerate(KINDS):
            drawn = torch.randn(whole.numel, generator=torch.Generator().manual_seed(3 * number + index)) * 0.02
            pieces.append(Piece(name, kind, whole, 0, drawn.square() if kind == "exp_avg_sq" else drawn))
    return pieces


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no engine has written."""
    root = tmp_path_factory.mktemp("canonical")
    state = state_of(BEFORE, engine={"optimizer_step": 7, "loss_scale": None})
    with ranks_in_threads(1):
        write_checkpoint(root, BEFORE, canonical_pieces(config_of("zero0-tp1-dp1")), state, keep_last=1)
    return root


def read_and_saved(config: RunConfig, root: Path, other: Path) -> tuple[float, int]:
    """Read the state under this layout and save it under `other`; its mean loss, and Adam's step. Collective."""
    engine, mesh = opened(config, root, BEFORE)
    save(engine, mesh, other, BEFORE)
    total, count = engine.evaluate(batches(config, 0, mesh.dp_rank, mesh.dp_size, False))
    step = engine.scalar_state()["optimizer_step"]
    engine.close()
    return total / count, step


def expected_loss(root: Path) -> float:
    """Of that state by the plain engine in this process."""
    config = plain(config_of("zero0-tp1-dp1"))
    reader = open_checkpoint(root / f"step-{BEFORE:08}")
    engine = PlainEngine(config, build_model(config, None), None, CPU)
    engine.load_pieces(reader, 0)
    total, count = engine.evaluate(batches(config, 0, 0, 1, False))
    return total / count


@pytest.mark.row(25)
@pytest.mark.parametrize("layout", slow_but([], LAYOUTS))
def test_each_layout_reads_and_saves_the_one_state(layout: str, canonical: Path, ranks: Ranks, tmp_path: Path) -> None:
    results = ranks(layout).run(read_and_saved, config_of(layout), canonical, tmp_path)
    assert [step for _, step in results] == [7] * len(results)
    assert results[0][0] == pytest.approx(expected_loss(canonical), rel=1e-5), "read back to front and saved so again"
    before, after = tensors(canonical, BEFORE), tensors(tmp_path, BEFORE)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert np.array_equal(value, after[key]), key


# -- Pairs --


def undisturbed(config: RunConfig, root: Path) -> list[float]:
    """Train, save, and train on: the losses after the save. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    steps(engine, config, mesh, 0, BEFORE)
    save(engine, mesh, root, BEFORE)
    losses = steps(engine, config, mesh, BEFORE, AFTER)
    engine.close()
    return losses


def resumed(config: RunConfig, root: Path) -> list[float]:
    """The losses of as many steps from that checkpoint on. Collective."""
    engine, mesh = opened(config, root, BEFORE)
    losses = steps(engine, config, mesh, BEFORE, AFTER)
    engine.close()
    return losses


@pytest.mark.slow
@pytest.mark.row(25)
@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_a_pair_of_layouts_trains_on(pair: tuple[str, str], ranks: Ranks, tmp_path: Path) -> None:
    first, second = pair
    whole = ranks(first).run(undisturbed, config_of(first), tmp_path)
    found = ranks(second).run(resumed, config_of(second), tmp_path)
    if first == second:
        assert found == whole
    else:
        np.testing.assert_allclose(found[0], whole[0], rtol=1e-5)
