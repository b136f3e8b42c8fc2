"""Pictures of chapter 11: what cleaning removes from a corpus with planted copies and noise, and what it is worth."""

from __future__ import annotations

import json
import os
import random
import re
import string
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from docs.guide.pictures.frame import ROOT, Run, blank
from llm.data.corpus import read_corpus
from llm.data.prepare.tokenise import split_of
from llm.report import read_metrics, series
from llm.trained import load_trained

FOLDER = "data/guide-data"
FIRST_DATA = "data/stdlib-1024"  # its validation split is the clean held-out text, its tokenizer that of all
KINDS = {
    "library": "files of the library",
    "copy": "near-copies",
    "menu": "menus and notices",
    "random": "random characters",
}
COPIED, COPIES, REPLACED = 12, 60, 0.01  # files; copies of each; share of words that a copy has replaced
MENUS, NOISES = 2_000, 1_000  # pages of 5,000 characters each
RULES = (  # code has more signs, shorter words and more repetition than prose, for which the defaults were published
    "--filter.rules=[gopher_repetition, gopher_quality]",
    "--filter.gopher_quality.stop_words=[def, class, return, import, self, for]",
    "--filter.gopher_quality.min_words=10",
    "--filter.gopher_quality.max_word_length=20",
    "--filter.gopher_quality.letter_words=0.3",
    "--filter.gopher_quality.hashes=0.5",
    "--filter.gopher_repetition.line_characters=0.3",
    *(f"--filter.gopher_repetition.top_{n}_grams=0.4" for n in (2, 3, 4)),
    *(f"--filter.gopher_repetition.duplicate_{n}_grams=0.6" for n in range(5, 11)),
)


def _run(name: str) -> Run:
    steps = (
        "--train.max_steps=350",
        "--train.eval_interval=70",
        "--optim.warmup_steps=50",
        "--logging.sample_tokens=0",
    )
    return Run(f"guide-data-{name}", settings=(*steps, f"--data.blend={{{FOLDER}/{name}: 1.0}}"))


RUNS = (_run("dirty"), _run("cleaned"))


def planted() -> list[dict[str, str]]:
    """The library's training files among copies, menus and random signs: `text` and `kind`, in a random order."""
    chance = random.Random(0)  # noqa: S311 - texts, no secret
    good = [text for text in read_corpus("stdlib") if split_of(sha256(text.encode()).digest(), 0.05) == "train"]
    texts = [("library", text) for text in good]
    for text in chance.sample([text for text in good if 4_000 < len(text) < 20_000], COPIED):
        texts += [("copy", with_other_words(text, chance)) for _ in range(COPIES)]
    texts += [("menu", menu(chance)) for _ in range(MENUS)]
    texts += [("random", signs(chance)) for _ in range(NOISES)]
    chance.shuffle(texts)
    return [{"kind": kind, "text": text} for kind, text in texts]


def with_other_words(text: str, chance: random.Random) -> str:
    """A near-copy: REPLACED of the words are others of the same text."""
    words = re.findall(r"\w+", text)
    return re.sub(r"\w+", lambda word: chance.choice(words) if chance.random() < REPLACED else word[0], text)


def menu(chance: random.Random) -> str:
    """A made-up page of about 5,000 characters without content: a site's menu and notices, again and again."""
    things = ("home", "search", "sign in", "the newsletter", "our offers", "all categories", "the next page", "help")
    lines = [f"Go to {thing} to see more of what we have for you" for thing in things]
    lines += ["This site uses cookies to give you the best experience", "All rights reserved by the owner of the site"]
    return "\n".join(chance.choice(lines) for _ in range(100))


def signs(chance: random.Random) -> str:
    """5,000 random characters in lines of 80."""
    alphabet = string.ascii_letters + string.digits + string.punctuation + " " * 16
    return "\n".join("".join(chance.choices(alphabet, k=80)) for _ in range(62))


