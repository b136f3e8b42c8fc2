"""A run's numbers at Weights & Biases. WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE say where they go."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

from llm import files
from llm.config import RunConfig
from llm.config.parse import to_dict
from llm.config.redact import redacted
from llm.errors import require

LOGIN_SECONDS, UPLOAD_SECONDS = 60, 300  # for a key to be typed at the start, and for the upload at the end


def check_wandb(config: RunConfig) -> None:
    """InputError if the config asks for Weights & Biases and its package is not installed."""
    # By its metadata: a folder `wandb`, such as the package itself leaves behind, can be imported too.
    installed = not config.logging.wandb or any(distributions(name="wandb"))
    require(installed, "logging.wandb is true, and the package wandb is not installed: pip install -e '.[wandb]'")


class WandbRun:
    """The W&B run of a run's folder, whose id is kept there for a restart. RuntimeError for whatever fails at W&B."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        with _plain_errors():
            import wandb  # two seconds, which ranks that do not write can save

            # wandb must not wrap the standard output, where Ingot's console draws.
            limits = wandb.Settings(console="off", login_timeout=LOGIN_SECONDS, finish_timeout=UPLOAD_SECONDS)
            self.run = wandb.init(
                id=_run_id(folder / "wandb_id"), resume="allow", name=config.name, dir=str(folder),
                config=redacted(to_dict(config)), allow_val_change=True, settings=limits,
            )  # fmt: skip
            # As a number of its own: W&B's own steps only grow, and steps after a checkpoint may be done again.
            self.run.define_metric("*", step_metric="step")

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers of one step by their names."""
        with _plain_errors():
            self.run.log({**numbers, "step": step})

    def close(self, failed: bool) -> None:
        """Wait for the upload, and mark the W&B run as finished or failed."""
        with _plain_errors():
            self.run.finish(exit_code=int(failed))


def _run_id(path: Path) -> str:
    """The id that the file holds; a new one is written to it first."""
    if not path.exists():
        files.replace(path, secrets.token_hex(4).encode())
    return files.read_up_to(path, 100).decode(errors="replace")


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of W&B and of its service share no other base
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
