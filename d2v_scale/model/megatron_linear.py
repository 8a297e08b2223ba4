"""megatron-core's tensor-parallel linears, as `parallel_linear` builds them where a model may be divided.

Imported only then: megatron-core is slow to import, and needs process groups.
"""

import functools
from typing import Any

import torch
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from d2v_scale.model import cpu_ops


def tensor_size() -> int:
    """Tensor-parallel ranks; parallel_state must be initialised."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_rank() -> int:
    """This process's number among the tensor-parallel ranks."""
    return parallel_state.get_tensor_model_parallel_rank()


@functools.cache
def _megatron_config(dtype: torch.dtype) -> ModelParallelConfig:
    # CPU initialisation only means that the weight is allocated on the current default device: `init.py` fills it.
    return ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype)


def _no_init(weight: Tensor) -> None:
    del weight


class _Column(ColumnParallelLinear):
    """megatron's, with the product from `cpu_ops` where that applies."""

    _given_bias: Tensor | None = None

    def forward(self, input_: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(full inputs) to (local outputs, None). `bias`: of the local outputs, where it has none of its own."""
        if torch.compiler.is_compiling() and tensor_size() == 1:
            # megatron's own warns on the way, and each warning would cut the graph in two.
            return cpu_ops.linear(input_, self.weight, self.bias if bias is None else bias), None
        self._given_bias = bias
        try:
            return super().forward(input_)
        finally:
            self._given_bias = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._given_bias is not None:
            kwargs["bias"] = self._given_bias
        # With several tensor-parallel ranks megatron starts the all-reduce of the input's gradient in here.
        if cpu_ops.applies(input) and not kwargs["allreduce_dgrad"]:
            return cpu_ops.linear(input, weight, kwargs["bias"])
        return super()._forward_impl(input, weight, *args, **kwargs)


class _Row(RowParallelLinear):
    """megatron's, with the product from `cpu_ops` where that applies."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(local inputs) to (full outputs, None)."""
        if (cpu_ops.applies(input_) or torch.compiler.is_compiling()) and tensor_size() == 1:
            return cpu_ops.linear(input_, self.weight, self.bias), None
        return super().forward(input_)


def column(inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    """Linear whose outputs are split over the tensor-parallel ranks; forward returns (local outputs, None)."""
    layer: Any = _Column(
        inputs,
        outputs,
        config=_megatron_config(torch.get_default_dtype()),
        init_method=_no_init,
        bias=bias,
        gather_output=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    # megatron tags a weight only where it initialises it; DeepSpeed's gradient norm needs the tag.
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    return layer


def row(inputs: int, outputs: int) -> nn.Module:
    """Linear whose inputs are split over the tensor-parallel ranks; forward returns (full outputs, None)."""
    layer: Any = _Row(
        inputs,
        outputs,
        config=_megatron_config(torch.get_default_dtype()),
        init_method=_no_init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    return layer


def split(size: int) -> nn.Parameter:
    """A vector of `size` elements of which each tensor-parallel rank holds a contiguous part."""
    parameter = nn.Parameter(torch.empty(size // tensor_size()))
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def for_local_heads(parameter: Tensor) -> Tensor:
    """A replicated parameter on its way into local heads: its gradient is summed over the tensor-parallel ranks.

    Without this each rank would see the gradient of its own heads only, and the copies would drift apart unnoticed.
    """
    return copy_to_tensor_model_parallel_region(parameter, group=parallel_state.get_tensor_model_parallel_group())
