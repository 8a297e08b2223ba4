"""Where DeepSpeed keeps student and teacher, verified once before training: checkpoints name what they read by it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.shards import Flat, Shard, flat_masters, full_shape, partition_range


def check_layout(module: nn.Module, shards: list[Shard], zero_optimizer: Any, stage: int, topology: Topology) -> None:
    """Raises ConfigError, on all ranks, with the first tensor that is not where `shards` say. Collective.

    Every shard lies in the master that DeepSpeed copies to the weights it is named after, at their place, and has
    their values; no two lie in one place; and those of the data-parallel ranks have each parameter whole. For engines
    as they were built: masters follow from the weights then, and later the other way round.
    """
    rank = topology.data_parallel_rank
    flats = {flat.master.data_ptr(): flat for flat in flat_masters(zero_optimizer, stage, rank)}
    # All of them on every rank: some are collective.
    found = [_misplaced(module, shards, flats, stage, rank), _incomplete(module, shards, topology)]
    if stage == 3:
        found.append(_cut_elsewhere(module, rank))
    _raise_everywhere("student", next(filter(None, found), None), topology)


def check_cut(module: nn.Module, topology: Topology) -> None:
    """Raises ConfigError, on all ranks, with the first of the teacher's tensors that ZeRO-3 cuts elsewhere. Collective.

    `partition_range` says which values a rank holds of a tensor.
    """
    _raise_everywhere("teacher", _cut_elsewhere(module, topology.data_parallel_rank), topology)


def _raise_everywhere(what: str, found: str | None, topology: Topology) -> None:
    """Raise on all ranks what any of them has found. Collective."""
    problems: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(problems, found)
    for rank, problem in enumerate(problems):
        if problem is not None:
            import deepspeed

            raise ConfigError(
                "deepspeed_config",
                f"DeepSpeed {deepspeed.__version__} does not keep the {what} where checkpoints look for it: "
                f"{problem} (rank {rank})",
                "Leave out of the DeepSpeed JSON what ds_configs/ do without, or install another DeepSpeed 0.19.",
            )


def _misplaced(
    module: nn.Module, shards: list[Shard], flats: dict[int, Flat], stage: int, data_parallel_rank: int
) -> str | None:
    """What is wrong with the first shard that is not the master of its weights."""
    weights = dict(module.named_parameters())
    taken: dict[int, tuple[int, str]] = {}
    for shard in sorted(shards, key=lambda shard: (shard.master.data_ptr(), shard.offset)):
        address = shard.master.data_ptr()
        end, other = taken.get(address, (0, ""))
        if shard.offset < end:
            return f"{shard.name} and {other} are in one place"
        taken[address] = (shard.offset + shard.numel, shard.name)
        flat, compute_n = flats.get(address), _weights_of(weights[shard.name], shard, stage, data_parallel_rank)
        if flat is None or compute_n is None or flat.master.numel() != flat.compute.numel():
            return f"{shard.name} has no master weights of its size"
        written_n = flat.compute.narrow(0, shard.offset, shard.numel)
        if written_n.data_ptr() != compute_n.data_ptr():
            return f"the master weights of {shard.name} are another tensor's"
        if not torch.equal(shard.weight.to(compute_n.device, compute_n.dtype), compute_n):
            return f"the master weights of {shard.name} have other values than the tensor"
    return None


def _weights_of(parameter: nn.Parameter, shard: Shard, stage: int, data_parallel_rank: int) -> Tensor | None:
    """The compute weights of a shard; None where this rank has no such range of the parameter."""
    if stage == 3:
        first, numel = partition_range(parameter, data_parallel_rank)
        held_n = parameter.ds_tensor.data[:numel]  # type: ignore[attr-defined]
    else:
        first, held_n = 0, parameter.data.view(-1)
    start = shard.start - first
    return held_n.narrow(0, start, shard.numel) if 0 <= start <= held_n.numel() - shard.numel else None


def _incomplete(module: nn.Module, shards: list[Shard], topology: Topology) -> str | None:
    """The first parameter of which the data-parallel ranks together have too little or too much. Collective."""
    own = {shard.name: shard.numel for shard in shards}
    names = [name for name, _ in module.named_parameters()]
    held_n = torch.tensor([own.get(name, 0) for name in names], dtype=torch.int64, device=topology.device)
    dist.all_reduce(held_n, group=topology.data_parallel_group)
    for (name, parameter), held in zip(module.named_parameters(), held_n.tolist(), strict=True):
        whole = torch.Size(full_shape(parameter)).numel()
        if held != whole:
            return f"of {name} the ranks have {held} values, not {whole}"
    return None


def _cut_elsewhere(module: nn.Module, data_parallel_rank: int) -> str | None:
    """The first parameter whose gathered values are not this rank's in this rank's range. Gathers one at a time."""
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # gathers wait for nothing that was written before them
    found = None
    for name, parameter in module.named_parameters():
        first, numel = partition_range(parameter, data_parallel_rank)
        with deepspeed.zero.GatheredParameters([parameter]):
            whole_n = parameter.data.view(-1).narrow(0, first, numel)
            own_n = parameter.ds_tensor.data[:numel].to(whole_n.device)  # type: ignore[attr-defined]
            if found is None and not torch.equal(whole_n, own_n):
                found = f"rank {data_parallel_rank} has other values of {name} than those from {first} on"
    return found