def command(*words: str) -> None:
    """Run launch/prepare_data.py on one core; it repeats nothing that is done."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "launch/prepare_data.py", *words]
    subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def prepare() -> None:
    """Make the two corpora that RUNS are trained on, under data/guide-data, unless they are there."""
    config = ("--config", "launch/configs/tiny-cpu.yaml")
    command(*config)
    folder, crawl = ROOT / FOLDER, f"{FOLDER}/crawl"
    folder.mkdir(parents=True, exist_ok=True)
    pages = folder / "pages.jsonl"
    if not pages.exists():
        pages.write_text("".join(json.dumps(page) + "\n" for page in planted()), encoding="utf-8")
    for stage in ("extract", "filter", "dedup"):
        command(stage, f"--out={crawl}", f"--input.source={FOLDER}/pages.jsonl", "--engine.workers=1", *RULES)
    for name, source in (("dirty", f"{FOLDER}/pages.jsonl"), ("cleaned", f"{crawl}/dedup/*.parquet")):
        tokens = (f"--data.path={FOLDER}/{name}", f"--data.tokenizer={FIRST_DATA}/tokenizer.json")
        command(*config, f"--data.source={source}", *tokens, "--data.validation_fraction=0.07")  # 0.05: no file of ours


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    """`cleaning`: what became of each kind of text; `dirty-and-cleaned`: the validation losses of both runs."""
    return {"cleaning": _cleaning(), "dirty-and-cleaned": _losses(runs)}


def fates() -> Counter[tuple[str, str]]:
    """Bytes of text by its kind and what became of it: kept, refused (by the filters) or duplicate."""
    lines = (ROOT / FOLDER / "pages.jsonl").read_text(encoding="utf-8").splitlines()
    # `offset` of a document is its line in the file, from 1.
    left = [_lines(ROOT / FOLDER / "crawl" / stage / "00000.parquet") for stage in ("filter", "dedup")]
    found = Counter[tuple[str, str]]()
    for number, page in enumerate(map(json.loads, lines), 1):
        fate = "kept" if number in left[1] else "duplicate" if number in left[0] else "refused"
        found[page["kind"], fate] += len(page["text"].encode())
    return found


def _lines(path: Path) -> set[int]:
    return set(pq.read_table(path, columns=["offset"])["offset"].to_pylist())


def _cleaning() -> Figure:
    found, figure = fates(), blank(8, 3)
    axes = figure.add_subplot(xlabel="text (MB)")
    parts = {"kept": "#0072b2", "refused": "#e69f00", "duplicate": "#999999"}
    names = {"kept": "kept", "refused": "refused by the filters", "duplicate": "dropped as a duplicate"}
    start = dict.fromkeys(KINDS, 0.0)
    for fate, colour in parts.items():
        ink = "white" if fate == "kept" else "black"
        sizes = [found[kind, fate] / 1e6 for kind in KINDS]
        axes.barh(list(KINDS.values()), sizes, left=list(start.values()), color=colour, label=names[fate])
        for row, (kind, size) in enumerate(zip(KINDS, sizes, strict=True)):
            if size > 0.4:
                axes.text(start[kind] + size / 2, row, f"{size:.1f}", ha="center", va="center", color=ink)
            start[kind] += size
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _losses(runs: dict[str, Path]) -> Figure:
    figure = blank(8, 3.8)
    curves, files = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = {"dirty": ("#d55e00", "s", "dirty"), "cleaned": ("#0072b2", "o", "cleaned")}
    for name, (colour, marker, label) in styles.items():
        steps, losses = series(read_metrics(runs[f"guide-data-{name}"] / "metrics.jsonl"), "val_loss")
        curves.plot(steps, losses, color=colour, marker=marker, label=f"{label}: {losses[-1]:.2f} at the end")
    curves.set(xlabel="step (4,096 tokens each)", ylabel="validation loss (nats per token)")
    curves.legend(frameon=False)
    dirty, cleaned = (losses_of_files(runs[f"guide-data-{name}"]) for name in styles)
    ends = [min(dirty + cleaned) - 0.2, max(dirty + cleaned) + 0.2]
    files.plot(ends, ends, color="#999999", linewidth=1)
    files.scatter(dirty, cleaned, s=22, color="#0072b2")
    files.set(xlabel="loss of a file, dirty run", ylabel="loss of a file, cleaned run", aspect="equal")
    for axes in (curves, files):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.inference_mode()
def losses_of_files(run: Path) -> list[float]:
    """Nats per token of each validation file of the first run's data, read in windows of 128 tokens."""
    ids = np.fromfile(ROOT / FIRST_DATA / "validation.bin", np.uint16).astype(np.int64)
    count, model = (len(ids) - 1) // 128, load_trained(run).model
    inputs, targets = (torch.from_numpy(part[: count * 128]).view(count, 128) for part in (ids, ids[1:]))
    parts = zip(inputs.split(32), targets.split(32), strict=True)
    losses = [F.cross_entropy(model(some).flatten(0, 1), wanted.flatten(), reduction="none") for some, wanted in parts]
    ends = np.flatnonzero(targets.flatten().numpy() == 0)  # the end-of-document token
    return [float(part.mean()) for part in torch.cat(losses).tensor_split(torch.from_numpy(ends + 1))[:-1] if len(part)]
