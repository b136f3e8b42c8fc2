"""Chapter 1: a piece of code cut into tokens, and bytes per token by the size of the vocabulary."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.guide.pictures.frame import FIRST, ROOT, blank
from llm.config.parse import parse_config
from llm.data.corpus import STDLIB, read_corpus
from llm.data.tokenizer import Tokenizer
from llm.plan.memory import parameters

RUNS = (FIRST,)
CODE = """\
import collections

def forward(self, tokens):
    for block in self.blocks:
        tokens = tokens + block(tokens)
    return self.unembedding(tokens)
"""
COLUMNS = 57  # characters in the picture's width
COLOURS = ("#cfe2f3", "#fce5b6", "#d5e8d4", "#ead1dc")
SIZES = (257, 384, 512, 1024, 2048, 4096, 8192)
HELD_OUT = 20  # one document in so many is measured and not learned from


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    run = runs[FIRST.name]
    return {"tokens": cut(Tokenizer.load(run / "tokenizer.json")), "tokens-vocabulary": by_size(run)}


def cut(tokenizer: Tokenizer) -> Figure:
    """CODE as a box for each token, with its id below; a token that spans two lines is two boxes of one colour."""
    lines = CODE.count("\n")
    figure = Figure(figsize=(8, 0.55 * lines + 0.1))
    axes = figure.add_axes((0.01, 0, 0.98, 1), xlim=(0, COLUMNS), ylim=(lines, -0.1))
    axes.axis("off")
    line, column = 0, 0.0
    for token, colour in zip(tokenizer.encode(CODE), cycle(COLOURS), strict=False):
        number = str(token)
        for part in tokenizer.decode([token]).replace("\n", "↵\n").splitlines(keepends=True):
            shown = part.rstrip("\n").replace(" ", "·")
            width = max(len(shown) + 0.3, 0.62 * len(number) + 0.3)
            axes.add_patch(Rectangle((column, line), width, 0.5, facecolor=colour, edgecolor="white"))
            middle = column + width / 2
            axes.text(middle, line + 0.26, shown, family="monospace", fontsize=15, ha="center", va="center")
            axes.text(middle, line + 0.66, number, fontsize=9, color="#555555", ha="center", va="center")
            number = ""
            line, column = (line + 1, 0.0) if part.endswith("\n") else (line, column + width)
    return figure


def by_size(run: Path) -> Figure:
    """Bytes per token on text that was not learned from, and the share of the model that is its table of tokens."""
    documents = list(read_corpus(STDLIB))
    learned = [text for i, text in enumerate(documents) if i % HELD_OUT]
    largest = json.loads(Tokenizer.train(learned, SIZES[-1]).raw)
    sized = {size: shortened(largest, size) for size in SIZES}
    figure = blank(8, 3.4)
    left, right = figure.subplots(1, 2)
    texts = {"Python code": documents[::HELD_OUT], "English (the licence)": [(ROOT / "LICENSE").read_text()]}
    for (name, held), style in zip(texts.items(), ("o-", "s--"), strict=True):
        count = sum(len(text.encode()) for text in held)
        rates = [count / sum(map(len, tokenizer.encode_batch(held)[0])) for tokenizer in sized.values()]
        left.plot(SIZES, rates, style, label=name)
        print(f"  bytes per token, {name}: {', '.join(f'{rate:.2f}' for rate in rates)}")
    left.set(ylabel="bytes per token", ylim=(0, None))
    left.legend(frameon=False)
    model = parse_config([f"--config={run / 'config.yaml'}"]).model
    rest = parameters(model) - model.vocab_size * model.d_model
    right.plot(SIZES, [100 * size * model.d_model / (size * model.d_model + rest) for size in SIZES], "o-", c="#d55e00")
    right.set(ylabel="% of all weights in the token table", ylim=(0, 60))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES], rotation=45)
        axes.set_xlabel("tokens in the vocabulary")
        axes.grid(alpha=0.3)
    return figure


def shortened(full: dict, size: int) -> Tokenizer:
    """The tokenizer of the first `size` tokens of a BPE: what training would have given, had it stopped there."""
    vocabulary = {token: i for token, i in full["model"]["vocab"].items() if i < size}
    merges = [pair for pair in full["model"]["merges"] if "".join(pair) in vocabulary]
    return Tokenizer(json.dumps(full | {"model": full["model"] | {"vocab": vocabulary, "merges": merges}}).encode())
