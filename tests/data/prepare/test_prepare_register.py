"""A manifest for token files made elsewhere: what they hold is found, what is wrong with them too."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import xxhash
from token_files import KINDS, write_file

from llm.config import DataConfig, ModelConfig, RunConfig
from llm.data.corpora import Corpora
from llm.data.prepare.console import summary
from llm.data.prepare.register import register
from llm.data.prepare.tokenise import prepare
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.folder import load_manifest
from llm.data.tokens.hashes import check_hashes
from llm.data.tokens.manifest import read_manifest
from llm.data.tokens.shards import NumpyCorpus
from llm.errors import InputError

TEXTS = ["no merges: 日本", "the second", "a third document, longer", "x", "the last"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs beside the tokenizer t.json, of the 256 bytes, and an end-of-document token of id 0."""
    monkeypatch.chdir(tmp_path)
    Tokenizer.train(["a"], 257).save(Path("t.json"))


def make_config(**data) -> RunConfig:
    fields = {"path": "corpus", "tokenizer": "t.json", "seq_len": 16} | data
    return RunConfig(model=ModelConfig(vocab_size=257), data=DataConfig(**fields))


def tokens_of(text: str, eod_first: bool = False) -> list[int]:
    tokenizer = Tokenizer.load(Path("t.json"))
    ids = tokenizer.encode(text)
    return [tokenizer.eod_id, *ids] if eod_first else [*ids, tokenizer.eod_id]


def write_texts(folder: str, name: str, texts: list[str], format: str = "raw", dtype: str = "uint16") -> str:
    Path(folder).mkdir(exist_ok=True)
    return write_file(Path(folder), name, format, dtype, [tokens_of(text, format == "llm.c") for text in texts])


WIDE = [kind for kind in KINDS if kind[1] != "uint8"]  # a byte cannot hold 257 ids


# Of a raw file nothing tells the dtype: it is taken for what the vocabulary asks for.
@pytest.mark.parametrize(("format", "dtype"), [k for k in WIDE if k[0] != "raw" or k[1] == "uint16"])
def test_files_of_every_format(format: str, dtype: str):
    for i, text in enumerate(TEXTS):
        write_texts("elsewhere", f"train-{i}", [text, text], format, dtype)
    write_texts("elsewhere", "val", TEXTS[:3], format, dtype)
    suffix = "ds" if format == "datatrove" else "bin"
    patterns = {"train": f"elsewhere/train-*.{suffix}", "validation": f"elsewhere/val.{suffix}"}
    before = {path: path.read_bytes() for path in Path("elsewhere").iterdir()}
    said: list[str] = []
    manifest = register(make_config(), patterns, say=said.append)
    assert {path: path.read_bytes() for path in Path("elsewhere").iterdir()} == before
    assert said == []
    assert sorted(path.name for path in Path("corpus").iterdir()) == [
        "manifest.json", "tokenizer.json", "train.sums", "validation.sums",
    ]  # fmt: skip

    assert manifest == load_manifest(make_config())
    check_hashes(Path("corpus"), manifest)
    split = manifest.splits["validation"]
    assert (split.documents, split.bytes) == (3, sum(len(text.encode()) for text in TEXTS[:3]))
    assert (manifest.splits["train"].documents, manifest.splits["train"].bytes) == (10, None)
    listed = {Path(name) for name in manifest.all_files() if Path(name).parent != Path(".")}
    assert listed == {path.absolute() for path in before}
    shards = Corpora.open(make_config()).training["corpus"].shards
    corpus = NumpyCorpus(shards)
    expected = [token for text in TEXTS for _ in range(2) for token in tokens_of(text, format == "llm.c")]
    assert corpus.read(0, len(corpus)).tolist() == expected
    blocks = [xxhash.xxh64_intdigest(Path(path).read_bytes()) for path in shards.paths]  # each is smaller than a block
    assert np.fromfile("corpus/train.sums", "<u8").tolist() == blocks
    assert (shards.eod_first, shards.eod_id) == (format == "llm.c", 0)


def test_a_folder_with_its_tokens_may_move():
    write_texts("corpus", "a", TEXTS)
    write_texts("corpus", "b", TEXTS[1:])
    shutil.copy("t.json", "corpus/tokenizer.json")
    manifest = register(
        make_config(tokenizer="corpus/tokenizer.json"), {"train": "corpus/a.bin", "validation": "corpus/b.bin"}
    )
    assert list(manifest.all_files()) == ["a.bin", "b.bin", "tokenizer.json", "train.sums", "validation.sums"]
    Path("corpus").rename("moved")
    check_hashes(Path("moved"), read_manifest(Path("moved")))


