"""Starts a run on the weights of another (train.init_from). Its optimizer, schedule, data and steps begin anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm import files
from llm.checkpoint.convert import HuggingFaceReader, open_hf
from llm.checkpoint.merged import without_lora
from llm.checkpoint.reader import CheckpointReader, find_named, open_agreed, own_tokenizer
from llm.config import ModelConfig, RunConfig
from llm.config.lora import is_factor
from llm.config.parse import changed_fields
from llm.errors import CheckpointError, InputError, require
from llm.model.build import model_of
from llm.model.init import initial_tensor
from llm.parallel.agreement import broadcast, together
from llm.parallel.parallelize import choose_layers
from llm.slices import Slice, slice_of
from llm.train.resume import check_same_model, saved_config
from llm.typed import read

# Tables whose rows may be more or fewer than the source's, and the field that counts them.
TABLES = {"embedding.weight": "vocab_size", "head.weight": "vocab_size", "position_table.weight": "max_seq_len"}
EFFECTS = {
    "vocab_size": " (new rows are the mean of the others)",
    "max_seq_len": " (new rows of a table of positions are initial ones)",
    "tie_embeddings": " (the output projection begins as the embedding)",
}


class OtherWeights:
    """The weights of another run as an engine reads them, with its tables resized and its embedding untied.

    A table that is too long loses its last rows. To one that is too short come, for the vocabulary, rows that are the
    mean of the others: the softmax's denominator grows at most as the number of rows does (Jensen), so the first loss
    rises by at most ln(new / old). New positions are initial ones, and so are LoRA's factors.
    """

    def __init__(self, source: CheckpointReader | HuggingFaceReader, model: ModelConfig, config: RunConfig) -> None:
        """model: of the source. Raises InputError or CheckpointError unless it has every tensor of `config`'s."""
        self.source, self.config, self.tied = source, config, model.tie_embeddings
        check_same_model(model, config.model, ("vocab_size", "max_seq_len", *["tie_embeddings"] * self.tied))
        with torch.device("meta"):
            parameters = dict(model_of(config.model, choose_layers(config, None)).named_parameters())
        for name, parameter in parameters.items():
            shape = slice_of(parameter).global_shape
            if is_factor(name):
                continue
            expected = (getattr(model, TABLES[name]), *shape[1:]) if name in TABLES else shape
            found = source.shape(self._stored(name))
            require(found == expected, f"train.init_from: {name} is {found}; expected {expected} by its config")

    def _stored(self, name: str) -> str:
        return "embedding.weight" if self.tied and name == "head.weight" else name

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """`part` of parameter `name`, fp32; `kind` is "master": moments begin at zero."""
        if is_factor(name):
            return part.take(initial_tensor(self.config.model, self.config.seed, name, part.global_shape))
        shape = self.source.shape(self._stored(name))
        if shape == part.global_shape:
            return self.source.read_slice(self._stored(name), kind, part)
        table = self.source.read_slice(self._stored(name), kind, Slice.full(shape))
        more = max(0, part.global_shape[0] - len(table))
        if name == "position_table.weight":
            new = initial_tensor(self.config.model, self.config.seed, name, part.global_shape)[len(table) :]
        else:
            new = table.mean(0, dtype=torch.float64).float().expand(more, -1)
        return part.take(torch.cat([table, new])[: part.global_shape[0]])


def open_weights(config: RunConfig, tokenizer: Path, say: Callable[[str], None]) -> OtherWeights:
    """The weights that train.init_from names; says what becomes of them. Collective.

    tokenizer: the run's tokenizer.json. Raises Agreed where they are damaged, of another architecture, or cut short.
    """
    path = Path(config.train.init_from or "")
    path, warnings = path.resolve() if path.is_symlink() else path, []
    if broadcast("hf" if (path / "config.json").is_file() else ""):
        source = together(lambda: open_hf(path))
        model, found = source.config, next(path.glob("tokenizer.json"), None)
    else:
        source, warnings = open_agreed(path, find_named)
        assert source is not None, "find_named raises where it finds nothing"
        reader = source
        source, saved = together(lambda: without_lora(reader, saved_config(reader.state)))
        model, found = saved.model, together(lambda: own_tokenizer(reader))
    weights = together(lambda: OtherWeights(source, model, config))
    warnings += together(lambda: compare_tokenizers(found, tokenizer, config.model.vocab_size) if found else [])
    changed = changed_fields(model, config.model).items()
    lines = [f"model.{key} {values}{EFFECTS.get(key, '')}" for key, values in changed]
    say("\n  ".join([f"the weights are those of {source.folder}", *lines, *[f"warning: {line}" for line in warnings]]))
    return weights


def compare_tokenizers(source: Path, run: Path, vocab_size: int) -> list[str]:
    """A warning if ids mean other text than they did to the weights; InputError if some would lose their rows."""
    try:
        before, now = token_ids(source), token_ids(run)
    except (CheckpointError, InputError, LookupError, TypeError, ValueError) as error:
        return [f"{source} and {run} cannot be compared: {error!r}; the same id may mean other text"]
    size = max(before.values(), default=-1) + 1
    cut = f"model.vocab_size {vocab_size} cuts rows off that {source} uses"
    require(size <= vocab_size, f"{cut}; use model.vocab_size={size} or more")
    moved = sum(now.get(token) != number for token, number in before.items())
    text = f"{moved} of the {len(before)} tokens of {source} are not in {run} by the same id: ids mean other text"
    return [text] if moved else []


def token_ids(path: Path) -> dict[str, int]:
    """The id of each token of a tokenizer.json; raises one of several errors for a kind without a table of them."""
    parts = files.parse_json(path.read_bytes(), str(path), values=1 << 24)
    vocabulary, added = parts["model"]["vocab"], {token["content"]: token["id"] for token in parts["added_tokens"]}
    if isinstance(vocabulary, list):  # Unigram's: each token with its score, in the order of the ids
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return read(dict[str, int], vocabulary | added, "tokens")
