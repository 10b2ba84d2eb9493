"""Group norm over the valid frames of each row alone, so that a row does not depend on the padding of its batch."""

from __future__ import annotations

from torch import Tensor, nn


class MaskedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose mean and variance are those of the valid frames. Without padding it is the same."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[B, C, F] -> the same.

        Args:
            x: What is normalized.
            mask: [B, 1, F], 1 where a frame is valid, at least one in each row; None where all are.
        """
        if mask is None:
            return super().forward(x)
        # As autocast has it for the norm that this replaces.
        grouped = x.float().unflatten(1, (self.num_groups, -1))
        valid = mask.float()[:, None]
        number = valid.sum(-1, keepdim=True) * grouped.shape[2]
        centred = (grouped - (grouped * valid).sum((2, 3), keepdim=True) / number) * valid
        variance = centred.square().sum((2, 3), keepdim=True) / number
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, F] with 0 where `mask`, [B, 1, F], is; as it is without one."""
    return x if mask is None else x * mask
