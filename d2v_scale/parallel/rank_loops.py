"""Two loops over ranks in ZeRO-3 of DeepSpeed 0.19, replaced by strided views: the same bytes, the same bits.

DeepSpeed cuts a gathered or scattered buffer into one Python object for every parameter and rank, so that the host's
time of a step grows with the world: at 1,024 ranks it makes four times the Python calls that it makes at 8. A buffer of
`world_size` equal rows needs no cutting: what all ranks hold of one parameter is a range of its columns.

Replaced, as they are in DeepSpeed 0.19.8:

- the coalesced all-gather of `partition_parameters.Init` and the wait for it (`AllGatherCoalescedHandle`);
- `coalesced_collectives.reduce_scatter_coalesced`, which ZeRO-3 calls for every bucket of gradients.

Where DeepSpeed's source is another, its own code runs, and one warning says so (`replace`). ZeRO-1 and 2 need no
replacement: there `ds_config` chooses the way of DeepSpeed's that has no loop.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("d2v_scale.train")

WRITTEN_FOR = "0.19.8"
"""The DeepSpeed whose code is replaced."""

_EXPECTED = {
    "Init._convert_to_deepspeed_param": "77281d2526a148fb",
    "AllGatherCoalescedHandle": "79b87e73228895e1",
    "reduce_scatter_coalesced": "89aab0f80f1a80b3",
}
"""What is replaced, or is relied on by what replaces it -> the start of the SHA-256 of its source."""

_replaced: bool | None = None
"""What `replace` did in this process; None before it was called."""


def replace() -> bool:
    """Replace both loops in this process; True where that is done. Local; again is no more. Call before `zero.Init`.

    A DeepSpeed whose source differs from what was replaced keeps its own loops, and a warning names what differs.
    """
    from deepspeed.runtime.zero import partition_parameters, stage3

    global _replaced
    if _replaced is not None:
        return _replaced
    differing = [name for name, digest in digests().items() if digest != _EXPECTED[name]]
    _replaced = not differing
    if differing:
        import deepspeed

        # All ranks say the same.
        say = log.warning if not dist.is_initialized() or dist.get_rank() == 0 else log.debug
        say(
            "DeepSpeed %s has another %s than %s, for which its loops over ranks were replaced: its own code runs, and "
            "the host's time of a ZeRO-3 step grows with the number of ranks.",
            deepspeed.__version__,
            " and ".join(differing),
            WRITTEN_FOR,
        )
        return False
    init = partition_parameters.Init
    convert = init._convert_to_deepspeed_param

    def converted(self: Any, parameter: Any) -> None:
        convert(self, parameter)
        parameter.all_gather_coalesced = gather_with(self, parameter.all_gather_coalesced)

    init._convert_to_deepspeed_param = converted
    stage3.reduce_scatter_coalesced = reduce_scatter_with(stage3.reduce_scatter_coalesced)
    return True


def digests() -> dict[str, str]:
    """The start of the SHA-256 of each source that `replace` relies on, as installed; "" where it is gone."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    found = {}
    for name in _EXPECTED:
        owner = coalesced_collectives if name == "reduce_scatter_coalesced" else partition_parameters
        value: Any = owner
        for part in name.split("."):
            value = getattr(value, part, None)
        try:
            source = inspect.getsource(value)
        except (TypeError, OSError):
            found[name] = ""
        else:
            found[name] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return found


