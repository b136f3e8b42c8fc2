"""What came of a run: its loss curve, its validation loss beside a bigram model's, and text that it writes.

usage: report.py runs/<name>      draws runs/<name>/loss.png; exit code 2: no such run
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from typing import TYPE_CHECKING

from llm.errors import InputError, require

if TYPE_CHECKING:
    from llm.data.tokens.manifest import Manifest
    from llm.trained import Trained


def report(run: Path) -> str:
    """Draw loss.png of a run with a checkpoint and describe the run in a few lines."""
    import torch

    from launch.plotting import plot_loss
    from llm.data.tokens.folder import load_manifest
    from llm.trained import load_trained

    require((run / "metrics.jsonl").is_file(), f"{run} is not a run's folder; expected runs/<name>")
    trained = load_trained(run, torch.device("cpu"))
    config, manifest = trained.config, load_manifest(trained.config)
    bigram = manifest.bigram_nats_per_token
    plot_loss(run / "metrics.jsonl", run / "loss.png", config.name, bigram)
    lines = [f"run {config.name}: {trained.step} of {config.train.max_steps} steps, {run / 'loss.png'}"]
    loss = validation_loss(run)
    if loss is not None:
        lines.append("  validation loss   " + units(loss, manifest))
    if bigram is not None:
        lines.append("  bigram model      " + units(bigram, manifest))
    if bigram is not None and loss is not None:
        side = "under" if loss < bigram else "above"
        lines.append(f"  the model is {abs(1 - loss / bigram):.1%} {side} the interpolated bigram model")
    if config.logging.sample_tokens > 0:
        lines += ["", continuation(trained)]
    return "\n".join(lines)


def validation_loss(run: Path) -> float | None:
    """The last one in metrics.jsonl."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next((r["val_loss"] for r in reversed(list(records)) if "val_loss" in r), None)


def units(loss: float, manifest: Manifest) -> str:
    bits = manifest.bits_per_byte(loss)
    return f"{loss:.4f} nats per token" + ("" if bits is None else f", {bits:.4f} bits per byte")


def continuation(trained: Trained) -> str:
    """The configured prompt and what the model writes after it."""
    from llm.generate import stream
    from llm.sampling import SamplingConfig

    settings = trained.config.logging
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=trained.config.seed)
    return "".join(stream(trained, [settings.sample_prompt], settings.sample_tokens, sampling))


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    try:
        require(len(sys.argv) == 2, "usage: report.py runs/<name>")
        print(report(Path(sys.argv[1])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
