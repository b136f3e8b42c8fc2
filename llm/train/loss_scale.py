"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2).

The loss is multiplied by a scale so that small gradients do not become zero in fp16. A step whose
gradients overflow is skipped and the scale falls; after a long run of good steps it rises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DynamicLossScale:
    """The scale and all that its next value depends on; the same sequence as DeepSpeed's scaler."""

    scale: float = 2.0**16
    """The loss is multiplied by this."""
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows since the last rise of the scale before it starts to fall."""
    minimum: float = 1.0
    """The scale never falls below this."""
    remaining: int = 2
    """Of `hysteresis`, how many are left."""
    good_steps: int = 0
    """Steps without overflow since the last one with it."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, JSON-ready; the other fields are settings."""
        return {"scale": self.scale, "remaining": self.remaining, "good_steps": self.good_steps}

    def update(self, overflow: bool) -> DynamicLossScale:
        """The state after a step whose gradients did or did not overflow.

        Raises:
            FloatingPointError: an overflow at the smallest scale: the run has diverged.
        """
        if not overflow:
            count = self.good_steps + 1
            # As in DeepSpeed, the scale rises one step after `window` good ones.
            if self.good_steps == 0 or self.good_steps % self.window:
                return replace(self, good_steps=count)
            return replace(self, scale=2 * self.scale, remaining=self.hysteresis, good_steps=count)
        if self.remaining > 1:
            return replace(self, remaining=self.remaining - 1, good_steps=0)
        if self.scale <= self.minimum:
            raise FloatingPointError(
                f"gradients overflow fp16 at the smallest loss scale ({self.minimum}): the run has "
                "diverged; lower optim.lr, raise optim.warmup_steps or use train.precision=bf16"
            )
        return replace(self, scale=max(self.scale / 2, self.minimum), good_steps=0)
