"""Validation batches: every sample of the split once, on any world."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeData

from llm.data.corpora import Corpora
from llm.data.loader import validation_batches
from llm.data.samples.documents import scan_documents
from llm.errors import InputError
from test_data_loader import KINDS, file_tokens, with_data


@KINDS
@pytest.mark.parametrize("wanted", [None, 1, 7, 12, 19])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 3), (1, 64), (2, 3), (3, 5)])
def test_validation_covers_each_sample_once(
    make_data: MakeData, kind: str, wanted: int | None, dp_size: int, micro: int
):
    config = make_data(n_validation=200, loader=kind, validation_samples=wanted, micro_batch=micro, global_batch=60)
    tokens, seen, counts = file_tokens(config, "validation"), [], []
    for rank in range(dp_size):
        batches = list(validation_batches(Corpora.open(config), dp_rank=rank, dp_size=dp_size))
        counts.append(len(batches))
        for batch, valid in batches:
            assert batch.tokens.shape == (micro, 11)
            assert 0 <= valid <= micro
            assert batch.cu_seqlens is None
            seen += batch.sample_ids[:valid].tolist()
            for i, row in zip(batch.sample_ids.tolist(), batch.tokens.numpy(), strict=True):
                assert np.array_equal(row, tokens[10 * i : 10 * i + 11])
    assert sorted(seen) == list(range(wanted or 19))
    assert len(set(counts)) == 1


@KINDS
def test_documents_are_masked_in_validation_too(make_data: MakeData, kind: str):
    config = make_data(loader=kind, vocab_size=5, document_masks=True)
    batch, _ = next(validation_batches(Corpora.open(config), dp_rank=0, dp_size=1))
    position_ids, cu_seqlens = scan_documents(batch.tokens.numpy(), 0, False)
    assert np.array_equal(batch.position_ids, position_ids)
    assert np.array_equal(batch.cu_seqlens, cu_seqlens)


@KINDS
def test_unfit_validation_data_is_refused(make_data: MakeData, kind: str):
    config = make_data(loader=kind)

    def refused(match: str, **changes) -> None:
        with pytest.raises(InputError, match=match):
            validation_batches(Corpora.open(with_data(config, **changes)), dp_rank=0, dp_size=1)

    refused(r"validation_samples is 20; .* has 19 samples", validation_samples=20)
    refused(r"the validation split has 200 tokens; .* 200 needs 201", seq_len=200)
    path = Path(config.data.path) / "validation.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(r"validation.bin.*398.*400")
    with pytest.raises(InputError, match="rank 1 of 1"):
        validation_batches(Corpora.open(config), dp_rank=1, dp_size=1)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=499))
    with pytest.raises(InputError, match=r"model\.vocab_size is 499"):
        validation_batches(Corpora.open(other), dp_rank=0, dp_size=1)
