"""LSTM, the recurrent language model that came before (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    x    = embedding[tokens]
    a_t  = x_t @ W^T + h_(t-1) @ U^T + b      for every layer, one position after the other; a_t = [i, f, g, o]
    c_t  = sigmoid(f) * c_(t-1) + sigmoid(i) * tanh(g)
    h_t  = sigmoid(o) * tanh(c_t)             the x of the next layer
    out  = h @ head^T                         head = embedding when tied (Press & Wolf 2017)

- the state (h, c) of a row begins at zero: no row hears of another
- dropout on what goes up, never on what goes on in time (Zaremba et al. 2014)
- forget gates begin open, with a bias of 1 (Jozefowicz et al. 2015; llm/model/init.py)
- embedding, dropout and head are those of a GPT (llm/model/layers.py); a layer's two products are one operation of
  PyTorch's over all positions, which no layout cuts

Shapes: B batch, T time (sequence), C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.errors import require
from llm.model.init import init_weights
from llm.model.layers import DenseLayers, Documents, Linear, replicated


class LSTMState:
    """What the layers know of earlier positions: h and c, each [1, B, C], by the layer's number."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def select(self, rows: Tensor) -> LSTMState:
        """The state of `rows`, int64 [R], of these rows."""
        chosen = LSTMState()
        chosen.layers = {i: (h[:, rows], c[:, rows]) for i, (h, c) in self.layers.items()}
        return chosen


class Recurrence(nn.Module):
    """One layer over all positions. The rows of its weights are those of i, f, g and o."""

    def __init__(self, width: int, index: int, *, bias: bool) -> None:
        super().__init__()
        self.index = index
        self.input = replicated(Linear(width, 4 * width, bias=bias))
        self.recurrent = replicated(Linear(width, 4 * width, bias=False))  # one bias: a second would add to the same

    def forward(self, x: Tensor, state: LSTMState | None) -> Tensor:
        """x [B, T, C] -> h [B, T, C]; goes on from `state` and leaves the last position's there, if it is given."""
        zero = x.new_zeros(1, x.shape[0], x.shape[2])
        before = (zero, zero) if state is None else state.layers.get(self.index, (zero, zero))
        weights, bias = [self.input.weight, self.recurrent.weight], cast("Tensor | None", self.input.bias)
        if bias is not None:
            weights += [bias, torch.zeros_like(bias)]  # the operation takes two, or none
        y, h, c = torch.lstm(x, before, weights, bias is not None, 1, 0.0, self.training, False, True)
        if state is not None:
            state.layers[self.index] = h, c
        return y


class LSTMBlock(nn.Module):
    """A layer, and dropout on what it hands up."""

    def __init__(self, config: ModelConfig, layers: DenseLayers, index: int) -> None:
        super().__init__()
        self.lstm = Recurrence(config.d_model, index, bias=config.bias)
        self.dropout = layers.dropout(config.dropout, 1 + index)

    def forward(self, x: Tensor, positions: Tensor, samples: Tensor, state: LSTMState | None) -> Tensor:
        """x [B, T, C], positions int64 [T] in the row, global sample numbers int64 [B] -> [B, T, C]."""
        return self.dropout(self.lstm(x, state), samples, positions)


class LSTM(nn.Module):
    """The model with its initial weights; on the meta device with none. It is called as a GPT is.

    layers: the factory of embedding, dropout and head, whose seed is that of the weights too (by default plain layers).
    """

    def __init__(self, config: ModelConfig, layers: DenseLayers | None = None) -> None:
        super().__init__()
        C, layers = config.d_model, layers or DenseLayers()
        self.config, self.forms = config, layers.forms
        self.embedding = layers.embedding(config.vocab_size, C)
        self.embedding_dropout = layers.dropout(config.dropout, 0)
        self.blocks = nn.ModuleDict({str(i): LSTMBlock(config, layers, i) for i in range(config.n_layer)})
        self.head = layers.lm_head(C, config.vocab_size, self.embedding if config.tie_embeddings else None)
        init_weights(self, config, layers.seed)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        samples: Tensor,
        documents: Documents | None = None,
        cache: LSTMState | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, C]; the arguments are those of `forward`."""
        require(documents is None, "an LSTM's state runs on through a row; expected documents of one row each (None)")
        x = self.embedding_dropout(self.embedding(tokens), samples, positions)
        for block in cast("Iterable[LSTMBlock]", self.blocks.values()):
            x = block(x, positions, samples, cache)
        return x

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        targets: Tensor | None = None,
        documents: Documents | None = None,
        cache: LSTMState | None = None,
    ) -> Tensor:
        """Logits fp32 [B, T, V], or with `targets` the sum of their losses, fp32 []; as of GPT (llm/model/gpt.py).

        cache: the state after the positions before these. positions and samples key the dropout masks alone. Raises
        InputError where they are needed and not given, and for documents.
        """
        if positions is None or samples is None:
            require(
                self.config.dropout == 0 or not self.training,
                "dropout masks are keyed by positions, int64 [T], and samples, the rows' numbers in the training data, "
                "int64 [B]; give both",
            )
            positions, samples = (torch.arange(n, device=tokens.device) for n in reversed(tokens.shape))
        return self.head(self.states(tokens, positions, samples, documents, cache), targets)
