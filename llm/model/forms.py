"""The form of each operation of a model, and attention by one backend of PyTorch's operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Forms(NamedTuple):
    """The form of each operation, as kernels/dispatch.py names them.

    Attention's may also be one of BACKENDS, or `atomic`: the Triton form with deterministic=False. The gradients of
    `flash` have the same bits on every run where `deterministic` asks for it, those of `gluon` always; those of `cudnn`
    and `atomic` never have.
    """

    attention: str = "auto"
    embedding: str = "auto"
    rope: str = "auto"
    norm: str = "auto"
    dropout: str = "auto"
    activation: str = "auto"
    loss: str = "auto"
    adamw: str = "auto"
    deterministic: bool = True

    @property
    def attention_impl(self) -> str:
        """Attention's form without the word for how its backward pass adds up."""
        return "triton" if self.attention == "atomic" else self.attention

    @staticmethod
    def of(impl: str) -> Forms:
        """`impl` for every operation; "gluon", which only attention has, and Triton for the others."""
        others = "triton" if impl == "gluon" else impl
        return Forms._make([impl, *[others] * 7, True])


def backend_attention(q: Tensor, k: Tensor, v: Tensor, forms: Forms) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v by one of BACKENDS: q [B, T, H, D], k and v [B, T, K, D] -> as q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS[forms.attention]):  # RuntimeError where it cannot run
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if forms.deterministic and o.grad_fn is not None and not torch.are_deterministic_algorithms_enabled():
        # The backward pass reads this switch of the process, with which other operators would be slow or refuse to run.
        o.grad_fn.register_prehook(lambda _: torch.use_deterministic_algorithms(True))
        o.grad_fn.register_hook(lambda *_: torch.use_deterministic_algorithms(False))
    return o.transpose(1, 2)
