"""Learning-rate schedules, as classes that YAML can name."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Rises linearly over `warmup_steps`, then falls along a cosine to `final_share` at `total_steps`."""

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_share: float = 0.03) -> None:
        def share(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, share)


class WarmupInverseSquareRoot(LambdaLR):
    """Rises linearly over `warmup_steps`, then falls with the square root of the step: the reference's schedule."""

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int) -> None:
        warmup = max(1, warmup_steps)
        super().__init__(optimizer, lambda step: min((step + 1) / warmup, math.sqrt(warmup / (step + 1))))
