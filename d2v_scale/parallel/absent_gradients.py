"""A parameter that a step does not use has gradient zero, at every stage, with and without offload.

A step of one modality leaves the other stems out, and layer drop leaves blocks out. At stages 1 and 2 on the device
DeepSpeed 0.19 then takes zero. Elsewhere it keeps gradients in buffers that only a backward pass through the parameter
writes: the optimizer would apply the gradient of some earlier step again, at stages 1 and 2 with offload and at stage
3. With offload it also copies for the optimizer only what the last micro-batch has reduced.

So what a step has left out is set to zero here, and what only an earlier micro-batch has used is copied. Local: no
collectives, and where nothing was left out nothing is written.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class AbsentGradients(Protocol):
    """What the engine calls in every step."""

    def after_first_backward(self) -> None:
        """The first micro-batch is in the buffers: what it did not use must not hold an earlier step's gradient."""

    def before_step(self) -> None:
        """All micro-batches are in the buffers: what the optimizer reads must be this step's gradient."""


def absent_gradients(zero_optimizer: Any, stage: int) -> AbsentGradients:
    """For DeepSpeed's ZeRO optimizer of this stage.

    Every buffer is looked up here, so that a DeepSpeed which keeps its gradients elsewhere fails before it trains.
    """
    if stage == 3:
        return _Partitioned(zero_optimizer)
    return _OnHost(zero_optimizer) if zero_optimizer.cpu_offload else _OnDevice()


class _OnDevice:
    """Stages 1 and 2 without offload: DeepSpeed builds the gradient anew, with zeros for what has none."""

    def after_first_backward(self) -> None:
        pass

    def before_step(self) -> None:
        pass


class _OnHost:
    """Stages 1 and 2 with offload: the optimizer reads one flat gradient a group, in host memory."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._read: dict[int, Tensor] = {}
        """By parameter: its range of what the optimizer reads."""
        for number, (group, _, offset, numel) in zero.grad_position.items():
            self._read[number] = zero.single_partition_of_fp32_groups[group].grad.narrow(0, offset, numel)
        self._accumulated: dict[int, Tensor] = zero.accumulated_grads_in_cpu
        """By parameter, once it was needed: the sum over micro-batches."""
        assert isinstance(zero.norm_for_param_grads, dict)
        assert isinstance(zero._offload_accumulated_param_ids, set)

    def after_first_backward(self) -> None:
        used = self._zero._offload_accumulated_param_ids
        _zero([buffer for number, buffer in self._accumulated.items() if number not in used])

    def before_step(self) -> None:
        zero = self._zero
        # A parameter has a norm once it was copied for the optimizer, which is in the last micro-batch.
        missing = self._read.keys() - zero.norm_for_param_grads.keys()
        earlier = missing & zero._offload_accumulated_param_ids
        _zero([self._read[number] for number in missing - earlier])
        if earlier:
            zero._offload_accumulated_param_ids = earlier
            zero.finalize_gradient_accumulation_boundary()


class _Partitioned:
    """Stage 3: every parameter's share of the gradient, and with offload once more for the optimizer."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._accumulated: dict[int, Tensor] = {}
        """By parameter: the sum over micro-batches."""
        self._read: dict[int, Tensor] = {}
        """With offload, by parameter: its range of what the optimizer reads."""
        self._norms: dict[int, int] = {}
        """By parameter: its key in DeepSpeed's table of norms."""
        assert isinstance(zero._offload_boundary_param_ids, set)
        offset = 0
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            number, numel = parameter.ds_id, parameter.partition_numel()
            if numel * zero._get_param_partition_rank(parameter) >= parameter.ds_numel:
                offset += numel  # this rank has nothing but padding of it
                continue
            self._accumulated[number] = zero.grad_partitions_flat_buffer.narrow(0, offset, numel)
            offset += numel
            if zero.offload_optimizer:
                self._norms[number] = zero.get_param_id(parameter)
                group, start, numel = zero.grad_position[self._norms[number]]
                self._read[number] = zero.fp32_partitioned_groups_flat[group].grad.narrow(0, start, numel)
        assert offset == zero.grad_partitions_flat_buffer.numel(), "gradients of stage 3 are kept in another order"

    def after_first_backward(self) -> None:
        used = self._zero._offload_boundary_param_ids
        _zero([buffer for number, buffer in self._accumulated.items() if number not in used])

    def before_step(self) -> None:
        zero = self._zero
        missing = {number for number in self._read if self._norms[number] not in zero.norm_for_param_grads}
        earlier = missing & zero._offload_boundary_param_ids
        _zero([self._read[number] for number in missing - earlier])
        if earlier:
            zero._offload_boundary_param_ids = earlier
            zero.finalize_gradient_accumulation_boundary()


def _zero(tensors: list[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(tensors)
