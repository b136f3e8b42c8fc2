"""Reads the rank files of tiktoken: a line for each token, its bytes in base64 and its rank, which is its id."""

from __future__ import annotations

import base64
import re
from itertools import pairwise

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llm.data.tokenizer.spelling import BYTES
from llm.errors import InputError, require

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_CL100K = _LLAMA3.replace(_REST, r"|\s+\z" + _REST)  # white space at the end of a text stays whole
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
) + _REST
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
_BEGIN, _HEADER = ["<|begin_of_text|>", "<|end_of_text|>"], ["<|start_header_id|>", "<|end_header_id|>"]
_LLAMA3_TOKENS = [*_BEGIN, *_RESERVED[:4], *_HEADER, _RESERVED[4], "<|eot_id|>", *_RESERVED[5:]]
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), (_GPT2, {"<|endoftext|>": 50256})),
    "cl100k_base": (_CL100K, {"<|endoftext|>": 100257, **_FIM}),
    "o200k_base": (_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "tokenizer": (_LLAMA3, {token: 128000 + i for i, token in enumerate(_LLAMA3_TOKENS)}),  # Llama 3's tokenizer.model
}
"""Name of the file without its suffix -> the pattern that cuts words, and the special tokens."""
SUFFIXES = (".tiktoken", ".model")
_LINE = re.compile(rb"((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?) (\d{1,9})\s*")


def read_ranks(name: str, raw: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of the encoding `name`. InputError where it is not known, and where `raw` is no file of ranks."""
    known = ", ".join(f"{other}.tiktoken" for other in ENCODINGS if other != "tokenizer")
    require(name in ENCODINGS, f"the encoding {name!r} is not known; expected {known} or tokenizer.model")
    pattern, special = ENCODINGS[name]
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(filter(None, raw.split(b"\n")), 1):
        found = _LINE.fullmatch(line)
        token = base64.b64decode(found[1]) if found else b""
        if not found or not token or token in ranks:
            raise InputError(f"line {number}: found {line[:40]!r}; expected another token in base64 and its rank")
        ranks[token] = int(found[2])
    ids = {*ranks.values(), *special.values()}
    require(len(ids) == len(ranks) + len(special), "two tokens have the same rank, or a special token has it too")
    require(all(bytes([byte]) in ranks for byte in range(256)), "some bytes have no rank; expected all 256")
    characters = {byte: character for character, byte in BYTES.items()}
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    last = (_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(spelled[pair[0]], spelled[pair[1]]) for pair in last if pair]
    # A word that is a token is taken whole, as tiktoken does, even where no merges lead to it.
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | special
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return inner


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that make `token` when its bytes are merged, the pair of the lowest rank first; None: more remain.

    No other pair can make it: what lies around a token does not change how its own bytes merge.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return None
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
