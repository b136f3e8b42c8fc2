"""What a run may change when it goes on: nothing of the phases that have begun, everything of those that have not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from thread_ranks import ranks_in_threads

from llm.checkpoint.manifest import Piece
from llm.checkpoint.writer import step_of, write_checkpoint
from llm.config import OptimConfig, PhaseChange, RunConfig
from llm.config.parse import to_dict
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.data.corpora import Corpora, blends_of
from llm.data.samples.schedule import corpus_names
from llm.data.tokens.manifest import FileEntry
from llm.errors import InputError
from llm.slices import Slice
from llm.train.loop import train
from llm.train.resume import check_resumable, check_same_model, checkpoint_state, find_step, resume_report, saved_config
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from pool import RankPool
from test_train_start_data import made_run
from tiny_run import BASE

FIRST = PhaseChange(16, seq_len=8)
SECOND = PhaseChange(32, global_batch_size=4, blend={"b": 1.0})
THIRD = PhaseChange(40, seq_len=4)
PHASES = (FIRST, SECOND, THIRD)
DIGESTS = {"a": "1", "b": "2", "c": "3"}


def config(**data: Any) -> RunConfig:
    """8 samples of 16 tokens a step, of 8 tokens from step 2 on, 4 of them from step 4 on, of 4 tokens from step 6."""
    return replace(BASE, data=replace(BASE.data, **{"blend": {"a": 1.0, "c": 2.0}, "phases": PHASES, **data}))


@dataclass(frozen=True)
class Content:
    """A corpus of which only a digest is known."""

    digest: str
    manifest: Any = None

    def is_known_as(self, digest: str) -> bool:
        return digest == self.digest


def opened(config: RunConfig, digests: dict[str, str]) -> Corpora:
    manifest, names = SimpleNamespace(tokenizer_sha256="0"), corpus_names(blends_of(config))
    contents = {name: Content(digests[name]) for name in names}
    made: Any = (config, Path("a"), manifest, contents, {name: name for name in names})
    return Corpora(*made)


def saved(step: int, config: RunConfig) -> dict[str, Any]:
    return checkpoint_state(
        config, opened(config, DIGESTS).identity(), step, 5, {"optimizer_step": step, "loss_scale": None}, {}
    )


def resume(step: int, after: RunConfig, digests: dict[str, str] = DIGESTS, before: RunConfig | None = None) -> Corpora:
    return check_resumable(after, opened(after, digests), saved(step, before or config()))


def test_a_checkpoint_counts_samples_by_phase() -> None:
    assert [saved(step, config())["consumed_samples"] for step in range(8)] == [0, 8, 16, 24, 32, 36, 40, 44]
    state = saved(3, config())
    assert state["config"] == to_dict(config()) and state["skipped_samples"] == 5
    assert {name: known["digest"] for name, known in state["data"]["corpora"].items()} == DIGESTS


def test_nothing_changed() -> None:
    for step in (0, 2, 3, 8):
        resume(step, config())
    resume(3, config(blend={"c": 2.0, "a": 1.0}))  # the order of a mapping says nothing


# Other phases, and the steps after which they may still be asked for.
CHANGES = {
    "none": ((), 2),
    "another length": ((replace(FIRST, seq_len=4), SECOND, THIRD), 2),
    "a later first": ((replace(FIRST, samples=24), SECOND, THIRD), 2),
    "an earlier second": ((FIRST, replace(SECOND, samples=24), THIRD), 3),
    "the first alone": ((FIRST,), 4),
    "another blend": ((FIRST, replace(SECOND, blend={"a": 1.0}), THIRD), 4),
    "another batch": ((FIRST, replace(SECOND, global_batch_size=2), THIRD), 4),
    "no third": ((FIRST, SECOND), 6),
    "another third": ((FIRST, SECOND, replace(THIRD, seq_len=2)), 6),
    "a fourth": ((*PHASES, PhaseChange(44, seq_len=2)), 7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_phases_that_have_not_begun_may_change_and_others_not(name: str) -> None:
    phases, steps = CHANGES[name]
    resume(steps, config(phases=phases))
    with pytest.raises(InputError, match="was trained with"):
        resume(steps + 1, config(phases=phases))


def test_what_differs_is_said() -> None:
    with pytest.raises(InputError) as said:
        resume(5, config(phases=(FIRST, replace(SECOND, blend={"b": 1.0, "c": 1.0}))))
    assert "data.blend {'b': 1.0} from sample 32, the config has data.seq_len 8" in str(said.value)
    assert "data.blend {'b': 1.0, 'c': 1.0} from sample 32; restore it, or choose another --name" in str(said.value)
    with pytest.raises(InputError, match=r"the config has no such phase; restore it"):
        resume(5, config(phases=(FIRST,)))


def test_a_weight_and_a_batch_are_kept() -> None:
    with pytest.raises(InputError, match=r"'c': 2\.0} from sample 0, the config has .*'c': 3\.0} from sample 0"):
        resume(1, config(blend={"a": 1.0, "c": 3.0}))
    with pytest.raises(InputError, match=r"train\.global_batch_size 8, .* train\.global_batch_size 4,"):
        resume(1, replace(config(), train=replace(BASE.train, global_batch_size=4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(seq_len=12), "data.seq_len 16, the config has 12"),
        (dict(document_masks=True), "data.document_masks False, the config has True"),
        (dict(packing="best_fit", document_masks=True), "data.packing chunk, the config has best_fit"),
    ],
)
def test_samples_are_cut_as_before(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        resume(3, config(**change))
    with pytest.raises(InputError, match=r"seed 1234, the config has 5"):
        resume(3, replace(config(), seed=5))
    with pytest.raises(InputError, match=r"optim\.name adamw, the config has muon; restore it"):
        resume(3, replace(config(), optim=replace(config().optim, name="muon")))


def test_the_data_of_phases_that_have_begun_is_as_it_was() -> None:
    resume(4, config(), DIGESTS | {"b": "9"})
    for step, name in ((5, "b"), (4, "a"), (4, "c"), (5, "a")):
        with pytest.raises(InputError, match=f"what {name} holds is not what runs/run was trained on; restore"):
            resume(step, config(), DIGESTS | {name: "9"})


def test_the_packing_plans_of_phases_that_have_begun_are_data_too() -> None:
    packed = config(packing="best_fit", document_masks=True)

    def planned(**sha256: str) -> Corpora:
        files = {f"train.{T}.plan": FileEntry(1, sha256.get(f"T{T}", "0")) for T in (4, 8, 16)}
        corpora = opened(packed, DIGESTS)
        contents = {
            name: replace(each, manifest=SimpleNamespace(files=files)) for name, each in corpora.training.items()
        }  # pyright: ignore
        return replace(corpora, training=contents)

    state = checkpoint_state(packed, planned().identity(), 3, 0, {}, {})
    check_resumable(packed, planned(T4="1"), state)
    for changed in ("T16", "T8"):
        with pytest.raises(InputError, match=r"what a, c holds is not what runs/run was trained on"):
            check_resumable(packed, planned(**{changed: "1"}), state)


def test_another_tokenizer_is_other_data() -> None:
    state = saved(3, config())
    state["data"]["tokenizer"] = "1"
    with pytest.raises(InputError, match=r"what tokenizer\.json holds is not"):
        check_resumable(config(), opened(config(), DIGESTS), state)


def test_a_count_that_is_not_the_configs_is_refused() -> None:
    state = saved(3, config()) | {"consumed_samples": 25}
    with pytest.raises(InputError, match="has taken 25 samples in 3 steps, by the config they are 24"):
        check_resumable(config(), opened(config(), DIGESTS), state)
    with pytest.raises(InputError, match="has done 11 steps, beyond"):
        resume(11, config())


def test_another_model_is_named_field_by_field() -> None:
    saved, current = BASE.model, replace(BASE.model, n_layer=6, bias=False, max_seq_len=17)
    with pytest.raises(InputError) as caught:
        check_same_model(saved, current)
    assert str(caught.value).split("\n  ")[1:] == [
        "model.n_layer: the checkpoint has 2, the config has 6",
        "model.max_seq_len: the checkpoint has 16, the config has 17",
        "model.bias: the checkpoint has True, the config has False",
    ]
    with pytest.raises(InputError, match=r"model\.norm: the checkpoint has layernorm, the config has rmsnorm"):
        resume(3, replace(config(), model=replace(BASE.model, norm="rmsnorm")))


def test_a_model_is_the_same_by_what_it_computes() -> None:
    """What null stands for may be written out, and dropout does not say what a weight means."""
    check_same_model(replace(BASE.model, n_kv_head=None), replace(BASE.model, n_kv_head=4, d_ff=128, dropout=0.5))
    with pytest.raises(InputError, match=r"n_kv_head: the checkpoint has 4, the config has 2"):
        check_same_model(replace(BASE.model, n_kv_head=None), BASE.model)


def test_a_field_that_an_older_version_did_not_have_is_at_its_default() -> None:
    state = saved(3, config())
    del state["config"]["model"]["rope_theta"], state["config"]["optim"]["eps"]
    corpora = opened(config(), DIGESTS)
    check_resumable(config(), corpora, state)
    assert saved_config(state) == config()
    with pytest.raises(InputError, match=r"rope_theta: the checkpoint has 10000\.0, the config has 500\.0"):
        check_resumable(replace(config(), model=replace(BASE.model, rope_theta=500.0)), corpora, state)
    state["config"]["model"]["newer"] = 1
    with pytest.raises(InputError, match=r"config is not one of this version: unknown key 'model\.newer'"):
        check_resumable(config(), corpora, state)


def test_each_changed_field_is_listed() -> None:
    assert resume_report(config(), config(), 3) == "resumed from step 3 of 10"
    before = replace(config(), name="a", train=replace(BASE.train, init_from="runs/x"))
    after = replace(
        config(blend={"a": 2.0, "c": 2.0}),
        logging=LoggingConfig(tensorboard=False),
        deepspeed={"wall_clock_breakdown": True},
        train=replace(BASE.train, z_loss=0.5),
    )
    assert resume_report(before, after, 3).split("\n  ") == [
        "resumed from step 3 of 10; changed since:",
        "name 'a' -> 'run'",
        "data.blend {'a': 1.0, 'c': 2.0} -> {'a': 2.0, 'c': 2.0}",
        "train.z_loss 0.0 -> 0.5",
        "train.init_from 'runs/x' -> None",
        "logging.tensorboard True -> False",
        "deepspeed {} -> {'wall_clock_breakdown': True}",
    ]
    assert "train.init_from is not read" in resume_report(after, before, 3)


def scheduled(max_steps: int, **optim: Any) -> RunConfig:
    optim = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0} | optim
    return replace(BASE, optim=OptimConfig(**optim), train=replace(BASE.train, max_steps=max_steps))


@pytest.mark.parametrize(
    ("before", "after", "step", "rates"),
    [
        # Of cosine, (1 + cos(pi (step + 1) / max_steps)) / 2 of the way from min_lr to lr.
        (scheduled(100), scheduled(200), 99, ("0.0001", "0.00055")),
        (scheduled(100), scheduled(200), 149, ("0.0001", "0.000232")),
        (scheduled(100, min_lr=0.0), scheduled(200, min_lr=0.0), 99, ("0", "0.0005")),
        (scheduled(100), scheduled(100, lr=2e-3), 49, ("0.00055", "0.00105")),
        (scheduled(200), scheduled(100), 99, ("0.00055", "0.0001")),
        (scheduled(100), scheduled(104), 49, None),  # 0.000577 is 5 % more
        (scheduled(100), scheduled(200, schedule="wsd"), 0, None),
    ],
)
def test_a_rate_that_jumps_is_warned_about(
    before: RunConfig, after: RunConfig, step: int, rates: tuple[str, str] | None
) -> None:
    line = None if rates is None else f"learning rate of step {step + 1} was to be {rates[0]}, and now is {rates[1]}"
    report = resume_report(before, after, step)
    assert ("warning" in report) == (line is not None) and (line or "") in report
    assert "train.max_steps" in report or "optim.lr" in report


def put(root: Path, steps: list[int], resume_step: int | None = None) -> None:
    """Save checkpoints of these steps by a run with this checkpoint.resume_step."""
    made = replace(config(), checkpoint=CheckpointConfig(resume_step=resume_step))
    piece = Piece("norm.weight", "master", Slice.full((4,)), 0, torch.ones(4))
    with ranks_in_threads(1):
        for step in steps:
            write_checkpoint(root, step, [piece], saved(step, made), keep_last=9)


def found(root: Path, step: int | None) -> int:
    folder, _ = find_step(root, step)
    assert folder is not None
    return step_of(folder)


def spoil(root: Path, step: int) -> None:
    (root / f"step-{step:08d}/state.json").write_text("{}")


def test_the_step_that_is_asked_for_is_found(tmp_path: Path) -> None:
    assert find_step(tmp_path, None) == (None, [])
    put(tmp_path, [2, 4, 6])
    assert [found(tmp_path, step) for step in (None, 2, 4, 6)] == [6, 2, 4, 6]
    assert "those beyond step 2 are put aside; there are 2, 4, 6" in find_step(tmp_path, 2)[1][0]
    assert find_step(tmp_path, 6)[1] == []
    with pytest.raises(InputError, match=r"resume_step is 3; expected a step of a checkpoint in .*: 2, 4, 6$"):
        find_step(tmp_path, 3)
    with pytest.raises(InputError, match=r": none$"):
        find_step(tmp_path / "nothing", 3)


def test_a_damaged_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    put(tmp_path, [2, 4, 6])
    spoil(tmp_path, 4)
    with pytest.raises(InputError, match="step-00000004 cannot be used"):
        find_step(tmp_path, 4)
    assert found(tmp_path, None) == 6


def test_a_run_that_went_back_keeps_what_it_has_done_since(tmp_path: Path) -> None:
    """A crash loop: the same resume_step at every start."""
    put(tmp_path, [2, 4, 6])
    put(tmp_path, [3], resume_step=2)  # puts the later ones aside
    assert found(tmp_path, 2) == 3 and "before and now goes on; to go back again" in find_step(tmp_path, 2)[1][0]
    put(tmp_path, [5, 7], resume_step=2)
    assert [found(tmp_path, step) for step in (2, 3, 5)] == [7, 3, 5]
    spoil(tmp_path, 7)
    assert found(tmp_path, 2) == 5
    for step in (3, 5):  # nothing whole is left of what followed
        shard = tmp_path / f"step-{step:08d}/rank-00000-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert found(tmp_path, 2) == 2
    put(tmp_path, [3, 5], resume_step=2)
    shutil.rmtree(tmp_path / "step-00000002")  # as keep_last does in time
    assert found(tmp_path, 2) == 5
    put(tmp_path, [8])  # by a run that asked for nothing: 2 means 2 again
    with pytest.raises(InputError, match="is 2; expected"):
        find_step(tmp_path, 2)
    put(tmp_path, [2])
    put(tmp_path, [4], resume_step=2)
    put(tmp_path, [6], resume_step=4)  # back once more, to another step
    assert [found(tmp_path, step) for step in (2, 4)] == [2, 6]


def go(config: RunConfig, folder: Path) -> list[str]:
    """Start a run, as launch/pretrain.py does, and train it to its end; what was said."""
    os.chdir(folder)
    said: list[str] = []
    lock = RunFolder(RUNS, config.name).claim()
    run = start(config, torch.device("cpu"), said.append)
    if run is not None:
        train(run)
        run.engine.close()
    lock.release()
    return said


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_run_goes_back_and_a_copied_checkpoint_is_the_same_start(one_rank: RankPool, tmp_path: Path) -> None:
    """Run a goes back to step 2 with another rate; run b does so from a copy of that checkpoint, as its only one."""
    made = made_run(tmp_path)
    made = replace(made, name="a", train=replace(made.train, max_steps=6), logging=LoggingConfig(tensorboard=False))
    made = replace(made, checkpoint=CheckpointConfig(interval=2, keep_last=9))
    one_rank.run(go, made, tmp_path)
    first = losses(tmp_path, "a")
    checkpoints = Path("checkpoints/step-00000002")
    shutil.copytree(tmp_path / "runs/a" / checkpoints, tmp_path / "runs/b" / checkpoints)
    other = replace(made, optim=replace(made.optim, lr=0.1, min_lr=0.1))
    back = replace(other, checkpoint=replace(other.checkpoint, resume_step=2))
    (said,) = one_rank.run(go, back, tmp_path)
    assert said[-1].split("\n  ") == [
        "resumed from step 2 of 6; changed since:",
        "optim.lr 0.001 -> 0.1",
        "optim.min_lr 0.001 -> 0.1",
        "checkpoint.resume_step None -> 2",
        "warning: the learning rate of step 3 was to be 0.001, and now is 0.1",
    ]
    second = losses(tmp_path, "a")
    assert second[:3] == first[:3] and second[3:] != first[3:] and len(second) == 6
    names = sorted(path.name for path in (tmp_path / "runs/a/checkpoints").glob("step-*"))
    left = ["step-00000004.aside-1", "step-00000006.aside-1"]
    assert names == sorted(["step-00000002", "step-00000004", "step-00000006", *left])
    one_rank.run(go, back, tmp_path)  # the run is complete: it does not go back each time
    assert losses(tmp_path, "a") == second
    (said,) = one_rank.run(go, replace(other, name="b"), tmp_path)
    assert "name 'a' -> 'b'" in said[-1]
    assert losses(tmp_path, "b") == second[2:]
