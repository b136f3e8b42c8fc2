"""Megatron-core's GPTDataset behind PyTorch's DataLoader, as its pretraining script uses it."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # pyright: ignore[reportMissingImports]
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batch, Batches, System
from benchmarks.loader.tokens import TokenSet

CACHE = "megatron"  # folder of the sample numbers that it keeps


class Megatron(System):
    """Without its default T x T attention mask; cu_seqlens are read off the position ids here."""

    def __init__(self) -> None:
        logging.disable(logging.WARNING)

    def begin(self) -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def files(self, tokens: TokenSet, seq_len: int) -> list[Path]:
        return [*tokens.paths, *(path.with_suffix(".idx") for path in tokens.paths), *(tokens.folder / CACHE).glob("*")]

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        samples = (tokens.tokens - 1) // case.seq_len
        # What the dataset asks of a tokenizer.
        names = {"vocab_size": tokens.vocab_size}
        tokenizer = SimpleNamespace(eod=tokens.eod_id, pad=-1, unique_identifiers=names, **names)
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=case.seq_len,
            blend=([str(path.with_suffix("")) for path in tokens.paths], None),
            split="1,0,0",
            path_to_cache=str(tokens.folder / CACHE),
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            reset_position_ids=case.documents,
            reset_attention_mask=case.documents,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
        first = state or 0
        while True:
            # Consecutive samples: the dataset has shuffled already.
            starts = range(first, samples - case.rows + 1, case.rows)
            batches = (list(range(start, start + case.rows)) for start in starts)
            for found in DataLoader(dataset, batch_sampler=batches):
                batch, positions = Batch(found["tokens"], found["labels"]), found["position_ids"]
                if case.documents:
                    begins = (positions.view(-1) == 0).nonzero().view(-1)
                    bounds = torch.cat([begins, torch.tensor([positions.numel()])])
                    batch = batch._replace(position_ids=positions, cu_seqlens=bounds.int())
                yield batch
            first = 0
