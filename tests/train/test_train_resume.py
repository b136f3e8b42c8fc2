"""What a run may change when it goes on: nothing of the phases that have begun, everything of those that have not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm.config import PhaseChange, RunConfig
from llm.config.parse import to_dict
from llm.data.corpora import Corpora, blends_of
from llm.data.samples.schedule import corpus_names
from llm.data.tokens.manifest import FileEntry
from llm.errors import InputError
from llm.train.resume import check_resumable, check_same_model, checkpoint_state
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
    return checkpoint_state(config, opened(config, DIGESTS), step, 5, {})


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

    state = checkpoint_state(packed, planned(), 3, 0, {})
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
    saved = {"n_layer": 4, "norm": "layernorm", "bias": True, "old": 1}
    current = {"n_layer": 6, "norm": "layernorm", "bias": False, "sizes": (1, 2)}
    with pytest.raises(InputError) as caught:
        check_same_model(saved, current)
    lines = str(caught.value).split("\n  ")[1:]
    assert lines == [
        "model.n_layer: the checkpoint has 4, the config has 6",
        "model.bias: the checkpoint has True, the config has False",
        "model.sizes: the checkpoint has no such field, the config has [1, 2]",
        "model.old: the checkpoint has 1, the config has no such field",
    ]
    check_same_model({"sizes": [1, 2]}, {"sizes": (1, 2)})
