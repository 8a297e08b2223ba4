"""The norm of gradients on a CPU, without a copy of them.

DeepSpeed's stages 1 and 2 convert every gradient to double precision for it; on a CPU most of the optimizer's time is
then fresh memory. Here piece by piece is converted, in cache, and a rank that shares its gradients with nobody asks
nobody. Where DeepSpeed's function is not that of 0.19.8, it is left as it is: the same norm, slower.
"""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_EXPECTED = "72af0993ad8cde2c"
"""The start of the SHA-256 of the source of DeepSpeed's `get_grad_norm_direct`."""
CHUNK = 1 << 18
"""Values that are worked on at once: even as doubles they stay in the cache."""
_ROW = 64
"""Values whose squares are added in single precision where only the record and the spikes read the norm."""
_ROWS = 128
"""From how many rows on that is worth a call of its own."""


def bind(zero: Any) -> None:
    """Let DeepSpeed's `zero` measure this way from now on, where its masters are on a CPU, at stage 1 or 2
    without offload. Local; once built."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if type(zero) is not DeepSpeedZeroOptimizer or zero.cpu_offload or digest(DeepSpeedZeroOptimizer) != _EXPECTED:
        return
    if any(master.device.type != "cpu" for master in zero.single_partition_of_fp32_groups):
        return
    alone = dist.get_world_size(zero.dp_process_group) == 1
    squares = _Squares(exact=zero.clip_grad > 0)

    def norm(gradients: Iterable[Tensor], params: Iterable[Tensor], norm_type: float = 2) -> Tensor:
        """DeepSpeed's, of the same gradients: float32, -1 where it is not finite. Collective."""
        from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

        assert norm_type == 2, "DeepSpeed asks for no other"
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        counted = [gradient for gradient, param in zip(real, params, strict=False) if _counts(zero, param)]
        total = squares.sum(counted).float()
        if not alone:
            dist.all_reduce(total, group=zero.dp_process_group)
        zero._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        found = total.sqrt()
        mask_nan_or_inf_with_val_inplace(found, device=zero.device)
        return found

    zero.get_grad_norm_direct = norm


def digest(optimizer: type) -> str | None:
    """Of its `get_grad_norm_direct`; None: it has none."""
    norm = getattr(optimizer, "get_grad_norm_direct", None)
    return None if norm is None else hashlib.sha256(inspect.getsource(norm).encode()).hexdigest()[:16]


def _counts(zero: Any, parameter: Any) -> bool:
    """Whether this rank counts a parameter that others may have whole as well."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return bool(is_model_parallel_parameter(parameter)) or zero.model_parallel_rank == 0


class _Squares:
    """Adds the squares of gradients, in double precision; not `exact`: those of `_ROW` neighbours in single precision,
    which changes the norm by parts in 10^10 and takes less than half of the time."""

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._buffer = torch.empty(CHUNK, dtype=torch.float64)

    def sum(self, gradients: Iterable[Tensor]) -> Tensor:
        """0-dim, float64."""
        total = torch.zeros((), dtype=torch.float64)
        rest = []
        for gradient in gradients:
            flat_n = gradient.detach().reshape(-1)
            rows = 0 if self._exact or flat_n.dtype != torch.float32 else flat_n.numel() // _ROW
            if rows >= _ROWS:
                lengths_r = torch.linalg.vector_norm(flat_n[: rows * _ROW].view(rows, _ROW), dim=1)
                rest.append(lengths_r)
                flat_n = flat_n[rows * _ROW :]
            rest.append(flat_n)
        for parts in chunks(rest):
            filled_n = filled(self._buffer, parts)
            total += filled_n.dot(filled_n)
        return total


def chunks(flat: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """One-dimensional tensors in runs of `CHUNK` values, the last of what is left; longer ones are cut."""
    parts: list[Tensor] = []
    room = CHUNK
    for whole_n in flat:
        for start in _starts(room, whole_n.numel()):
            part_n = whole_n if start == 0 and whole_n.numel() <= room else whole_n[start : start + room]
            parts.append(part_n)
            room -= part_n.numel()
            if room == 0:
                yield parts
                parts, room = [], CHUNK
    if parts:
        yield parts


def _starts(room: int, numel: int) -> Iterator[int]:
    """Where the parts of a tensor begin of which the first has room for this many values."""
    if numel > 0:
        yield 0
        yield from range(room, numel, CHUNK)


def filled(buffer: Tensor, parts: list[Tensor]) -> Tensor:
    """The part of `buffer` that these fill, one after the other, in its type."""
    end = 0
    for part_n in parts:
        start, end = end, end + part_n.numel()
        buffer[start:end].copy_(part_n)
    return buffer[:end]
