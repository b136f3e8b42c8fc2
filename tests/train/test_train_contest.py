"""Which forms are compared, how they take turns, and which one wins: without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm.config import PhaseChange, RunConfig
from llm.config.sections import SparseAttention
from llm.train import contest
from llm.train.contest import FORMS, MARGIN, SECONDS, candidates, fastest, measure, medians, operation
from tiny_run import case

CPU = torch.device("cpu")
GPT2 = dict(norm="layernorm", activation="gelu", position="learned")
LLAMA = dict(norm="rmsnorm", activation="swiglu", position="rope")


def bf16(**sections: Any) -> RunConfig:
    train = dict(precision="bf16", engine="deepspeed" if "parallel" in sections else "plain")
    return case(**{**sections, "train": train | sections.get("train", {})})


def candidates_of(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """On a GPU that is not Hopper."""
    return candidates(config, CPU)


class Clock:
    """A clock that a turn sets forward by what its thunk is said to take."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.now, self.turns, self.seconds = 0.0, list[str](), {name: iter(each) for name, each in seconds.items()}

    def turn(self, thunk: Callable[[], object]) -> float:
        name = str(thunk())
        self.turns.append(name)
        seconds = next(self.seconds[name])
        self.now += seconds
        return 1e3 * seconds

    def medians(self) -> dict[str, float]:
        return medians({name: (lambda name=name: name) for name in self.seconds}, self.turn, lambda: self.now)


