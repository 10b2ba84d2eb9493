"""Lists of numbers as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def id_tensor(numbers: Sequence[int]) -> Tensor:
    """[n] int64 of a list; five times as fast as `torch.tensor`, which adds up where readers make many a dialogue."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))
