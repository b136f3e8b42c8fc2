"""A new user's ten tasks, by the commands of the README's table: what they print and what is on disk after them.

The commands run as they stand there, in a folder that looks like the checkout. Only the config is a smaller one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from recording import LOG, SVG, draw

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
NEXT = README.split("## What you can do next")[1]
COMMANDS = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)`", NEXT, re.MULTILINE))
COMMANDS["characters"] = re.findall(r"```\n(make .*)\n```", NEXT)[0]
SMALL = {
    "model": {"n_layer": 1, "n_head": 2, "d_model": 32, "max_seq_len": 32},
    "data": {"seq_len": 32},
    "optim": {"warmup_steps": 2},
    "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 4, "eval_interval": 2},
    "checkpoint": {"interval": 2},
    "logging": {"interval": 1, "sample_tokens": 8},
}


class Checkout:
    """A folder with the checkout's scripts, two corpora, and its configs with smaller sizes."""

    def __init__(self, path: Path, engine: str) -> None:
        self.path = path
        (path / "launch/configs").mkdir(parents=True)
        for script in (ROOT / "launch").glob("*.*"):
            (path / "launch" / script.name).symlink_to(script)
        for name in ("Makefile", "README.md", "constraints.txt"):
            (path / name).symlink_to(ROOT / name)
        (path / "launch/configs/gpt2-124m.yaml").symlink_to(ROOT / "launch/configs/gpt2-124m.yaml")
        for name, changes in (("tiny-cpu", {"vocab_size": 300}), ("char-cpu", {})):
            config = yaml.safe_load((ROOT / f"launch/configs/{name}.yaml").read_text())
            for section, values in SMALL.items():
                config.setdefault(section, {}).update(values)
            config["model"] |= changes
            config["train"]["engine"] = engine
            config["data"].setdefault("source", "corpus")
            (path / f"launch/configs/{name}.yaml").write_text(yaml.safe_dump(config))
        stdlib = Path(sysconfig.get_path("stdlib"))
        for folder, modules in (("corpus", "abc bisect calendar cmd copy"), ("my-texts", "heapq queue colorsys")):
            (path / folder).mkdir()
            for module in modules.split():
                (path / folder / f"{module}.txt").write_text((stdlib / f"{module}.py").read_text())

    def run(self, command: str, one_process: bool = True) -> str:
        """What a command of the README prints; `make pretrain` by its recipe's commands, without a launcher."""
        words = shlex.split(command)
        if words[:2] == ["make", "pretrain"]:
            own = f"BIN={shlex.quote(str(BIN))}"
            words[1:1] = ["-o", "setup", own, "CONFIG=launch/configs/tiny-cpu.yaml", "RANKS=2", "GPUS=0"]
            if one_process:
                recipe = self._run([*words, "-n"]).splitlines()
                prepare, pretrain = (line[line.index("launch/") :] for line in recipe if "launch/" in line)
                return "".join(self._run([sys.executable, *shlex.split(line)]) for line in (prepare, pretrain))
        return self._run(words)

    def _run(self, words: list[str]) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = str(ROOT)  # as after `make setup`
        result = subprocess.run(
            words, cwd=self.path, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
        )
        assert result.returncode == 0, f"{words}: {result.stdout[-2000:]}{result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr and "warning" not in result.stderr.lower(), result.stderr[-3000:]
        return result.stdout

    def losses(self, name: str) -> dict[int, float]:
        records = map(json.loads, (self.path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after the first run, which the plain engine has made."""
    place = Checkout(tmp_path_factory.mktemp("journeys"), "plain")
    place.run("make pretrain")
    return place


def complete(run: Path, step: int) -> bool:
    """Whether a run's folder holds what a finished run leaves."""
    files = ("config.yaml", "metrics.jsonl", "tokenizer.json", "loss.png", f"checkpoints/step-{step:08}/manifest.json")
    return all((run / name).is_file() for name in files)


def form(line: str) -> str:
    """A line without its numbers and names of files."""
    return re.sub(r"[-\d.,:e+]*\d[-\d.,:e+]*", "0", re.sub(r"\S*/\S*", "PATH", line))


def test_the_picture_is_of_the_log() -> None:
    assert SVG.read_text() == draw(LOG.read_text()), "run: python docs/recording.py --draw"


def test_every_command_of_the_readme_has_a_journey() -> None:
    assert len(COMMANDS) == 16, sorted(COMMANDS)
    asked = set(re.findall(r'COMMANDS\["([^"]+)"\]', Path(__file__).read_text()))
    # tests/gpu and tests/launch; tests/train/test_train_profiling.py; tests/benchmarks/crawl
    others = {"use several GPUs, or another launcher", "find out what slows a step", "make a corpus of raw web pages"}
    assert COMMANDS.keys() - asked == others


@pytest.mark.ranks
def test_the_first_run(tmp_path: Path) -> None:
    """`make pretrain` as it is, with DeepSpeed and two ranks."""
    place = Checkout(tmp_path, "deepspeed")
    told = place.run("make pretrain", one_process=False)
    assert "train" in told and "step 4/4" in told and "the model is" in told
    assert complete(tmp_path / "runs/tiny-cpu", 4)
    # Ingot's lines alone, in the forms that the README's picture shows. A sample of text comes last.
    report = told[: told.index("\n\n", told.index("run tiny-cpu:"))]
    assert not re.search(r"\[(INFO|WARNING)\]|built successfully", told)
    shown = {form(line) for line in LOG.read_text().splitlines()}
    shown |= {"PATH corpus, vocabulary 0", "  the model is 0% above the interpolated bigram model"}
    unlike = [line for line in report.splitlines() if form(line) not in shown]
    assert [line for line in unlike if not line.startswith("  too few documents to choose from")] == []
    logs = sorted((tmp_path / "runs/tiny-cpu/deepspeed").iterdir())
    assert [path.name for path in logs] == ["rank-0.log", "rank-1.log"]
    assert "built successfully" in logs[0].read_text()
    told = place.run("make pretrain", one_process=False)
    assert "runs/tiny-cpu is complete: 4 steps" in told


def test_own_text(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["train on your own text"])
    assert "data/my-texts-300: my-texts/, vocabulary 300" in told and "run mine: 4 of 4 steps" in told
    assert complete(checkout.path / "runs/mine", 4)
    tokenizers = [(checkout.path / "runs" / run / "tokenizer.json").read_bytes() for run in ("mine", "tiny-cpu")]
    assert tokenizers[0] != tokenizers[1]  # it was trained on the text


@pytest.mark.slow
def test_one_text_by_its_characters(checkout: Checkout) -> None:
    text = (checkout.path / "corpus/cmd.txt").read_text()
    (checkout.path / "input.txt").write_text(text)
    told = checkout.run(COMMANDS["characters"])
    assert "run char-cpu: 4 of 4 steps" in told
    assert complete(checkout.path / "runs/char-cpu", 4)
    vocabulary = json.loads((checkout.path / "runs/char-cpu/tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) >= len(set(text))


@pytest.mark.slow
def test_own_tokenizer(checkout: Checkout) -> None:
    own = checkout.path / "tokenizer.json"
    own.write_bytes((checkout.path / "runs/tiny-cpu/tokenizer.json").read_bytes().replace(b'"vocab":', b'"vocab" :'))
    command = COMMANDS["use your own tokenizer"]
    assert "--model.vocab_size=50304" in command  # room for the tokens of GPT-2; here for those of a smaller one
    told = checkout.run(command.replace("50304", "320"))
    assert "data/corpus-320: corpus, vocabulary 300" in told and "300 tokens, padded to 320" in told
    assert "run own: 4 of 4 steps" in told
    assert complete(checkout.path / "runs/own", 4)
    assert (checkout.path / "runs/own/tokenizer.json").read_bytes() == own.read_bytes()


@pytest.mark.slow
def test_a_longer_run(checkout: Checkout) -> None:
    command = COMMANDS["train longer"]
    assert "--train.max_steps=2800" in command  # twice the steps of tiny-cpu.yaml
    first = checkout.losses("tiny-cpu")
    told = checkout.run(command.replace("2800", "8"))
    assert "step 5/8" in told and "run tiny-cpu: 8 of 8 steps" in told
    losses = checkout.losses("tiny-cpu")
    assert list(losses) == list(range(1, 9))
    assert first.items() <= losses.items()  # it went on, and did not begin again
    assert complete(checkout.path / "runs/tiny-cpu", 8)


@pytest.mark.slow
def test_another_learning_rate(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["try another learning rate"])
    assert "run slower: 4 of 4 steps" in told
    assert complete(checkout.path / "runs/slower", 4)
    assert "lr: 0.001" in (checkout.path / "runs/slower/config.yaml").read_text()
    first, slower = checkout.losses("tiny-cpu"), checkout.losses("slower")
    assert slower[1] == first[1] and slower[4] != first[4]  # the same weights and batches to begin with


def test_plan_a_larger_run(checkout: Checkout) -> None:
    command = COMMANDS["plan a larger run, such as one of [launch/configs](launch/configs): memory, tokens, hours"]
    assert "124,439,808" in checkout.run(command)


@pytest.mark.slow
def test_new_data_from_old_weights(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["begin with a run's weights, on new text"])
    assert "runs/tiny-cpu" in told and "warning" not in told and "run tuned: 4 of 4 steps" in told
    assert complete(checkout.path / "runs/tuned", 4)
    checkout.run('make pretrain ARGS="--name=fresh --data.source=my-texts/ --data.path=data/tuned --train.max_steps=1 '
                 '--data.tokenizer=runs/tiny-cpu/tokenizer.json"')  # fmt: skip
    assert checkout.losses("tuned")[1] < checkout.losses("fresh")[1]


@pytest.mark.slow
def test_generate(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["write text"])
    assert told.startswith("def ") and len(told) > len("def \n")
    assert told == checkout.run(COMMANDS["write text"])
    told = checkout.run(COMMANDS["write several texts at once"])
    assert told.startswith("--- 1 of 3\nimport ") and "--- 3 of 3\nimport " in told


@pytest.mark.slow
def test_fine_tuning(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["teach it to answer, from conversations"])
    assert "docstrings.jsonl" in told and (checkout.path / "data/finetune/packages.jsonl").is_file()
    answer, labels = {"role": "assistant", "content": "1"}, ("even", "odd")
    talks = [{"messages": [{"role": "user", "content": f"{i}"}, answer]} for i in range(60)]
    texts = [{"text": f"def f{i}(): return {i}", "label": labels[i % 2]} for i in range(60)]
    (checkout.path / "launch/configs/finetune").mkdir()
    for name, records in (("chat", talks), ("classify", texts)):
        (checkout.path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        config = yaml.safe_load((ROOT / f"launch/configs/finetune/{name}.yaml").read_text())
        config["data"] |= {"source": f"{name}.jsonl", "seq_len": 32}
        config["train"] |= SMALL["train"] | {"max_steps": 2}
        for section in ("optim", "checkpoint"):
            config[section] |= SMALL[section]
        (checkout.path / f"launch/configs/finetune/{name}.yaml").write_text(yaml.safe_dump(config))
    (command,) = re.findall(r"`(python launch/finetune.py --config \S*chat.yaml)`", NEXT)
    assert "run tiny-chat: 2 of 2 steps" in checkout.run(command)
    told = checkout.run(COMMANDS["teach it the labels of texts, and say those of others"])
    assert "run tiny-classify: 2 of 2 steps" in told
    (command,) = re.findall(r"`(python launch/classify.py [^`]*)`", NEXT)
    assert re.fullmatch(r"(even|odd)\t0\.\d{3}\n", checkout.run(command))


def test_evaluate(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["evaluate it on any text"])
    assert re.search(r"constraints.txt .*\b\w*bits_per_byte .*\d\.\d{4} ", told), told


@pytest.mark.slow
def test_export(checkout: Checkout) -> None:
    told = checkout.run(COMMANDS["export it for Hugging Face's `transformers`"])
    assert "exported" in told
    folder = checkout.path / "exported"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 300


def library(*sections: str) -> str:
    """The Python of sections of docs/library.md."""
    page = (ROOT / "docs/library.md").read_text()
    parts = [page.split(f"## {section}\n")[1].split("\n## ")[0] for section in sections]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", "".join(parts), re.MULTILINE | re.DOTALL))


def test_a_kernel_in_your_own_model(checkout: Checkout) -> None:
    assert "docs/library.md#a-kernel-in-your-own-model" in NEXT
    script = library("A model", "A kernel in your own model") + "print(tuple(logits.shape), tuple(out.shape))\n"
    (checkout.path / "own_model.py").write_text(script)
    assert checkout.run("python own_model.py") == "(8, 64, 300) (2, 100, 4, 32)\n"


@pytest.mark.slow
def test_the_loader_in_your_own_loop(checkout: Checkout) -> None:
    assert "docs/library.md#the-loader-in-your-own-loop" in NEXT
    page = (ROOT / "docs/library.md").read_text()
    (prepare,) = re.findall(r"^```bash\n(python launch/prepare_data.py .*)\n```$", page, re.MULTILINE)
    checkout.run(prepare + " --data.path=data/own-loop")
    assert (checkout.path / "data/own-loop/manifest.json").is_file()
    script = library("A model", "The loader in your own loop").replace("data/corpus-300", "data/own-loop")
    (checkout.path / "own_loop.py").write_text(script)
    assert re.fullmatch(r"validation loss: [1-6]\.\d{3} nats per token\n", checkout.run("python own_loop.py"))
