"""A flipped bit of a token file is found when its block is first read, and not before, by both loaders."""

from __future__ import annotations

import dataclasses
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import xxhash
from conftest import MakeData
from token_files import CORPORA, corpus_of, failure, write_file

from llm.config import RunConfig
from llm.data.corpora import Corpora
from llm.data.loader import open_loader, validation_batches
from llm.data.samples.schedule import Schedule
from llm.data.tokens.hashes import file_entry
from llm.data.tokens.manifest import SPLITS, read_manifest
from llm.data.tokens.shards import ShardList
from llm.data.tokens.sums import BLOCK, SumsFile, sums_name, sums_of, write_sums
from llm.errors import DamagedFile, InputError
from llm.files import sha256_of
from test_data_loader import KINDS, equal, file_tokens, take, with_data

FORMATS = [("raw", "uint8"), ("megatron", "uint16"), ("llm.c", "uint32"), ("datatrove", "uint16"), ("raw", "int32")]


def corpus_with_sums(folder: Path, format: str, dtype: str, sizes: list[int]) -> ShardList:
    """Files of about so many bytes, of random ids, and their checksums."""
    width, rng = np.dtype(dtype).itemsize, np.random.default_rng(1)
    counts = [size // width for size in sizes]
    ids = [rng.integers(0, 2 ** min(8 * width, 31), count) for count in counts]
    paths = [write_file(folder, f"part{i}", format, dtype, [part.tolist()]) for i, part in enumerate(ids)]
    path = folder / "sums"
    write_sums(path, chain(*(sums_of(Path(part)) for part in paths)))
    vocab_size = 2 ** min(8 * width, 31)
    return corpus_of(format, dtype, paths, counts, vocab_size, sums=SumsFile(str(path), sha256_of(path)))


def flip(path: Path | str, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)


def said(reader, start: int, count: int) -> str | None:
    return failure(lambda: reader.read(start, count))


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_a_flipped_bit_is_found_where_its_block_is_read(tmp_path: Path, format: str, dtype: str, kind: str):
    corpus = corpus_with_sums(tmp_path, format, dtype, [3 * BLOCK - 1024, BLOCK // 4, BLOCK + 4])
    width, header = np.dtype(dtype).itemsize, 1024 if format == "llm.c" else 0
    rng, total = np.random.default_rng(2), corpus.n_tokens
    for file, path in enumerate(corpus.paths):
        good, size = Path(path).read_bytes(), os.path.getsize(path)
        last = (size - 1) // BLOCK * BLOCK
        for at in {
            max(header - 1, 0),
            header,
            size - 1,
            max(last, header),
            max(last - 1, header),
            int(rng.integers(header, size)),
        }:
            begin = at // BLOCK * BLOCK
            end, first = min(begin + BLOCK, size), corpus.ends[file] - corpus.tokens[file]
            bad = range(first + max(0, begin - header) // width, first + (end - header) // width)
            flip(path, at, int(rng.integers(8)))
            expected, found = (xxhash.xxh64_intdigest(raw[begin:end]) for raw in (good, Path(path).read_bytes()))
            reader = CORPORA[kind](corpus)
            assert said(reader, 0, bad.start) is None
            assert said(reader, bad.stop, total - bad.stop) is None
            for start, count in ((bad[-1], 1), (bad[0], 1), (0, total)):
                assert said(reader, start, count) == (
                    f"{path}: the {end - begin} bytes from byte {begin} on have the xxh64 {found:x}, "
                    f"expected {expected:x} ({tmp_path / 'sums'}): restore the file from its source, "
                    "or run python launch/prepare_data.py again with another data.path"
                )
            with open(path, "r+b") as file_again:  # the same file: a reader has it mapped
                file_again.write(good)
            assert said(reader, 0, total) is None


@pytest.mark.parametrize("kind", CORPORA)
def test_every_length_of_a_last_block(tmp_path: Path, kind: str):
    corpus = corpus_with_sums(tmp_path, "raw", "uint8", [*range(1, 100), BLOCK - 1, BLOCK, BLOCK + 1])
    assert said(CORPORA[kind](corpus), 0, corpus.n_tokens) is None


@pytest.mark.parametrize("kind", CORPORA)
def test_sums_cut_short_in_use(tmp_path: Path, kind: str):
    corpus = corpus_with_sums(tmp_path, "raw", "uint16", [2 * BLOCK])
    reader = CORPORA[kind](corpus)
    os.truncate(tmp_path / "sums", 12)
    assert said(reader, 0, BLOCK // 2) is None
    assert said(reader, BLOCK // 2, 1) == f"{tmp_path / 'sums'}: cannot be read at byte 8: it ends there, truncated"


def add_sums(config: RunConfig) -> Path:
    """The checksums that prepare() writes, in a folder made by write_shards(); the folder."""
    folder = Path(config.data.path or "")
    manifest = read_manifest(folder)
    for split in SPLITS:
        write_sums(folder / sums_name(split), sums_of(folder / f"{split}.bin"))
    listed = {sums_name(split): file_entry(folder / sums_name(split)) for split in SPLITS}
    dataclasses.replace(manifest, files=manifest.files | listed).save(folder)
    return folder


def big(make_data: MakeData, **data) -> RunConfig:
    """Four blocks and a little more of training tokens; a step has 12 of the 1,400 samples."""
    return make_data(140_001, 70_000, seq_len=100, micro_batch=1, **data)


def damaged_block(position: int) -> bool:
    """Whether a sample has tokens of the third block."""
    first, last = 2 * 100 * position, 2 * (100 * position + 100) + 1
    return first < 3 * BLOCK and last >= 2 * BLOCK


def places(config: RunConfig, steps: int) -> tuple[Schedule, list[tuple[int, int]]]:
    """The schedule, and (position, epoch) of each sample of the first steps."""
    schedule = Schedule(config.seed, Corpora.open(config).curriculum().phases)
    _, positions, epochs = (column.tolist() for column in schedule.locate(0, 12 * steps))
    return schedule, list(zip(positions, epochs, strict=True))


@KINDS
@pytest.mark.parametrize("consumed", [0, 12 * 7])
def test_stop_names_the_block_when_a_sample_of_it_comes(make_data: MakeData, kind: str, consumed: int):
    config = big(make_data, loader=kind)
    flip(add_sums(config) / "train.bin", 2 * BLOCK + 99)
    _, drawn = places(config, 200)
    expected = next(i for i in range(consumed, len(drawn)) if damaged_block(drawn[i][0])) // 12
    loader = open_loader(Corpora.open(config), dp_rank=0, dp_size=1, consumed=consumed)
    for _ in range(consumed // 12, expected):
        loader.next_step()
    with pytest.raises(DamagedFile, match=r"train\.bin: the 65536 bytes from byte 131072 on have the xxh64 \w+, exp"):
        loader.next_step()
    loader.close()


def test_skip_takes_the_same_other_samples_on_every_world_and_after_a_restart(make_data: MakeData):
    config = big(make_data, damaged="skip")
    tokens, (schedule, drawn) = file_tokens(config, "train"), places(config, 30)
    flip(add_sums(config) / "train.bin", 2 * BLOCK)
    expected, skipped = [], 0
    for position, epoch in drawn:
        skipped += damaged_block(position)
        while damaged_block(position):
            position = schedule.after(0, position, epoch, 0)
        expected.append(tokens[100 * position : 100 * position + 101])
    assert skipped > 50
    for kind in ("native", "numpy"):
        other = with_data(config, loader=kind)
        for dp_size, consumed in ((1, 0), (3, 0), (1, 12 * 11)):
            found, counted = np.empty((30 * 12, 101)), 0
            for rank in range(dp_size):
                loader = open_loader(Corpora.open(other), dp_rank=rank, dp_size=dp_size, consumed=consumed)
                for _ in range(consumed // 12, 30):
                    step = loader.next_step()
                    counted += step.skipped_samples or 0
                    for batch in step.batches:
                        found[batch.sample_ids.numpy()] = batch.tokens.numpy()
                loader.close()
            assert np.array_equal(found[consumed:], np.stack(expected)[consumed:])
            assert counted == sum(damaged_block(position) for position, _ in drawn[consumed:])


@KINDS
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_the_validation_split_too(make_data: MakeData, kind: str, damaged: str):
    config = big(make_data, loader=kind, damaged=damaged)
    folder = add_sums(config)
    flip(folder / "validation.bin", os.path.getsize(folder / "validation.bin") - 1)
    batches, read = validation_batches(Corpora.open(config), dp_rank=0, dp_size=1), []
    with pytest.raises(DamagedFile, match=r"validation\.bin: the 8928 bytes from byte 131072 on have the xxh64"):
        read.extend(map(id, batches))
    assert len(read) == next(i for i in range(700) if 2 * (100 * i + 100) + 1 >= 2 * BLOCK)


@KINDS
def test_without_sums_or_with_verify_none_no_block_is_read(make_data: MakeData, kind: str):
    config = big(make_data, loader=kind)
    flip(Path(config.data.path or "") / "train.bin", 2 * BLOCK)
    old = take(open_loader(Corpora.open(config), dp_rank=0, dp_size=1), 120)  # a folder of 0.1.0
    Path(add_sums(config), "train.sums").write_bytes(b"")
    none = with_data(config, verify="none")
    equal(take(open_loader(Corpora.open(none), dp_rank=0, dp_size=1), 120), old)
    assert len(list(validation_batches(Corpora.open(none), dp_rank=0, dp_size=1))) == 699


@KINDS
@pytest.mark.parametrize("verify", ["blocks", "background"])
@pytest.mark.parametrize("damaged", ["stop", "skip"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("what", ["flipped", "cut", "longer", "missing"])
def test_damaged_sums_are_named(make_data: MakeData, kind: str, verify: str, damaged: str, split: str, what: str):
    config = big(make_data, loader=kind, damaged=damaged, verify=verify)
    path = add_sums(config) / f"{split}.sums"
    if what == "flipped":
        flip(path, 3)
    elif what == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (8 if what == "longer" else -8))
    match = rf"{split}\.sums cannot be read" if what == "missing" else rf"{split}\.sums: sha256 .* data\.verify=none"
    opened = {"train": open_loader, "validation": validation_batches}[split]
    with pytest.raises(InputError, match=match):
        opened(Corpora.open(config), dp_rank=0, dp_size=1)
