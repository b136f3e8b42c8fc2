"""The benchmark's peer is the same model: with the same weights it gives the same loss."""

from __future__ import annotations

import torch

from benchmarks.plain_gpt import HEADS, PlainGPT
from llm.config.parse import parse_config
from llm.train.build import build_model


@torch.no_grad()
def test_same_weights_same_loss() -> None:
    config = parse_config(["--config", "launch/configs/tiny-cpu.yaml"])
    ours, plain = build_model(config, None), PlainGPT()
    plain.embedding.weight.copy_(ours.embedding.weight)
    for block, peer in zip(ours.blocks.values(), plain.blocks, strict=True):
        D = config.model.head_dim
        by_kind = block.qkv.weight.view(HEADS, 3, D, -1).transpose(0, 1)
        peer.qkv.weight.copy_(by_kind.reshape(peer.qkv.weight.shape))
        peer.output.weight.copy_(block.attention_output.weight)
        peer.up.weight.copy_(torch.cat([block.up.weight[0::2], block.up.weight[1::2]]))
        peer.down.weight.copy_(block.down.weight)
    tokens = torch.randint(0, config.model.vocab_size, (2, 65))
    loss = ours(tokens[:, :-1], torch.arange(64), torch.arange(2), tokens[:, 1:]) / 128
    torch.testing.assert_close(plain(tokens), loss, atol=1e-5, rtol=0)
