"""What this rank holds of each student parameter: a flat range of the fp32 master weight and of its Adam moments.

ZeRO-3 cuts every parameter into equal rank-contiguous ranges; ZeRO-1 and 2 cut the concatenation of all parameters of
a group, so a rank may hold all, part or nothing of a parameter. Under tensor parallelism a range is one of the
tensor-parallel slice. Everything here is local: no collectives.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TensorSlice:
    """One of `count` equal slices of a global tensor along `dim`."""

    dim: int
    index: int
    count: int


@dataclass(frozen=True)
class Shard:
    """A flat range [start, start + numel) of the tensor `name`, of which this process holds the values."""

    name: str
    shape: tuple[int, ...]
    """Of the tensor-parallel slice (the whole tensor where there is none)."""
    slice: TensorSlice | None
    start: int
    numel: int
    master: nn.Parameter
    """The flat fp32 tensor that DeepSpeed steps; holds this range at `offset`."""
    offset: int

    @property
    def weight(self) -> Tensor:
        """The fp32 master values of the range: a flat view, to be read or written."""
        return self.master.data.narrow(0, self.offset, self.numel)

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """A flat view of an Adam moment of the range; None before the first update."""
        state = optimizer.state.get(self.master, {})
        return state[key].narrow(0, self.offset, self.numel) if key in state else None


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also when ZeRO-3 has partitioned it (of the tensor-parallel slice)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def tensor_slice(parameter: Tensor, tensor_rank: int, tensor_size: int) -> TensorSlice | None:
    """Which slice of the global tensor this rank has; None where all tensor-parallel ranks have the whole tensor."""
    if tensor_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    assert getattr(parameter, "partition_stride", 1) == 1, "strided tensor-parallel slices are not supported"
    return TensorSlice(int(parameter.partition_dim), tensor_rank, tensor_size)  # type: ignore[attr-defined]


def global_shapes(module: nn.Module, tensor_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters as one process would have them, whatever partitions or slices them."""
    shapes = {}
    for name, parameter in module.named_parameters():
        shape, cut = full_shape(parameter), tensor_slice(parameter, 0, tensor_size)
        if cut is not None:
            shape = tuple(size * cut.count if axis == cut.dim else size for axis, size in enumerate(shape))
        shapes[name] = shape
    return shapes


def part_of(tensor: Tensor, cut: TensorSlice | None, start: int, numel: int) -> Tensor:
    """The flat range [start, start + numel) of a slice of a whole tensor: 1-D."""
    if cut is not None:
        tensor = tensor.chunk(cut.count, dim=cut.dim)[cut.index]
    return tensor.reshape(-1).narrow(0, start, numel)


def partition_range(parameter: Tensor, data_parallel_rank: int) -> tuple[int, int]:
    """(start, numel) of a ZeRO-3 partition without its padding."""
    size, total = parameter.ds_tensor.numel(), parameter.ds_numel  # type: ignore[attr-defined]
    start = min(data_parallel_rank * size, total)
    return start, min(size, total - start)


def student_shards(
    module: nn.Module, zero_optimizer: Any, stage: int, data_parallel_rank: int, tensor_rank: int, tensor_size: int
) -> list[Shard]:
    """The non-empty ranges this rank holds of `module`'s parameters, in the module's order.

    Read off the addresses. DeepSpeed's compute weights lie in flat buffers of its own; after a step it copies each
    flat master into one range of such a buffer, element by element, and what lies there is what the master stands for.
    Its own tables of names are not used: with `round_robin_gradients` they name other parameters.
    """
    flats = flat_masters(zero_optimizer, stage, data_parallel_rank)
    shards = []
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad, f"{name} is frozen; every student parameter must train"
        if stage == 3:
            held = parameter.ds_tensor  # type: ignore[attr-defined]
            first, numel = partition_range(parameter, data_parallel_rank)
        else:
            held, first, numel = parameter.data, 0, parameter.numel()
        found = _overlap(held, numel, flats)
        if found is not None:
            flat, start, offset, numel = found
            cut = tensor_slice(parameter, tensor_rank, tensor_size)
            shards.append(Shard(name, full_shape(parameter), cut, first + start, numel, flat.master, offset))
    return shards


@dataclass(frozen=True)
class Flat:
    """A flat master, and the compute weights that DeepSpeed copies it to after a step."""

    master: nn.Parameter
    compute: Tensor


def flat_masters(zero_optimizer: Any, stage: int, data_parallel_rank: int) -> list[Flat]:
    """This rank's: its partition of each group at stages 1 and 2, each sub-group at stage 3."""
    zero = zero_optimizer
    if stage == 3:
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
    else:
        own = [partitions[data_parallel_rank] for partitions in zero.parallel_partitioned_bit16_groups]
        pairs = zip(zero.single_partition_of_fp32_groups, own, strict=True)
    return [Flat(*pair) for pair in pairs]


def _overlap(held: Tensor, numel: int, flats: list[Flat]) -> tuple[Flat, int, int, int] | None:
    """Where the first `numel` values at `held` lie: the flat, where they begin in `held` and in it, how many."""
    size = held.element_size()
    for flat in flats:
        distance = held.data_ptr() - flat.compute.data_ptr()
        offset, end = distance // size, distance // size + numel
        first, last = max(offset, 0), min(end, flat.compute.numel())
        if first < last and held.device == flat.compute.device:
            assert distance % size == 0, "a weight lies between two values of a flat buffer"
            return flat, first - offset, first, last - first
    return None