def test_a_corpus_of_training_tokens_alone_goes_into_blends():
    for name in ("corpus", "other"):
        write_texts(name, "a", TEXTS)
        write_texts(name, "b", TEXTS)
    register(make_config(), {"train": "corpus/a.bin", "validation": "corpus/b.bin"})
    register(make_config(path="other"), {"train": "other"})
    blend = make_config(blend={"corpus": 1.0, "other": 1.0})
    assert Corpora.open(blend).training["other"].shards.tokens == (training_tokens(),) * 2
    with pytest.raises(InputError, match=r"other has no validation split: .* part of data\.blend, not data\.path"):
        load_manifest(make_config(path="other"))


def training_tokens() -> int:
    return sum(len(tokens_of(text)) for text in TEXTS)


def test_preparing_leaves_registered_files_alone():
    write_texts("elsewhere", "a", TEXTS)
    write_texts("elsewhere", "b", TEXTS)
    manifest = register(make_config(), {"train": "elsewhere/a.bin", "validation": "elsewhere/b.bin"})
    assert prepare(make_config(source="no/such/text")) == manifest


def refused(message: str, train: str = "elsewhere/a.bin", **data) -> None:
    before = sorted(Path("corpus").iterdir()) if Path("corpus").exists() else None
    with pytest.raises(InputError, match=message):
        register(make_config(**data), {"train": train, "validation": "elsewhere/b.bin"})
    assert (sorted(Path("corpus").iterdir()) if Path("corpus").exists() else None) == before


def test_what_cannot_be_registered_is_refused():
    write_texts("elsewhere", "a", TEXTS)
    write_texts("elsewhere", "b", TEXTS)
    refused("set data.tokenizer to its tokenizer.json", tokenizer="train")
    refused(r"data\.path is s3://x/y; expected a folder on this machine", path="s3://x/y")
    refused(
        "elsewhere/a.bin/x/y cannot be made .* because of .*elsewhere/a.bin; set data.path", path="elsewhere/a.bin/x/y"
    )
    refused("no token file .* is at nothing", "nothing/*.bin")
    refused(r"elsewhere/b\.bin: in both splits", "elsewhere/*.bin")
    Tokenizer.train(["aa"], 258).save(Path("larger.json"))
    refused("has 258 tokens, model.vocab_size is 257", tokenizer="larger.json")
    Path("corpus").mkdir()
    Path("corpus/tokenizer.json").write_text("{}")
    refused(r"corpus/tokenizer\.json is another tokenizer than data\.tokenizer t\.json")
    Path("corpus/tokenizer.json").unlink()
    Path("corpus/manifest.json").write_text("{}")
    refused(r"corpus has a manifest\.json already; remove it")


def test_tokens_that_do_not_fit_are_refused():
    write_texts("elsewhere", "b", TEXTS)
    path = write_file(Path("elsewhere"), "a", "llm.c", "uint16", [[0, 1, 2], [0, 256, 257, 999]])
    refused(rf"{path}: the id at byte {1024 + 2 * 5} is 257, expected ids below 257")
    path = write_texts("elsewhere", "m", TEXTS, "megatron")
    raw = bytearray(Path(path).with_suffix(".idx").read_bytes())
    raw[34] += 1  # the first length
    Path(path).with_suffix(".idx").write_bytes(raw)
    with pytest.raises(InputError, match=r"m\.idx: the offset"):  # before the tokens are read, which may take long
        register(make_config(), {"train": "elsewhere/m.bin"}, lambda *stage: pytest.fail("read"))


def test_the_place_of_a_wrong_id_is_exact_beyond_the_first_block():
    write_texts("elsewhere", "b", TEXTS)
    ids = np.zeros((1 << 20) + 5, np.uint16)  # two blocks and a rest
    ids[-2] = 257
    Path("elsewhere/a.bin").write_bytes(ids.tobytes())
    refused(f"a.bin: the id at byte {2 * (ids.size - 2)} is 257")


@pytest.mark.parametrize(
    ("format", "open_ended"), [("raw", [[1, 2], [0, 3, 0, 4]]), ("llm.c", [[1, 2], [0, 3], [0, 4]])]
)
def test_what_no_end_of_document_token_closes_is_a_document_too(format: str, open_ended: list[list[int]]):
    write_texts("elsewhere", "b", TEXTS)
    path = write_file(Path("."), "a", format, "uint16", open_ended)
    assert register(make_config(), {"train": path}).splits["train"].documents == 3


