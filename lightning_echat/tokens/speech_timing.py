"""How many adapter outputs an utterance of so many mel frames yields.

This is the one formula that placeholders, encoder and adapter agree on. Every strided convolution of the path maps n
valid frames to ceil(n / stride), by each clip's own length and never by the padded length of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Length = TypeVar("Length", int, Tensor)


def strided_length(length: Length, stride: int) -> Length:
    """Valid frames after a convolution of `stride`: ceil(length / stride), for an int or an int64 tensor."""
    return (length + stride - 1) // stride


def num_embeddings(num_frames: Length, strides: Sequence[int]) -> Length:
    """Adapter outputs for `num_frames` mel frames through convolutions of `strides`, in their order."""
    for stride in strides:
        num_frames = strided_length(num_frames, stride)
    return num_frames
