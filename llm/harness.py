"""Runs tasks of EleutherAI's lm-evaluation-harness (Gao et al.), the extra `eval`, on a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from llm.errors import InputError, require
from llm.evaluate import Record, Request, Scorer, in_parts, windows
from llm.generate import generate
from llm.sampling import SamplingConfig

SAMPLING = {"temperature", "top_k", "top_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """The model as the harness sees it: as one process. Every call deals its requests over the ranks by itself.

    So a task may have fewer items than there are ranks, and requests that share a context stand in one batch.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer, self.ids, self.longest = scorer, scorer.trained.tokenizer, scorer.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.ids.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        return self.ids.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        for (_, text), _, tokens in requests:
            found = f"the continuation {text[:80]!r} has {len(tokens)} tokens"
            require(0 < len(tokens) <= self.longest, f"{found}; expected 1 to {self.longest}, the model's max_seq_len")
        fitted = [Request(context[-(self.longest + 1 - len(tokens)) :], tokens) for _, context, tokens in requests]
        scores = self.scorer.total(self.scorer.score(fitted, "log-likelihoods"))
        return [(likelihood, misses == 0) for likelihood, misses in scores.tolist()]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        cut = [[*windows(self.ids.encode(r.args[0]), self.ids.eod_id, self.longest, self.longest)] for r in requests]
        scores = self.scorer.total(self.scorer.score([*chain(*cut)], "rolling log-likelihoods"))
        return [part.sum().item() for part in scores[:, 0].split([len(requests) for requests in cut])]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.ids.encode(request.args[0]) or [self.ids.eod_id] for request in requests]
        options = [self.generation(**normalize_gen_kwargs(request.arguments[1])) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), -len(prompts[i])))
        alike = (in_parts(group, self.scorer.rows) for _, group in groupby(order, lambda i: repr(options[i])))
        found = torch.zeros(len(requests), self.longest, dtype=torch.long)  # each token's id + 1
        for batch in self.scorer.shown([*chain.from_iterable(alike)][self.scorer.mine], "generating"):
            for i, row in zip(batch, self.continued([prompts[i] for i in batch], *options[batch[0]]), strict=True):
                found[i, : len(row)] = torch.tensor(row) + 1
        texts = [self.ids.decode([token - 1 for token in row if token]) for row in self.scorer.total(found).tolist()]
        return [postprocess_generated_text(t, until, None) for t, (until, *_) in zip(texts, options, strict=True)]

    def generation(
        self, until: list[str], max_gen_toks: int, do_sample: bool, **sampling: Any
    ) -> tuple[list[str], int, SamplingConfig]:
        """The generation_kwargs of a task: texts that end a row, how many tokens at most, how they are drawn."""
        unknown = sorted(sampling.keys() - SAMPLING)
        require(not unknown, f"generation_kwargs {unknown} are unknown; expected some of {sorted(SAMPLING)}")
        found = f"max_gen_toks is {max_gen_toks} (256 where a task has none in its generation_kwargs)"
        require(0 < max_gen_toks < self.longest, f"{found}; expected 1 to {self.longest - 1}: below max_seq_len")
        return until, max_gen_toks, SamplingConfig(**{"temperature": float(do_sample), **sampling})

    def continued(
        self, prompts: list[list[int]], until: list[str], max_gen_toks: int, sampling: SamplingConfig
    ) -> list[list[int]]:
        """The tokens after each prompt, until every row has ended or holds a text of `until`."""
        rows, ended = [list[int]() for _ in prompts], [False] * len(prompts)
        cut = [prompt[max_gen_toks - self.longest :] for prompt in prompts]
        model, end = self.scorer.model, self.ids.eod_id
        banned = self.ids.unused(model.config.vocab_size)
        steps = generate(model, cut, max_new_tokens=max_gen_toks, end=end, sampling=sampling, banned=banned)
        for position, step in enumerate(steps, min(map(len, cut))):
            for i, token in enumerate(step):
                if token is None:
                    ended[i] = position >= len(cut[i])
                else:
                    rows[i].append(token)
                    text = self.ids.decode(rows[i])
                    ended[i] |= any(stop in text for stop in until if stop)
            if all(ended):
                break
        return rows


@contextmanager
def explained(names: Sequence[str]) -> Iterator[None]:
    """Turns what the harness raises for a task into an InputError."""
    try:
        yield
    except RuntimeError:  # of the device or the ranks, not of a task
        raise
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__} "
        found = f"{kind}{error} {error.__cause__ or ''}".strip()
        raise InputError(f"--tasks {','.join(names)}: {found}; check the YAML of the task and its data") from error


def check_answers(task: Task, limit: int | None) -> None:
    """Raise InputError for an item of a multiple-choice task whose answer is none of its choices."""
    if not isinstance(task, ConfigurableTask):
        return
    for number, item in task.doc_iterator(limit=limit):
        answer = task.doc_to_target(item)
        if task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results):
            answer, choices = task.doc_to_text(item) if task.multiple_input else answer, task.doc_to_choice(item)
            for one in answer if isinstance(answer, list) else [answer]:
                found = f"item {number}: the answer is {one!r}; expected one of {choices}, or its number from 0 on"
                require(one in choices or one in range(len(choices)), found)


def open_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> TaskManager:
    """Find the tasks and check their items, before the model is asked. Raises InputError for one that cannot be loaded.

    names: known to the harness, given by a YAML file in `folder`, or paths of YAML files. limit: items of each task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    require(folder is None or folder.is_dir(), f"--task-folder {folder} is not a folder")
    require(limit is None or limit >= 1, f"--limit is {limit}; expected at least 1")
    with explained(names):
        manager = TaskManager(include_path=[folder] if folder else None, include_defaults=False)
        if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
            manager = TaskManager(include_path=[folder] if folder else None)  # reads thousands of files
        for task in manager.load([*names])["tasks"].values():
            check_answers(task, limit)
    return manager


def run_tasks(
    scorer: Scorer, names: Sequence[str], manager: TaskManager, num_fewshot: int | None, limit: int | None
) -> dict[str, Record]:
    """The metrics of each task, as the harness names them: `acc,none` is accuracy without a filter.

    manager: what open_tasks gave for these names. Collective; rank 0 has the result. Raises InputError for a task that
    cannot be scored.
    """
    with explained(names):
        results: Any = simple_evaluate(
            HarnessModel(scorer), tasks=[*names], num_fewshot=num_fewshot, limit=limit, task_manager=manager,
            log_samples=False,
        )  # fmt: skip
    found = results["results"] if results else {}
    return {task: {k: v for k, v in record.items() if not isinstance(v, str)} for task, record in found.items()}
