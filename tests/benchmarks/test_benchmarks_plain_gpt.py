"""The benchmark's peers are the same model: with the same weights they give the same loss."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import config_of, shape_of
from benchmarks.plain_gpt import PlainGPT
from benchmarks.step import paired
from llm.train.build import build_model


@torch.no_grad()
@pytest.mark.parametrize("form", ["Llama", "GPT-2"])
def test_same_weights_same_loss(form: str) -> None:
    config = config_of("tiny", form, 2, "fp32")
    ours, plain = build_model(config, None), PlainGPT(shape_of(config.model))
    for _, parameter in ours.named_parameters():  # norms and biases too
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    plain.embedding.weight.copy_(ours.embedding.weight)
    plain.norm.load_state_dict(ours.norm.state_dict())
    if plain.positions is not None:
        plain.positions.weight.copy_(ours.position_table.weight)
    H, D = config.model.n_head, config.model.head_dim
    for block, peer in zip(ours.blocks.values(), plain.blocks, strict=True):
        by_kind = {name: p.view(H, 3, D, -1).transpose(0, 1) for name, p in block.qkv.named_parameters()}
        for name, parameter in peer.qkv.named_parameters():
            parameter.copy_(by_kind[name].reshape(parameter.shape))
        for mine, theirs in ((block.norm_1, peer.norm_1), (block.norm_2, peer.norm_2), (block.down, peer.down)):
            theirs.load_state_dict(mine.state_dict())
        peer.output.load_state_dict(block.attention_output.state_dict())
        up = block.up.state_dict()
        gated = {name: torch.cat([x[0::2], x[1::2]]) for name, x in up.items()}
        peer.up.load_state_dict(gated if form == "Llama" else up)
    tokens = torch.randint(0, config.model.vocab_size, (2, 65))
    loss = ours(tokens[:, :-1], torch.arange(64), torch.arange(2), tokens[:, 1:]) / 128
    torch.testing.assert_close(plain(tokens), loss, atol=1e-5, rtol=0)


def test_ratios_are_paired_by_round() -> None:
    slow_spell = [1.0, 1.0, 9.0, 1.0, 1.0]
    ratio = paired([0.9 * x for x in slow_spell], slow_spell)
    assert ratio.low == pytest.approx(ratio.middle) == pytest.approx(ratio.high) == pytest.approx(0.9)
    ratio = paired([1.0, 1.2, 1.1, 0.9, 1.0], [1.0] * 5)
    assert ratio.low < 1 < ratio.middle < ratio.high
