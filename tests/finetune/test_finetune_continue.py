"""finetune.task=continue goes on where a run, a checkpoint or a Hugging Face folder ended, with more text."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from chat_cases import chat_config, metric, tuned

from chosen import slow_but
from llm.config.finetune import FinetuneConfig
from llm.config.sections import DataConfig
from llm.data.prepare.console import prepare_all
from llm.finetune.settings import finetune_config
from llm.huggingface import export
from pool import RankPool

TEXT = "def f(x):\n    return x\n\n\nimport os\n\nprint(os.name)\n\n\nclass A:\n    pass\n"
SETTINGS = """
data: {source: corpus, path: more, seq_len: 48, validation_fraction: 0.3}
train: {engine: plain, global_batch_size: 8, micro_batch_size: 8, max_steps: 2, eval_interval: 1}
optim: {lr: 1e-3, min_lr: 1e-3, warmup_steps: 0}
logging: {tensorboard: false, sample_tokens: 0}
finetune: {task: continue}
"""
# What train.init_from names, and the step whose weights these are: the exported ones are the newest.
SOURCES = {
    "run": ("runs/base", 4),
    "checkpoint": ("runs/base/checkpoints/step-00000002", 2),
    "folder": ("exported", 4),
}


def trained(folder: Path) -> None:
    """Pretrain on this rank of a pool."""
    os.chdir(folder)
    Path("corpus").mkdir()
    for i in range(40):
        Path(f"corpus/{i}.txt").write_text(TEXT.replace("x", "xyz"[i % 3] * (1 + i % 5)) * 2)
    kept = dict(interval=2, keep_last=2)
    base = chat_config(folder, train=dict(max_steps=4, eval_interval=2), optim=dict(lr=3e-3), checkpoint=kept)
    data = DataConfig(source="corpus", path="first", seq_len=48, validation_fraction=0.3)
    base = replace(base, name="base", data=data, finetune=FinetuneConfig())
    prepare_all(base)
    tuned(base)
    Path("c.yaml").write_text(SETTINGS)


def continued(folder: Path, name: str, source: str) -> str:
    """Go on from `source` on this rank of a pool; the tokenizer that was taken over."""
    os.chdir(folder)
    config = finetune_config(["--config=c.yaml", f"--train.init_from={source}", f"--name={name}"])
    prepare_all(config)
    tuned(config)
    return config.data.tokenizer


@pytest.fixture(scope="module")
def root(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    one_rank.run(trained, folder)
    return folder


@pytest.mark.parametrize("name", slow_but(["run", "checkpoint"], SOURCES))
def test_it_begins_with_the_loss_at_which_the_source_ended(name: str, one_rank: RankPool, root: Path) -> None:
    source, step = SOURCES[name]
    if name == "folder":
        export(root / "runs/base", root / source, dtype="float32", plain=False)
        (root / "c.yaml").write_text(SETTINGS.replace("more", "again"))  # its tokenizer.json is another file
    (tokenizer,) = one_rank.run(continued, root, name, source)
    assert Path(tokenizer) == root / (source if name == "folder" else "runs/base") / "tokenizer.json"
    ended, begun = dict(metric(root / "runs/base", "val_loss")), metric(root / "runs" / name, "val_loss")
    assert ended.keys() == {2, 4} and ended[2] - ended[4] > 0.01
    assert begun[0] == (0, pytest.approx(ended[step], abs=1e-6))
    assert [at for at, _ in begun] == [0, 1, 2] and begun[2][1] < begun[0][1] - 0.01
