"""Small tokenizers of the kinds that published models have, made from this repository's documents."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from llm.data.tokenizer.spelling import BYTES

ROOT = Path(__file__).resolve().parents[2]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("llama3", "mistral", "llama2", "t5", "bert")
LOSSLESS = ("llama3", "mistral", "llama2")  # decoding gives the text back


@cache
def real_text() -> str:
    """English, tables and code of this repository, and some other scripts."""
    other = (
        "The quick brown fox — naïve café, 日本語の文章です。 Ελληνικά, русский текст, हिन्दी 🎉👩‍👩‍👧\r\n\tend  \n\n\n"
        * 20
    )
    texts = [(ROOT / f"docs/{name}.md").read_text() for name in ("data", "kernels", "reliability")]
    return "".join([*texts, other]).replace("▁", "_")  # which SentencePiece takes for a space


def _trained(inner: Tokenizer, size: int, special: list[str], **options) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, **options)
    inner.train_from_iterator([real_text()], trainer)
    return inner


@cache
def tokenizer_json(kind: str) -> str:
    """The tokenizer.json of a kind, with the begin and end tokens of that model."""
    return globals()[kind]().to_str()


def llama3() -> Tokenizer:
    inner = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    inner.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    _trained(inner, 600, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return inner


def mistral() -> Tokenizer:
    """BPE that falls back to bytes; Metaspace puts a space before the text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>"]
    _trained(inner, 700, [*special, *(f"<0x{i:02X}>" for i in range(256))], limit_alphabet=80)
    spaces = decoders.Replace("▁", " ")
    inner.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    parts = json.loads(inner.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]  # the bytes are ordinary tokens
    parts["pre_tokenizer"]["split"] = False
    return Tokenizer.from_str(json.dumps(parts))


def llama2() -> Tokenizer:
    """The same, with the space put there by a normalizer."""
    inner = mistral()
    inner.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def t5() -> Tokenizer:
    """Unigram, as SentencePiece makes it, with a normalizer that changes the text."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(real_text().splitlines(), trainer)
    return inner


def bert() -> Tokenizer:
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator([real_text()], trainers.WordPieceTrainer(vocab_size=700, special_tokens=special))
    return inner


def bytes_alone() -> Tokenizer:
    """A token for each byte, and three special ones, as for ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return inner


@cache
def ranks() -> dict[bytes, int]:
    """Of a tokenizer trained on this repository's text, in the order of its merges, and tokens that no merge makes."""
    vocabulary = json.loads(tokenizer_json("llama3"))["model"]["vocab"]
    words = [bytes(BYTES[c] for c in token) for token in list(vocabulary)[3:]]
    return {token: i for i, token in enumerate([*words, b"zqzq", b"unreachable", b" \n \n \n", b"\n  ", b"!\n/"])}


def lines(found: dict[bytes, int]) -> bytes:
    """A rank file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in found.items())
