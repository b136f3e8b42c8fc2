"""Cross-entropy in plain PyTorch, of logits and of a linear layer."""

import torch
from torch import Tensor

from kernels.cross_entropy.vocabulary import FullVocabulary, Vocabulary
from kernels.dispatch import wide


def cross_entropy(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, ignore_index: int = -100, softcap: float = 0.0,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses, log-sum-exp without a gradient) [N] each; see kernels.cross_entropy.cross_entropy."""
    vocabulary = vocabulary or FullVocabulary(logits.shape[-1])
    z = wide(logits)[:, : vocabulary.rows]
    z = softcap * torch.tanh(z / softcap) if softcap > 0 else z
    one_hot = (targets - vocabulary.start).unsqueeze(-1) == torch.arange(vocabulary.rows, device=z.device)
    own_target = torch.where(one_hot, z, 0.0).sum(-1)
    own_sum = z.logsumexp(-1) if vocabulary.rows else z.sum(-1) - torch.inf
    log_sum, target = vocabulary.join(own_sum.detach(), own_target.detach())
    # Of the joined values only this rank's part has a gradient: dlog_sum / down_sum = exp(own_sum - log_sum).
    share = (own_sum - log_sum).exp()
    joined_sum, joined_target = log_sum + share - share.detach(), target + own_target - own_target.detach()
    losses = joined_sum - joined_target + z_loss * joined_sum.square()
    counted = targets != ignore_index
    return torch.where(counted, losses, 0.0), torch.where(counted, log_sum, 0.0)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    """The sum of the losses of logits x weight^T; see kernels.cross_entropy.linear_cross_entropy."""
    return cross_entropy(wide(x) @ wide(weight).t(), targets, **options)[0].sum()
