"""The shards hold each document, encoded by the reference, in the order of the input; nothing else changes a byte."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokens_corpus import ROOT, STRANGE, Corpus

from chosen import slow_but
from llm.config.parse import parse_config
from llm.crawl.dedup.clusters import split_of_cluster
from llm.crawl.documents import SCHEMA, write_documents
from llm.crawl.tasks import Task, run_task
from llm.crawl.tokens.encode import Encoder
from llm.crawl.tokens.settings import TokenizeConfig, TokenizerConfig
from llm.crawl.tokens.stage import TOKENIZER, Join, Tokenize, TrainTokenizer
from llm.data.corpora import Corpora
from llm.data.prepare.damage import find_damage
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.manifest import SPLITS, read_manifest
from llm.data.tokens.megatron import TokenWriter, read_index
from llm.errors import InputError

CONFIG = ["--config", str(ROOT / "launch/configs/tiny-cpu.yaml")]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the files, but for the time in the report."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "00000.json"}


def read_split(folder: Path, split: str) -> list[list[int]]:
    """The ids of each document."""
    index = read_index(folder / split)
    ids = np.fromfile(folder / f"{split}.bin", index.dtype)
    return [part.tolist() for part in np.split(ids, np.cumsum(index.lengths)[:-1])]


def test_each_document_is_as_the_library_encodes_it(corpus: Corpus):
    folder = corpus.tokenise()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    manifest = read_manifest(folder)
    for split in SPLITS:
        expected = [d for d in corpus.documents if split_of_cluster(d.id, 0.2) == split]
        found, origins = read_split(folder, split), pq.read_table(folder / f"{split}.origin.parquet").to_pylist()
        assert len(found) == len(expected) > 0
        for ids, origin, document in zip(found, origins, expected, strict=True):
            assert origin == {"source": document.source, "offset": document.offset}
            assert ids[-1] == tokenizer.eod_id
            if document.text == STRANGE[3]:  # the one that Ingot cuts, because no library encodes it in little memory
                assert ids[:-1] == tokenizer.encode(document.text)
            else:
                assert ids[:-1] == library.encode(document.text).ids
        about = manifest.splits[split]
        assert about.documents == len(expected)
        assert about.tokens == sum(map(len, found))
        assert about.bytes == sum(len(d.text.encode()) for d in expected)


def test_the_bytes_depend_on_neither_order_nor_library(corpus: Corpus):
    usual = corpus.tokenise("usual")
    reversed_ = corpus.tokenise("reversed", order=lambda tasks: tasks[::-1])
    slow = corpus.tokenise("slow", tokenize=TokenizeConfig(0.2, "tokenizers"))
    assert contents(usual) == contents(reversed_) == contents(slow)
    assert set(contents(usual)) == {
        "manifest.json", "provenance.json", "tokenizer.json", "train.bin", "train.idx", "train.origin.parquet",
        "train.sums", "validation.bin", "validation.idx", "validation.origin.parquet", "validation.sums",
    }  # fmt: skip


def test_a_run_takes_them_as_they_are(corpus: Corpus):
    config = parse_config([*CONFIG, f"--data.path={corpus.tokenise()}"])
    assert find_damage(Corpora.open(config)) == []
    (corpus.out / "tokens/train.origin.parquet").write_bytes(b"")
    assert "train.origin.parquet" in "".join(find_damage(Corpora.open(config)))


@pytest.mark.slow
def test_a_model_trains_on_them(corpus: Corpus):
    folder = corpus.tokenise()
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), *CONFIG, f"--data.path={folder}"]
    steps = ["--train.max_steps=2", "--train.eval_interval=2", "--checkpoint.interval=2"]
    done = subprocess.run([*command, *steps], cwd=corpus.out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 steps" in done.stdout


def test_provenance_has_the_settings_of_every_stage(corpus: Corpus):
    settings = {"stage": "dedup", "version": 3, "settings": {"bands": 14}}
    (corpus.out / "dedup/settings.json").write_text(json.dumps(settings))
    found = json.loads((corpus.tokenise() / "provenance.json").read_text())
    assert found["dedup"].items() >= settings.items()
    assert found["dedup"]["config"]


def a_tokenizer(corpus: Corpus, size: int) -> TokenizerConfig:
    """One that is given: `size` ids, the last of them the end of documents."""
    raw = json.loads(Tokenizer.train([d.text for d in corpus.documents[50:70]], 300).raw)
    raw["model"]["vocab"] |= {f"unused{i}": i for i in range(300, size - 1)} | {"<|end_of_text|>": size - 1}
    raw["added_tokens"].append(dict(raw["added_tokens"][0], id=size - 1, content="<|end_of_text|>"))
    path = corpus.out / "given.json"
    path.write_text(json.dumps(raw))
    return TokenizerConfig(path=str(path), end_token=size - 1)


@pytest.mark.parametrize(
    ("size", "dtype"), slow_but([(65_537, "int32")], [(65_536, "uint16"), (65_537, "int32")], several=True)
)
def test_the_smallest_dtype_that_holds_the_vocabulary(corpus: Corpus, size: int, dtype: str):
    folder = corpus.tokenise(tokenizer=a_tokenizer(corpus, size))
    manifest = read_manifest(folder)
    assert {split.shards.dtype for split in manifest.splits.values()} == {dtype}
    assert (manifest.vocab_size, manifest.eod_id) == (size, size - 1)
    assert {document[-1] for document in read_split(folder, "train")} == {size - 1}
    assert manifest.tokenizer != "train"


def test_a_given_tokenizer_that_is_not_there():
    with pytest.raises(InputError, match=r"tokenizer.path nowhere.json cannot be read"):
        TrainTokenizer(TokenizerConfig(path="nowhere.json"), TokenizeConfig())


def prepared(corpus: Corpus) -> tuple[Tokenize, Task]:
    """The second step, and the task of the first part, before it is run."""
    (corpus.out / "tokenize").mkdir()
    path = corpus.out / f"00000{TOKENIZER}"
    Tokenizer.train([d.text for d in corpus.documents[50:70]], 400).save(path)
    work = Tokenize(TokenizerConfig(), TokenizeConfig(0.2))
    return work, Task(0, (corpus.parts[0], path), corpus.out / "tokenize")


def test_a_mismatch_stops_the_job_and_names_the_document(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    work, task = prepared(corpus)
    encoder = work._encoder(task.inputs[1])
    encoder._fast = Encoder(Tokenizer.train(["other text " * 99, "x y z"], 262), "gigatoken")._fast
    monkeypatch.setattr("llm.crawl.tokens.shards.CHECKED", 2)  # the first document has no text
    document = [d for d in corpus.documents if d.id >> 32 == 0][2]
    name = rf"document {document.id} \(part-0.warc.gz, offset {document.offset}\): from character \d+ on"
    with pytest.raises(InputError, match=name):
        run_task(work, task)
    assert list(task.folder.iterdir()) == []


def test_documents_are_checked_across_row_groups(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    work, task = prepared(corpus)
    table = pq.read_table(corpus.parts[0]).slice(1)  # the first is long now
    pq.write_table(table, corpus.parts[0], row_group_size=4)
    work._encoder(task.inputs[1])  # with what every tokenizer is tried with
    seen = list[str]()
    monkeypatch.setattr(Encoder, "check", lambda self, text, found, name: seen.append(text))
    monkeypatch.setattr("llm.crawl.tokens.shards.CHECKED", 3)
    monkeypatch.setattr("llm.crawl.tokens.shards.LARGEST", 2_000)
    run_task(work, task)
    every = [d.text for d in corpus.documents if d.id >> 32 == 0][1:]
    expected = [text for text in every[::3] if len(text.encode()) <= 2_000]
    assert len(expected) < len(every[::3])
    assert seen == expected


def test_a_full_disk_leaves_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    work, task = prepared(corpus)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "_write_index", full)
    with pytest.raises(InputError, match="is full; make room"):
        run_task(work, task)
    assert not [path for path in task.folder.iterdir() if path.suffix in (".tmp", ".json")]


def test_parts_without_documents(corpus: Corpus):
    usual = corpus.tokenise("usual")
    empty = tuple(corpus.out / f"{name}.parquet" for name in ("nothing", "no-row-group"))
    write_documents(empty[0], [])
    pq.ParquetWriter(empty[1], SCHEMA).close()
    more = replace(corpus, parts=(empty[0], *corpus.parts, empty[1])).tokenise("more")
    assert contents(more) == contents(usual)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.9])
def test_a_damaged_part_is_named(corpus: Corpus, keep: float):
    work, task = prepared(corpus)
    raw = corpus.parts[0].read_bytes()
    corpus.parts[0].write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(InputError, match=r"dedup/00000.parquet cannot be read"):
        run_task(work, task)
    assert list(task.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["00001.train.bin", "00001.train.idx", "00001.train.origin.parquet"])
def test_damaged_token_files_are_named(corpus: Corpus, name: str):
    folder = corpus.tokenise()
    path = corpus.out / "tokenize" / name
    path.write_bytes(path.read_bytes()[:-2])
    for old in folder.iterdir():
        old.unlink()
    inputs = (folder.parent / f"tokenizer/00000{TOKENIZER}", *sorted((corpus.out / "tokenize").glob("?????.json")))
    with pytest.raises(InputError, match=name.replace("bin", "(bin|idx)")):
        run_task(Join(TokenizerConfig(), TokenizeConfig(0.2)), Task(0, inputs, folder))
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*"))


def test_an_empty_split_is_refused(corpus: Corpus):
    with pytest.raises(InputError, match="the validation split is empty; use more text, or another"):
        corpus.tokenise(tokenize=TokenizeConfig(1e-9))
