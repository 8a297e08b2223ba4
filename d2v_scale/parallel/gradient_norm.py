"""The norm of gradients on a CPU, without a copy of them.

DeepSpeed's stages 1 and 2 convert every gradient to double precision for it; on a CPU most of the optimizer's time is
then fresh memory. Here piece by piece is converted, in cache. Where DeepSpeed's function is not that of 0.19.8, it
is left as it is: the same norm, slower.
"""

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_EXPECTED = "72af0993ad8cde2c"
"""The start of the SHA-256 of the source of DeepSpeed's `get_grad_norm_direct`."""
_CHUNK = 1 << 16
"""Values whose squares are added at once: as doubles they stay in the cache."""


def bind(zero: Any) -> None:
    """Let DeepSpeed's `zero` measure this way from now on, where its masters are on a CPU, at stage 1 or 2
    without offload. Local; once built."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if type(zero) is not DeepSpeedZeroOptimizer or zero.cpu_offload or digest(DeepSpeedZeroOptimizer) != _EXPECTED:
        return
    if any(master.device.type != "cpu" for master in zero.single_partition_of_fp32_groups):
        return
    its_norm = zero.get_grad_norm_direct

    def norm(gradients: Iterable[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        """DeepSpeed's, of the lengths of the gradients, which have the same norm."""
        assert norm_type == 2, "DeepSpeed asks for no other"
        lengths = [length(gradient) for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        found: Tensor = its_norm(lengths, params)
        return found

    zero.get_grad_norm_direct = norm


def digest(optimizer: type) -> str | None:
    """Of its `get_grad_norm_direct`; None: it has none."""
    norm = getattr(optimizer, "get_grad_norm_direct", None)
    return None if norm is None else hashlib.sha256(inspect.getsource(norm).encode()).hexdigest()[:16]


def length(x: Tensor) -> Tensor:
    """The Euclidean norm, added up in double precision."""
    total = torch.zeros((), dtype=torch.float64)
    for chunk in x.detach().reshape(-1).split(_CHUNK):
        values = chunk.double()
        total += values.dot(values)
    return total.sqrt()
