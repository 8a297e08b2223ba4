"""Learned tables of positions on a grid of patches, and how one is laid over another grid."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PositionTable:
    """A parameter (N, D) that has a row for each place of a grid; of them rows that are no places (extra tokens') come
    last."""

    grid: tuple[int, ...]
    """Patches along each axis."""
    offsets: bool = False
    """Whether a place is an offset from one patch to another (2 g - 1 of them along an axis of g patches), instead of a
    patch."""

    @property
    def extents(self) -> tuple[int, ...]:
        """Places along each axis."""
        return tuple(2 * size - 1 for size in self.grid) if self.offsets else self.grid

    @property
    def places(self) -> int:
        """Rows of places."""
        return math.prod(self.extents)

    def laid_over(self, values_nd: Tensor, target: "PositionTable", *, non_negative: bool = False) -> Tensor:
        """The rows for the grid of `target`, which has as many axes: (M, D).

        Interpolated along one axis after the other, cubically as ViT's positions are (Dosovitskiy et al. 2021, 3.2;
        antialiased where an axis gets shorter), or with `non_negative` linearly, which makes no negative of values
        that are not. The whole of an axis stays the whole of it, the offset 0 stays the offset 0, and rows that are no
        places stay as they are.
        """
        assert len(self.grid) == len(target.grid)
        found = values_nd[: self.places].reshape(*self.extents, -1)
        for axis, size in enumerate(target.extents):
            if size != found.shape[axis]:
                found = _resized(found, axis, size, "bilinear" if non_negative else "bicubic")
        return torch.cat((found.reshape(target.places, -1), values_nd[self.places :]))


def _resized(x: Tensor, axis: int, size: int, mode: str) -> Tensor:
    length = x.shape[axis]
    # torch interpolates images: one that is the identity, made as high as wanted, holds the weights.
    image = torch.eye(length, dtype=x.dtype)[None, None]
    weights_sl = F.interpolate(image, (size, length), mode=mode, align_corners=False, antialias=size < length)[0, 0]
    return torch.tensordot(weights_sl, x, dims=([1], [axis])).movedim(0, axis)