class StridedGather:
    """An all-gather of several parameters under way; DeepSpeed's coordinator waits for it.

    `gathered_wn` (world_size, N): each rank's partitions of all parameters, one after the other.
    """

    def __init__(self, handle: Any, parameters: list[Any], gathered_wn: Tensor) -> None:
        self._handle = handle
        self._parameters = parameters
        self._gathered_wn: Tensor | None = gathered_wn

    def wait(self, handle_dependency: bool = True) -> None:
        """Give every parameter its values. `handle_dependency` False: the caller keeps streams apart, as in DeepSpeed's
        handle, and frees the buffer (`AllGatherCoalescedHandle.free_buffer`)."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

        if self._gathered_wn is None:
            return
        self._handle.wait()
        gathered_wn, self._gathered_wn = self._gathered_wn, None
        first = 0
        for parameter in self._parameters:
            size = parameter.ds_tensor.ds_numel
            assert parameter.ds_status == ZeroParamStatus.INFLIGHT, f"expected {parameter.ds_summary()} to be inflight"
            # A copy, as DeepSpeed's: the columns of one parameter do not lie together.
            values = gathered_wn[:, first : first + size].reshape(-1)[: parameter.ds_numel]
            parameter.data = values.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            first += size
        accelerator = get_accelerator()
        if not accelerator.is_synchronized_device():
            if handle_dependency:
                gathered_wn.record_stream(accelerator.current_stream())
            else:
                AllGatherCoalescedHandle.data_buffer.append([gathered_wn])


def gather_with(init: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A parameter's `all_gather_coalesced`, as `init` (a `zero.Init`) makes it, with `theirs` for what is rare."""

    def gather(parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
        parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
        if safe_mode or quantize or not _is_plain(init, parameters):
            return theirs(parameters, safe_mode=safe_mode, quantize=quantize)
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, _dist_allgather_fn

        for parameter in parameters:
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(parameter.ds_summary())
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        device = get_accelerator().current_device_name()
        group, rank = init.get_partition_dp_group(parameters[0]), init._partition_rank(parameters[0])
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
        own = [parameter.ds_tensor.to(device) for parameter in parameters]
        gathered_wn = torch.empty(
            (init._partition_world_size(parameters[0]), sum(sizes)), dtype=own[0].dtype, device=device
        )
        torch.cat(own, out=gathered_wn[rank])
        handle = _dist_allgather_fn(gathered_wn[rank], gathered_wn.view(-1), group)
        return StridedGather(handle, parameters, gathered_wn)

    return gather


def _is_plain(init: Any, parameters: list[Any]) -> bool:
    """Several parameters, of one type and group, in memory, each held once: what a `StridedGather` is for."""
    if len(parameters) < 2 or init.allgather_sequential or init.use_all_reduce_for_fetch_params:
        return False
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, get_allgather_dtype

    first = parameters[0]
    group = init.get_partition_dp_group(first)
    return init._partition_world_size(first) > 1 and all(
        parameter.ds_secondary_tensor is None
        and not hasattr(parameter.ds_tensor, "ds_quant_scale")
        and parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE
        and init.get_partition_dp_group(parameter) is group
        and parameter.ds_tensor.dtype == first.ds_tensor.dtype
        and get_allgather_dtype(parameter, parameter.ds_tensor) == parameter.ds_tensor.dtype
        for parameter in parameters
    )


def reduce_scatter_with(theirs: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """`reduce_scatter_coalesced` without loops over ranks, with `theirs` for what is rare."""

    @torch.no_grad()
    def reduce_scatter(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
        from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn

        if not tensors or any(not x.numel() or x.dtype != tensors[0].dtype for x in tensors):
            return theirs(tensors, group)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        sizes = [-(-x.numel() // world_size) for x in tensors]
        if len(tensors) == 1 and tensors[0].numel() % world_size == 0:
            rows_wn = tensors[0].view(world_size, -1)
        else:
            # What pads the last rows is never read.
            rows_wn = tensors[0].new_empty(world_size, sum(sizes))
            first = 0
            for x, size in zip(tensors, sizes, strict=True):
                _fill(rows_wn[:, first : first + size], x.reshape(-1))
                first += size
        rows_wn.div_(world_size)
        own = rows_wn[rank]
        _torch_reduce_scatter_fn(rows_wn.view(-1), own, group=group)
        found, first = [], 0
        for x, size in zip(tensors, sizes, strict=True):
            found.append(own.narrow(0, first, max(0, min(size, x.numel() - rank * size))))
            first += size
        return found

    return reduce_scatter


def _fill(rows_wn: Tensor, flat: Tensor) -> None:
    """Write a flat tensor into rows, one after the other; the end of the last ones stays as it is."""
    full, rest = divmod(flat.numel(), rows_wn.shape[1])
    rows_wn[:full] = flat[: flat.numel() - rest].view(full, -1)
    if rest:
        rows_wn[full, :rest] = flat[flat.numel() - rest :]
