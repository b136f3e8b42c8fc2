"""`token_batches`, the loader for a loop of one's own: the samples of a run, as tensors that are the caller's."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from conftest import MakeData

from llm.data.corpora import Corpora
from llm.data.loader import open_loader, token_batches, validation_batches
from llm.errors import InputError


def test_training_samples_are_those_of_a_run_on_any_number_of_ranks(make_data: MakeData) -> None:
    config = make_data(global_batch=4, micro_batch=2)
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1)
    expected = [torch.cat([batch.tokens.long() for batch in loader.next_step().batches]) for _ in range(60)]  # 2 epochs
    ranks = []
    for rank in range(2):
        options = {"batch_size": 2, "seq_len": 10, "seed": config.seed, "dp_rank": rank, "dp_size": 2}
        first = list(islice(token_batches(str(config.data.path), **options), 20))  # kept: each has memory of its own
        ranks.append([*first, *islice(token_batches(str(config.data.path), **options, consumed=20 * 4), 40)])
    for whole, *parts in zip(expected, *ranks, strict=True):
        for place, columns in ((0, slice(None, -1)), (1, slice(1, None))):
            assert torch.equal(torch.cat([part[place] for part in parts]), whole[:, columns])
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for pair in ranks[0] for tensor in pair)


def test_each_validation_sample_comes_once(make_data: MakeData) -> None:
    config = make_data(n_validation=75, micro_batch=3)  # 7 samples
    batches = validation_batches(Corpora.open(config), dp_rank=0, dp_size=1)
    expected = torch.cat([batch.tokens[:rows].long() for batch, rows in batches])
    options = {"batch_size": 2, "seq_len": 10, "split": "validation", "dp_size": 2}
    ranks = [list(token_batches(str(config.data.path), **options, dp_rank=rank)) for rank in range(2)]
    assert [[len(inputs) for inputs, _ in rank] for rank in ranks] == [[2, 2], [2, 1]]
    found = torch.cat([inputs for step in zip(*ranks, strict=True) for inputs, _ in step])
    assert torch.equal(found, expected[:, :-1])


@pytest.mark.parametrize(
    ("seq_len", "split", "message"),
    [
        (5000, "train", "seq_len"),
        (150, "validation", "a sample of data.seq_len 150 needs 151"),
        (0, "train", "least 1"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_batch(
    seq_len: int, split: str, message: str, make_data: MakeData
) -> None:
    with pytest.raises(InputError, match=message):
        token_batches(str(make_data(n_validation=100).data.path), batch_size=2, seq_len=seq_len, split=split)


def test_a_folder_without_data_is_said(tmp_path) -> None:
    with pytest.raises(InputError, match="holds no prepared data"):
        token_batches(tmp_path, batch_size=2, seq_len=8)
