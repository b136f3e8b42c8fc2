"""Recognises the corpora of a checkpoint among those of a config: by their contents, whatever they are called now."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from llm.config import RunConfig
from llm.data.corpora import Corpora, Known, blends_of
from llm.data.samples.schedule import corpus_names
from llm.data.tokens.manifest import plan_name
from llm.typed import read


def known_corpora(saved: RunConfig, data: dict[str, Any]) -> dict[str, Known]:
    """The corpora of a checkpoint by their first names. saved: its config; data: what Corpora.identity() was then."""
    if isinstance(data.get("corpora"), dict):
        return read(dict[str, Known], data["corpora"], "data.corpora")
    found = {}  # 0.1.0 kept digests alone, by name (`train`: data.path) or `<name> <packing plan>`
    for name in corpus_names(blends_of(saved)):
        key = name if name in data else "train"
        plans = {plan_name("train", phase.seq_len) for phase in saved.phases}
        known = {plan: data[f"{key} {plan}"] for plan in plans if f"{key} {plan}" in data}
        found[name] = Known(name, str(data.get(key)), known)
    return found


def in_saved_order(corpora: Corpora, saved: RunConfig, known: dict[str, Known]) -> Corpora:
    """`corpora` with the first names, and so the numbers, that the same contents have in the checkpoint.

    Of several that hold the same, each gets that of one with the same weights in as many of the first phases as can be.
    What the checkpoint does not know keeps its name, made longer if that is a first name. saved, known: as above.
    """
    left, first_names = dict(known), dict[str, str]()
    now, then = blends_of(corpora.config), blends_of(saved)
    for phases in range(len(now), -1, -1):
        for name in (name for name in corpora.training if name not in first_names):
            weights, is_known_as = [blend.get(name) for blend in now[:phases]], corpora.training[name].is_known_as
            for first_name, old in left.items():
                if is_known_as(old.digest) and weights == [blend.get(old.name) for blend in then[:phases]]:
                    first_names[name] = first_name
                    del left[first_name]
                    break
    called = {old.name: first_name for first_name, old in left.items()}
    first_names |= {name: called[name] for name in corpora.training if name in called and name not in first_names}
    for name in (name for name in corpora.training if name not in first_names):
        longer = (name + "'" * i for i in itertools.count())
        first_names[name] = next(free for free in longer if free not in first_names.values())
    renamed = replace(corpora, first_names=first_names)
    return replace(renamed, training={name: corpora.training[name] for name in corpus_names(renamed.blends)})