def test_forms_take_turns_and_one_slow_call_counts_for_little() -> None:
    clock = Clock({"a": [0.001] * 4 + [0.1] + [0.001] * 95, "b": [0.002] * 100})
    assert clock.medians() == {"a": pytest.approx(1.0), "b": pytest.approx(2.0)}
    assert clock.turns == ["a", "b"] * (len(clock.turns) // 2)
    assert SECONDS <= clock.now < SECONDS + 0.003


def test_a_slow_operation_has_fewer_rounds_but_one() -> None:
    clock = Clock({"a": [SECONDS / 4] * 10, "b": [SECONDS / 4] * 10})
    clock.medians()
    assert clock.turns == ["a", "b"] * 2
    clock = Clock({"a": [9.0], "b": [8.0]})
    assert clock.medians() == {"a": 9000.0, "b": 8000.0}


def test_the_preferred_form_wins_unless_another_is_faster_by_more_than_the_margin() -> None:
    near, far = 1 / (1 + 0.9 * MARGIN), 1 / (1 + 1.1 * MARGIN)
    for op, (first, second, *_) in FORMS.items():
        assert fastest({op: {second: near, first: 1.0}}) == {op: first}
        assert fastest({op: {second: far, first: 1.0}}) == {op: second}
        assert fastest({op: {second: 1.0, first: 1.0}}) == {op: first}
        assert fastest({op: {second: 5.0}}) == {op: second}
    assert fastest({}) == {}


def test_only_deterministic_forms_are_compared_unless_others_are_allowed() -> None:
    assert candidates_of(bf16())["attention"] == ("triton", "flash")
    assert candidates_of(bf16(train=dict(deterministic=False)))["attention"] == ("triton", "atomic", "flash", "cudnn")
    assert "attention" not in candidates_of(case())  # fp32: PyTorch has neither backend
    assert candidates_of(case(train=dict(deterministic=False)))["attention"] == ("triton", "atomic")


SPARSE = SparseAttention(64, 1, 2)


@pytest.mark.parametrize(
    "sections",
    [
        dict(model=dict(attention_window=(4, None))),
        dict(model=dict(attention_softcap=5.0)),
        dict(model=dict(attention_sparse=(None, SPARSE))),
        dict(model=dict(dropout=0.1)),
        dict(data=dict(document_masks=True)),
    ],
    ids=["window", "softcap", "sparse", "dropout", "documents"],
)
def test_the_stock_operator_is_left_out_where_it_would_need_a_mask(sections: dict[str, Any]) -> None:
    assert "attention" not in candidates_of(bf16(**sections))
    loose = candidates_of(bf16(**sections, train=dict(deterministic=False)))
    assert loose["attention"] == ("triton", "atomic")


def test_a_window_that_hides_nothing_is_none() -> None:
    assert candidates_of(bf16(model=dict(attention_window=16)))["attention"] == ("triton", "flash")
    longer = dict(phases=(PhaseChange(samples=8, seq_len=32),))
    assert "attention" not in candidates_of(bf16(model=dict(attention_window=16, max_seq_len=32), data=longer))


def test_gluon_is_compared_on_hopper_where_its_options_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(capability: tuple[int, int], **sections: Any) -> tuple[str, ...]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        sections["model"] = dict(d_model=256, n_head=4) | sections.get("model", {})
        return candidates(bf16(**sections), torch.device("cuda")).get("attention", ())

    assert on((9, 0)) == ("triton", "gluon", "flash") and on((8, 0)) == on((10, 0)) == ("triton", "flash")
    assert on((9, 0), train=dict(deterministic=False)) == ("triton", "atomic", "gluon", "flash", "cudnn")
    assert (
        on((9, 0), model=dict(attention_window=4)) == on((9, 0), data=dict(document_masks=True)) == ("triton", "gluon")
    )
    for options in (dict(attention_softcap=5.0), dict(attention_sparse=SPARSE), dict(dropout=0.1)):
        assert on((9, 0), model=options) == ()
    assert on((9, 0), train=dict(precision="fp32")) == () and "gluon" not in on((9, 0), model=dict(n_head=8))
    assert on((9, 0), model=dict(d_model=512)) == ("triton", "gluon", "flash")  # D = 128


def test_what_the_run_does_not_have_is_not_timed() -> None:
    assert [*candidates_of(bf16(model=GPT2))] == ["attention", "norm", "activation", "loss", "adamw"]
    assert [*candidates_of(bf16(model=LLAMA))] == ["attention", "rope", "norm", "activation", "loss", "adamw"]
    assert [*candidates_of(bf16(model=GPT2 | dict(dropout=0.1)))] == ["activation", "loss", "adamw"]
    offloaded = bf16(model=GPT2, parallel=dict(zero_stage=2, offload="optimizer"))
    assert "adamw" not in candidates_of(offloaded)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(("zero_stage", "tp", "dp"), [(1, 1, 1), (2, 2, 3)])
def test_every_operation_can_be_called_in_the_shapes_of_a_run(
    model: dict[str, Any], zero_stage: int, tp: int, dp: int
) -> None:
    config = bf16(model=model, parallel=dict(zero_stage=zero_stage, tensor_parallel=tp))
    for op in candidates_of(config):
        make = operation(op, config, tp, dp, CPU)
        for form in ("torch", "torch" if op == "adamw" else "reference"):
            thunk = make(form)
            thunk()
            thunk()


def test_trial_tensors_leave_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for op in FORMS:
        operation(op, bf16(), 1, 1, CPU)("torch")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `measure` run here, with Triton's interpreter: a turn takes 1 ms, and there is no GPU to wait for."""
    monkeypatch.setattr(contest, "on_gpu", lambda thunk: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.mark.usefixtures("on_a_cpu")
def test_every_candidate_is_timed_and_one_that_fails_is_left_out_and_said() -> None:
    config = bf16(model=LLAMA, train=dict(deterministic=False))
    ms, failures = measure(config, 1, 1, CPU)
    timed = {op: dict.fromkeys(forms, 1.0) for op, forms in candidates_of(config).items()}
    del timed["attention"]["cudnn"]  # which no CPU has
    assert ms == timed
    assert len(failures) == 1 and failures[0].startswith("attention by cudnn failed: RuntimeError: ")


@pytest.mark.usefixtures("on_a_cpu")
def test_an_operation_without_a_form_that_runs_stays_with_the_rules_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **options: object) -> None:
        torch.use_deterministic_algorithms(True)  # as flash does for its backward pass
        raise ValueError(f"{options['impl']} is\nnot here")

    monkeypatch.setattr(contest, "FORMS", {"rope": ("triton", "torch")})
    monkeypatch.setattr(contest, "rope_qkv", fail)
    ms, failures = measure(bf16(), 1, 1, CPU)
    assert ms == {} and fastest(ms) == {}
    assert failures == [f"rope by {form} failed: ValueError: {form} is" for form in ("triton", "torch")]
    assert not torch.are_deterministic_algorithms_enabled()
