"""How fast the teacher follows the student (spec 1.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2v_scale.data2vec.config import EmaConfig


def decay(config: EmaConfig, completed_updates: int) -> float:
    """Decay of the teacher update that follows optimizer update number `completed_updates` (1 for the first).

    Linear from `start` to `end` over `anneal_steps`. `completed` reads the schedule at that number (fairseq; the start
    value itself is never used), `zero_based` one earlier (data2vec_vision). A decay of 1 or more: see `is_frozen`.
    """
    n = completed_updates if config.index == "completed" else completed_updates - 1
    if n >= config.anneal_steps:
        return config.end
    return config.end - (config.end - config.start) * (1.0 - max(n, 0) / config.anneal_steps)


def is_frozen(decay: float) -> bool:
    """True when the teacher no longer moves at all: neither averaged nor copied tensors change."""
    return decay >= 1.0


@torch.no_grad()
def average_(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, in the teacher's precision (fp32).

    Tensor by tensor; each pair is of one shape and on one device.
    """
    pairs = zip(teacher, student, strict=True)
    torch._foreach_lerp_(list(teacher), [source.to(values.dtype) for values, source in pairs], 1.0 - decay)
