"""Weights stored in float16."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from d2v_scale.errors import CheckpointError

_LARGEST = torch.finfo(torch.float16).max


def require_half(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises CheckpointError for the first tensor with a value that float16 does not hold."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= _LARGEST:  # nor NaN
            raise CheckpointError(
                f"{name} holds {largest:g}, and float16 nothing above {_LARGEST:g}.", "Leave --half out."
            )


def halved(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in float16."""
    for name, tensor in tensors:
        yield name, tensor.half() if tensor.is_floating_point() else tensor
