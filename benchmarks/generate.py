"""Times decoding by Ingot and by `transformers`, in turns in one run, and prints a table.

Both have the same random weights, which Ingot reads from the folder that the other wrote, and continue the same prompts
greedily, in fp32 on one thread of the CPU; what counts is CPU-seconds. A step's time is that of a text, without that of
a text of one token, divided by the other tokens. The floor is the time of a step's products with the weights alone.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.clock import alternate
from benchmarks.contenders import SIZES
from benchmarks.report import header, heading, table
from benchmarks.step import paired
from llm.data.tokenizer import Tokenizer
from llm.generate import generate
from llm.model.decode import product
from llm.model.gpt import GPT
from llm.model.layers import LanguageModelHead, Linear
from llm.sampling import SamplingConfig
from llm.trained import load_trained

PACKAGES = ("torch", "transformers")
INGOT, THEIRS, FLOOR = "Ingot", "transformers", "weight products alone"
PROMPT = 16  # tokens
Texts = Callable[[int], list[list[int]]]
"""The new tokens of each row; its argument: how many."""


def theirs(form: str, size: str) -> Any:
    """A model of transformers with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    n = SIZES[size]
    torch.manual_seed(0)
    options: dict[str, Any] = dict(vocab_size=n["vocab_size"], bos_token_id=None, eos_token_id=None)
    options |= dict(tie_word_embeddings=True, attn_implementation="sdpa")
    if form == "GPT-2":
        options |= dict(n_embd=n["d_model"], n_layer=n["n_layer"], n_head=n["n_head"], n_positions=n["max_seq_len"])
        return GPT2LMHeadModel(GPT2Config(**options)).eval()
    options |= dict(hidden_size=n["d_model"], num_hidden_layers=n["n_layer"], num_attention_heads=n["n_head"])
    width = -(-8 * n["d_model"] // 3 // 64) * 64
    options |= dict(intermediate_size=width, max_position_embeddings=n["max_seq_len"])
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def ours(model: Any) -> GPT:
    """The same model as Ingot reads it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        Tokenizer.train(["a b c d"], 257).save(Path(folder) / "tokenizer.json")
        return cast(GPT, load_trained(folder).model)


def by_ingot(model: GPT, prompts: Tensor) -> Texts:
    def texts(count: int) -> list[list[int]]:
        greedy = SamplingConfig(temperature=0)
        steps = generate(model, prompts.tolist(), max_new_tokens=count, end=-1, sampling=greedy)
        return [[token or 0 for token in row] for row in zip(*steps, strict=True)]

    return texts


def by_transformers(model: Any, prompts: Tensor) -> Texts:
    seen = torch.ones_like(prompts)

    def texts(count: int) -> list[list[int]]:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompts, attention_mask=seen, **options)[:, prompts.shape[1] :].tolist()

    return texts


@torch.inference_mode()
def floor(model: GPT, rows: int) -> Callable[[], None]:
    """The products of one step."""
    linears = [module for module in model.modules() if isinstance(module, Linear | LanguageModelHead)]
    products = [product(x.weight, getattr(x, "bias", None), rows) for x in linears]
    inputs = [torch.randn(rows, x.weight.shape[1]) for x in linears]

    @torch.inference_mode()
    def run() -> None:
        for multiply, x in zip(products, inputs, strict=True):
            multiply(x)

    return run


def seconds(run: Callable[[], object]) -> float:
    """Of the processor, which other work on the machine does not lengthen by much."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(model: Any, mine: GPT, batch: int, count: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """CPU-seconds of a step of each, by round, and the share of tokens that are the same."""
    prompts = torch.randint(mine.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    contenders = {INGOT: by_ingot(mine, prompts), THEIRS: by_transformers(model, prompts)}
    found = [torch.tensor(texts(count)) for texts in contenders.values()]  # and they are warm
    products, times = floor(mine, batch), {name: list[float]() for name in (*contenders, FLOOR)}
    for name in alternate([*times], rounds):
        if name == FLOOR:
            times[name].append(statistics.median(seconds(products) for _ in range(count - 1)))
        else:
            one, all_of_them = (seconds(lambda n=n, name=name: contenders[name](n)) for n in (1, count))
            times[name].append((all_of_them - one) / (count - 1))
    return times, float((found[0] == found[1]).float().mean())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "124M"], default=["tiny", "124M"])
    parser.add_argument("--forms", nargs="+", choices=["GPT-2", "Llama"], default=["GPT-2", "Llama"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(heading(header("benchmarks.generate", arguments, torch.device("cpu"), PACKAGES)), "\n")
    rows = list[list[str]]()
    for size in options.sizes:
        for form in options.forms:
            model = theirs(form, size)
            mine = ours(model)
            for batch in options.batches:
                times, same = measure(model, mine, batch, options.tokens, options.rounds)
                rates = [f"{batch / statistics.median(times[name]):,.0f}" for name in (INGOT, THEIRS, FLOOR)]
                ratio = str(paired(times[THEIRS], times[INGOT]))
                rows.append([f"{size}, {form}, batch {batch}", *rates, ratio, f"{same:.0%}"])
                print(rows[-1], file=sys.stderr, flush=True)
    head = ["tokens/s", INGOT, THEIRS, FLOOR, "Ingot / transformers", "same tokens"]
    print(*table(head, rows), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
