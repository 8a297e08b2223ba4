"""The student's fp32 values in host memory, where an offloaded optimizer keeps them, for a teacher on a CUDA device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class HostSource:
    """Brings values to the device, a group of tensors at a time, without the host waiting for the device's work.

    Two pinned buffers, each of the size of the largest group, take turns.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        """`largest`: most elements of a group."""
        self._device = device
        self._buffers = [_pinned(largest) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def bring(self, group: Sequence[Tensor]) -> list[Tensor]:
        """fp32 copies of flat host tensors, there when the current stream gets to what follows. Local."""
        turn, self._turn = self._turn, 1 - self._turn
        # What was last sent from this buffer may still be under way.
        self._sent[turn].synchronize()
        sizes = [values.numel() for values in group]
        staged = self._buffers[turn][: sum(sizes)]
        for part, values in zip(staged.split(sizes), group, strict=True):
            part.copy_(values)
        arrived = torch.empty(len(staged), device=self._device).copy_(staged, non_blocking=True)
        self._sent[turn].record()
        return list(arrived.split(sizes))


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, pin_memory=True)
