"""Linears of blocks: local heads in, full width out. megatron-core's, or plain ones where nothing divides the model."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_scale.data2vec import stateless
from d2v_scale.errors import ConfigError
from d2v_scale.model import cpu_ops
from d2v_scale.model.init import InitRule, linear_rules, set_rule

_undivided: ContextVar[bool] = ContextVar("undivided", default=False)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Models that are built inside are whole, of plain layers: they need no process group, and run in any process."""
    token = _undivided.set(True)
    try:
        yield
    finally:
        _undivided.reset(token)


def _tensor_size() -> int:
    """Ranks that divide what is built now; outside of `undivided` megatron's parallel_state must be initialised."""
    if _undivided.get():
        return 1
    from d2v_scale.model import megatron_linear

    return megatron_linear.tensor_size()


def local_share(total: int, what: str) -> int:
    """`total` divided by the tensor-parallel size. Raises `ConfigError` if that leaves a rest."""
    ranks = _tensor_size()
    if total % ranks:
        raise ConfigError(
            f"model.backbone.{what}",
            f"{total} is not divisible by the tensor-parallel size {ranks}.",
            "Choose a tensor-parallel size that divides it.",
        )
    return total // ranks


class WholeLinear(nn.Module):
    """A linear that no rank shares, with the forward of megatron's: (outputs, None)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        """(..., inputs) to ((..., outputs), None). `bias` (outputs,): where it has none of its own."""
        return cpu_ops.linear(x, self.weight, self.bias if bias is None else bias), None


def column_linear(inputs: int, outputs: int, *, bias: bool, rule: InitRule) -> nn.Module:
    """Linear whose outputs are split over the tensor-parallel ranks; forward returns (local outputs, None). Without a
    bias of its own it may be given one, of the local outputs, as its second argument."""
    if _undivided.get():
        layer: nn.Module = WholeLinear(inputs, outputs, bias=bias)
    else:
        from d2v_scale.model import megatron_linear

        layer = megatron_linear.column(inputs, outputs, bias=bias)
    linear_rules(layer, rule)
    return layer


def row_linear(inputs: int, outputs: int, *, rule: InitRule) -> nn.Module:
    """Linear whose inputs are split over the tensor-parallel ranks; forward returns (full outputs, None)."""
    if _undivided.get():
        layer: nn.Module = WholeLinear(inputs, outputs, bias=True)
    else:
        from d2v_scale.model import megatron_linear

        layer = megatron_linear.row(inputs, outputs)
    linear_rules(layer, rule)
    return layer


def split_parameter(size: int, rule: InitRule) -> nn.Parameter:
    """A vector of `size` elements of which each tensor-parallel rank holds a contiguous part."""
    if _undivided.get():
        parameter = nn.Parameter(torch.empty(size))
    else:
        from d2v_scale.model import megatron_linear

        parameter = megatron_linear.split(size)
    set_rule(parameter, rule)
    return parameter


@dataclass(frozen=True)
class LocalHeads:
    """The attention heads of a model that are here."""

    first: int
    count: int
    divided: bool
    """Whether other ranks may have others."""

    @classmethod
    def of(cls, heads: int) -> "LocalHeads":
        """Of so many. Raises `ConfigError` where they cannot be shared equally."""
        count = local_share(heads, "heads")
        if _undivided.get():
            return cls(0, count, divided=False)
        from d2v_scale.model import megatron_linear

        return cls(megatron_linear.tensor_rank() * count, count, divided=True)

    def of_parameter(self, parameter: Tensor, dim: int) -> Tensor:
        """Their part, along `dim`, of a parameter that every rank has whole: its gradient is the sum over all heads."""
        if self.divided:
            from d2v_scale.model import megatron_linear

            parameter = megatron_linear.for_local_heads(parameter)
        return parameter.narrow(dim, self.first, self.count)


def own_draws(device: torch.device, needed: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, where `needed`, every tensor-parallel rank draws random numbers of its own.

    Heads and hidden units are each rank's own and must not share a dropout pattern, while everything outside them must.
    """
    if not needed:
        return contextlib.nullcontext()
    from d2v_scale.model import megatron_linear

    return (
        _own_generator(device, megatron_linear.tensor_rank())
        if megatron_linear.tensor_size() > 1
        else contextlib.nullcontext()
    )


@contextlib.contextmanager
def _own_generator(device: torch.device, rank: int) -> Iterator[None]:
    """Draw from a generator that differs between the ranks, and leave the common one in step on all."""
    common = int(torch.randint(1 << 62, ()))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stateless.key(common, rank) >> 1)
        yield