def test_documents_of_a_file_of_several_blocks():
    ids = np.ones(1 << 20, np.int64)
    ids[[0, 7, -1]] = 0  # the second block begins within a document
    path = write_file(Path("."), "a", "llm.c", "uint16", [ids.tolist()])
    assert register(make_config(), {"train": path}).splits["train"].documents == 3


def test_an_index_that_counts_other_documents_is_told_of():
    texts = [tokens_of(text) for text in TEXTS]
    path = write_file(Path("."), "a", "megatron", "uint16", [texts[0] + texts[1], *texts[2:]])
    said: list[str] = []
    register(make_config(), {"train": path}, say=said.append)
    assert said == [
        "note: the indexes of the train files count 4 documents, the end-of-document tokens 5; "
        "document masks and packing go by the tokens"
    ]


def test_documents_of_no_tokens_are_not_missed_in_the_tokens():
    texts = [tokens_of(text) for text in TEXTS]
    path = write_file(Path("."), "a", "megatron", "uint16", [[], texts[0], [], texts[1], []])
    said: list[str] = []
    assert register(make_config(), {"train": path}, say=said.append).splits["train"].documents == 2
    assert said == []


@pytest.mark.parametrize("format", ["raw", "llm.c", "megatron"])
def test_files_without_an_end_of_document_token_are_told_of_and_trained_on_without_masks(format: str):
    train = write_file(Path("."), "a", format, "uint16", [[1, 2, 3], [4] * 40])
    validation = write_texts("elsewhere", "b", TEXTS, format)
    said: list[str] = []
    manifest = register(make_config(), {"train": train, "validation": validation}, say=said.append)
    assert len(said) == 1 and said[0].startswith(
        "note: no token of the train files is the end-of-document token 0: documents cannot be told apart, and "
        "document masks and packing are refused"
    )
    shown = summary(Path("corpus"), manifest, manifest.vocab_size)
    assert "  43 tokens  documents not told apart  (" in shown.replace("train     ", "")
    assert (read_manifest(Path("corpus")).splits["train"].documents, manifest.splits["validation"].documents) == (0, 5)
    assert Corpora.open(make_config()).curriculum().phases[0].sources[0].n_samples == 2
    for changes in ({}, {"packing": "best_fit"}):
        with pytest.raises(
            InputError, match=r"documents of corpus cannot be told apart: .* data\.packing=chunk, or tok"
        ):
            Corpora.open(make_config(document_masks=True, **changes))


def test_a_validation_split_without_an_end_of_document_token_has_no_masks_either():
    validation = write_file(Path("."), "a", "raw", "uint16", [[1, 2, 3]])
    register(make_config(), {"train": write_texts("elsewhere", "b", TEXTS), "validation": validation})
    Corpora.open(make_config())
    with pytest.raises(InputError, match="documents of the validation split cannot be told apart"):
        Corpora.open(make_config(document_masks=True))


def test_bare_files_are_looked_through_for_an_end_of_document_token():
    train, validation = (write_texts("elsewhere", name, TEXTS) for name in "ab")
    register(make_config(), {"train": train, "validation": validation})
    ids = np.full(1 << 20, 999, "<u2")  # no ids of the vocabulary: what follows is for data.damaged to say
    for last, told in ((0, True), (1, False)):
        ids[-1] = last
        ids.tofile("bare.bin")
        with nullcontext() if told else pytest.raises(InputError, match=r"documents of bare\.bin cannot be told apart"):
            Corpora.open(make_config(document_masks=True, blend={"bare.bin": 1.0, "corpus": 1.0}))
        Corpora.open(make_config(blend={"bare.bin": 1.0, "corpus": 1.0}))


def test_progress_and_hashes_are_of_all_bytes():
    path, stages = write_texts(".", "a", TEXTS), []
    manifest = register(make_config(), {"train": path}, lambda *stage: stages.append(stage))
    size = Path(path).stat().st_size
    assert stages == [("reading the train tokens", size, size)]
    assert manifest.splits["train"].shards.sha256 == (hashlib.sha256(Path(path).read_bytes()).hexdigest(),)


def test_the_dtype_of_raw_files_can_be_told():
    path = write_texts("elsewhere", "train", TEXTS, "raw", "int32")
    manifest = register(make_config(), {"train": path}, raw_dtype="int32")
    assert manifest.splits["train"].shards.dtype == "int32"
    assert manifest.splits["train"].tokens == sum(len(tokens_of(text)) for text in TEXTS)
    with pytest.raises(InputError, match=r"--dtype is 'int33'; expected one of uint8, uint16, int32, uint32"):
        register(make_config(path="other"), {"train": path}, raw_dtype="int33")
