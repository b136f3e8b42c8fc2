"""Runs out to Hugging Face folders and in again. Neither is finished before both models have given the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from llm import files
from llm.checkpoint.convert import DTYPES, write_hf, write_plain
from llm.checkpoint.forms import form_of
from llm.checkpoint.writer import write_checkpoint
from llm.config.parse import to_dict, to_yaml
from llm.data.chat import Chat
from llm.errors import InputError, require
from llm.trained import load_trained, open_hf_folder, open_trained

TOLERANCE = 1e-4  # of logits, in fp32; where one is above 1, of the largest
ROWS, POSITIONS = 4, 128  # of the tokens that both models read


def export(path: Path, target: Path, *, dtype: str, plain: bool) -> str:
    """Write the run or checkpoint `path` as the folder `target`, and say what was found of the two models.

    plain: whole tensors under Ingot's names, which no other program knows. Raises InputError if the model has no form,
    there is something at `target`, `transformers` is missing or computes other logits; then nothing is written.
    """
    require(
        plain or find_spec("transformers") is not None,
        "an export is compared with transformers, which is not installed; install it "
        "(pip install 'ingot[hf]') or export the weights under Ingot's own names (--plain)",
    )
    source, config, chat = open_trained(path)
    if not plain:
        form_of(config.model)
    with files.complete_folder(target) as folder:
        if plain:
            write_plain(source, folder, dtype=dtype)
            files.create_bytes(folder / "config.yaml", to_yaml(config).encode())
            files.create_bytes(folder / "tokenizer.json", chat.tokenizer.raw)
            return f"{target}: the weights of step {source.state['step']} under Ingot's names, in {dtype}"
        write_hf(source, config.model, folder, end=chat.tokenizer.eod_id, dtype=dtype)
        _write_tokenizer(chat, folder, config.model.max_seq_len)
        found = _compare(source.folder, folder, dtype)
        return f"{target}: the weights of step {source.state['step']} in {dtype}; {found}"


def import_folder(folder: Path, name: str, runs: Path) -> str:
    """Make the run runs/name of a Hugging Face folder, its checkpoint being of step 0; say what was found of the two.

    Needs a process group of this process. Raises InputError for a folder that is not one of the forms, has no tokenizer
    that Ingot reads, or of whose model Ingot computes other logits; then nothing is written.
    """
    source, config, chat = open_hf_folder(folder)
    data = replace(config.data, tokenizer=str(runs / name / "tokenizer.json"))
    config = replace(config, name=name, data=data)
    state = {"step": 0, "consumed_samples": 0, "skipped_samples": 0, "config": to_dict(config), "data": {}}
    state["engine"] = {"optimizer_step": 0, "loss_scale": None}
    with files.complete_folder(runs / name) as partial:
        checkpoint = write_checkpoint(partial / "checkpoints", 0, source.pieces(), state, keep_last=1)
        files.create_bytes(partial / "config.yaml", to_yaml(config).encode())
        files.create_bytes(partial / "tokenizer.json", chat.tokenizer.raw)
        if chat.template:
            chat.save(partial)
        if find_spec("transformers") is None:
            return f"{runs / name}: not compared with transformers, which is not installed (pip install 'ingot[hf]')"
        return f"{runs / name}: {_compare(checkpoint, folder, 'float32')}"


def _write_tokenizer(chat: Chat, folder: Path, longest: int) -> None:
    """tokenizer.json, and what AutoTokenizer needs beside it to give the same ids: no token is added to a text."""
    tokenizer = chat.tokenizer
    parts = json.loads(tokenizer.raw) | {"truncation": None, "padding": None}
    if (parts.get("post_processor") or {}).get("type") != "ByteLevel":
        parts["post_processor"] = None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"eos_token": tokenizer.end_token, "model_max_length": longest}
    if chat.template:
        settings |= {"chat_template": chat.template} | ({"bos_token": chat.bos_token} if chat.bos_token else {})
    files.create_bytes(folder / "tokenizer.json", json.dumps(parts).encode())
    files.create_bytes(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode())


def _compare(checkpoint: Path, folder: Path, dtype: str) -> str:
    """Raise InputError unless the models of both give the same logits for random tokens, both computed in fp32.

    dtype: what the weights of the checkpoint are rounded to first, as those of the folder are. The models are in memory
    one after the other.
    """
    model = load_trained(checkpoint, torch.device("cpu")).model
    V, beyond = model.config.vocab_size, max(model.config.layer_window(i) or 0 for i in range(model.config.n_layer))
    T = min(model.config.max_seq_len, beyond + POSITIONS)
    tokens = torch.randint(V, (ROWS, T), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype]))
        ours = torch.cat([model(row, torch.arange(T), torch.arange(1)) for row in tokens.split(1)])
    del model, parameter
    error, largest = float((ours - _their_logits(folder, tokens)).abs().max()), float(ours.abs().max())
    text = f"the logits of {ROWS} x {T} random tokens differ by {error:.1e} at most, the largest is {largest:.1f}"
    require(error <= TOLERANCE * max(1, largest), f"{text}; expected {TOLERANCE:.0e} of it: nothing was written")
    return text


@torch.inference_mode()
def _their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of `transformers`, fp32 [B, T, V]."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        return torch.cat([model.eval()(row).logits for row in tokens.split(1)])
    except Exception as error:  # what it raises for a config.json of which it makes nothing is of any type
        raise InputError(f"{folder}: transformers cannot run this model: {type(error).__name__}: {error}") from error
