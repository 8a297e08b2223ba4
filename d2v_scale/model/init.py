"""Initial weights as a pure function of (seed, parameter name): the same at any topology and construction order.

Each full tensor is drawn in fp32 on the CPU from a generator of its own, then the part that lives here is written:
the whole, a tensor-parallel slice, or a ZeRO-3 shard of one. No rank talks to another.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_scale.data2vec import stateless


@dataclass(frozen=True)
class InitRule:
    """A distribution. `a`, `b`: constant a | normal with std a | uniform in [a, b) | normal with std a cut at +-b."""

    kind: Literal["constant", "normal", "uniform", "truncated"]
    a: float
    b: float = 0.0
    zero_row: int | None = None
    """Row that is set to zero afterwards (the pad row of an embedding)."""


_NEVER_REACHED = 5.0
"""Standard deviations beyond which next to nothing lies (6 in 10 million), and fp32 cannot invert the normal."""

ZEROS = InitRule("constant", 0.0)
ONES = InitRule("constant", 1.0)
BEIT = InitRule("truncated", 0.02, 0.02)
"""Of `init: beit`."""


def set_rule(parameter: Tensor, rule: InitRule) -> None:
    """Attach the distribution that `initialize` draws this parameter from."""
    parameter.init_rule = rule  # type: ignore[attr-defined]


def linear_rules(module: nn.Module, weight: InitRule, bias: InitRule = ZEROS) -> None:
    """Attach rules to a module's `weight` and, where it has one, `bias`."""
    assert isinstance(module.weight, Tensor)
    set_rule(module.weight, weight)
    if isinstance(module.bias, Tensor):
        set_rule(module.bias, bias)


def initial_tensor(name: str, full_shape: tuple[int, ...], rule: InitRule, seed: int) -> Tensor:
    """The full fp32 CPU tensor that parameter `name` starts from."""
    tensor = torch.empty(full_shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(stateless.key(seed, "init", name) >> 1)
    match rule.kind:
        case "constant":
            tensor.fill_(rule.a)
        case "normal":
            tensor.normal_(0.0, rule.a, generator=generator)
        case "uniform":
            tensor.uniform_(rule.a, rule.b, generator=generator)
        case "truncated":
            _truncated_normal_(tensor, rule.a, rule.b, generator)
    if rule.zero_row is not None:
        tensor[rule.zero_row].zero_()
    return tensor


def _truncated_normal_(tensor: Tensor, std: float, cut: float, generator: torch.Generator) -> None:
    """Fill with a normal of this standard deviation, given that it lies within +-`cut`.

    By the inverse of its distribution function, one draw a value: torch's own draws again until every value fits, each
    time all of them, and costs 27 times a plain normal at BEiT's cut of one standard deviation.
    """
    if cut > _NEVER_REACHED * std:
        tensor.normal_(0.0, std, generator=generator).clamp_(-cut, cut)
        return
    inside = math.erf(cut / (std * math.sqrt(2)))
    tensor.uniform_(-inside, inside, generator=generator).erfinv_().mul_(std * math.sqrt(2)).clamp_(-cut, cut)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Write every parameter of a student or teacher. Call it on the bare module, before its engine is built.

    Works on plain modules, under tensor parallelism and on ZeRO-3 partitioned parameters. Not collective.
    """
    for name, parameter, rule in _named_rules(module):
        assert not parameter.is_meta, f"{name}: a model on the meta device has nothing to write to"
        full_shape = full_shape_of(parameter)
        write_local(parameter, initial_tensor(name, full_shape, rule, seed))


def full_shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor of which `parameter` may be a tensor-parallel slice and a ZeRO-3 shard."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "tensor_model_parallel", False):
        from megatron.core import parallel_state

        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
    return tuple(shape)


def tensor_parallel_slice(parameter: nn.Parameter, full: Tensor) -> Tensor:
    """This rank's tensor-parallel slice of a full tensor (a view)."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    return full.chunk(size, dim=parameter.partition_dim)[parallel_state.get_tensor_model_parallel_rank()]  # type: ignore[attr-defined]


@torch.no_grad()
def write_local(parameter: nn.Parameter, full: Tensor) -> None:
    """Write this rank's part of the full tensor into `parameter`, whatever holds it."""
    local = tensor_parallel_slice(parameter, full)
    partitioned: Any = parameter
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(local)
        return
    if parameter.numel() == local.numel():  # gathered at the moment: the shard below is not what forward would read
        parameter.copy_(local)
    shard = partitioned.ds_tensor
    start = min(partitioned.ds_zero_partition_rank * shard.numel(), local.numel())
    part = local.flatten()[start : start + shard.numel()]
    shard[: part.numel()].copy_(part)
    shard[part.numel() :].zero_()


def _named_rules(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, InitRule]]:
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            rule = getattr(parameter, "init_rule", None) or _default_rule(child, name)
            yield f"{prefix}.{name}" if prefix else name, parameter, rule


def _default_rule(module: nn.Module, name: str) -> InitRule:
    """PyTorch's own defaults for the layers that keep them."""
    if isinstance(module, nn.LayerNorm):
        return ONES if name == "weight" else ZEROS
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d), (
        f"no rule for {name} of {type(module).__name__}"
    )
    fan_in = torch.Size(full_shape_of(module.weight)[1:]).numel()
    bound = 1 / math.sqrt(fan_in)
    return InitRule("uniform", -bound, bound)


def initial_values(module: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    """The full tensors that these parameters of `module` (which may be on the meta device) start from."""
    wanted = set(names)
    return {
        name: initial_tensor(name, full_shape_of(parameter), rule, seed)
        for name, parameter, rule in _named_rules(module)
        if name in wanted
    }
