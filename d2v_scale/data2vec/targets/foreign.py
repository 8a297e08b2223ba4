"""Targets that users write: imported by name, and held to the contract before anything is allocated."""

import importlib
from typing import TYPE_CHECKING

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.base import Place, State, Target, make
from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "objective.target.kind"
_CONTRACT = "See d2v_scale.data2vec.targets.base.Target for what a target must do."


def imported(kind: str) -> type[Target]:
    """The class `package.module:Class`. Raises `ConfigError` where there is none."""
    module_name, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # whatever a module raises; a script may end the program
        raise ConfigError(
            KEY,
            f"{kind!r} cannot be imported ({_said(error)}).",
            "Give package.module:Class of an installed package, or add its folder to PYTHONPATH.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Target)):
        raise ConfigError(KEY, f"{kind!r} is no subclass of d2v_scale.data2vec.targets.Target.", _CONTRACT)
    return found


def check_contract(config: TargetConfig, place: Place) -> Target:
    """The target, after one pretended step on a few numbers. Raises `ConfigError` for what breaks the contract."""
    import torch

    kind = imported(config.kind)
    try:
        with torch.no_grad():
            target = kind(config, place)
            wrong = _broken(target, place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise ConfigError(KEY, f"{config.kind} failed ({_said(error)}).", _CONTRACT) from error
    if wrong is not None:
        raise ConfigError(KEY, f"{config.kind} breaks the contract: {wrong}.", _CONTRACT)
    return target


def _said(error: BaseException) -> str:
    """On one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _broken(target: Target, place: Place) -> str | None:
    """What is wrong, in words."""
    import torch

    layers = tuple(target.layers)
    if list(layers) != sorted(set(layers)) or not all(type(i) is int and 0 <= i < place.depth for i in layers):
        return f"layers are {layers}, no ascending numbers of {place.depth} main blocks"
    if target.reads_inputs and place.input_width is None:
        return "it reads inputs, and tokens have no values"
    if not layers and not target.reads_inputs:
        return "it reads neither taps nor inputs"
    for name in ("width", "raw_width"):
        if type(getattr(target, name)) is not int or getattr(target, name) < 1:
            return f"{name} is {getattr(target, name)!r}"
    state = target.initial_state()
    if (wrong := _not_a_state(state, "initial_state")) is not None:
        return wrong
    generator = torch.Generator().manual_seed(0)
    running_btd: Tensor | None = None
    for _ in layers:
        running_btd = target.add(running_btd, torch.randn(2, 3, place.width, generator=generator))
        if (wrong := _not_of(running_btd, (2, 3, place.width), "add")) is not None:
            return wrong
    inputs_btd = torch.randn(2, 3, place.input_width or 1, generator=generator) if target.reads_inputs else None
    made = make(target, running_btd, inputs_btd, torch.ones(2, 3), state)
    assert made.counted_bt is not None
    wrong = _not_of(made.raw_btd, (2, 3, target.raw_width), "raw")
    wrong = wrong or _not_of(made.targets_btd, (2, 3, target.width), "targets")
    return wrong or _wrong_move(target, state, target.statistics(made.raw_btd, made.counted_bt, state))


def _wrong_move(target: Target, state: State, sums: "dict[str, Tensor]") -> str | None:
    from torch import Tensor

    if bool(sums) != bool(state):
        return "statistics and initial_state must both be empty, or neither"
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in sums.values()):
        return "statistics gives something else than tensors of floats"
    moved = target.moved(state, {name: x.double() for name, x in sums.items()})
    if (wrong := _not_a_state(moved, "moved")) is not None:
        return wrong
    shapes = [{name: tuple(x.shape) for name, x in one.items()} for one in (state, moved)]
    return None if shapes[0] == shapes[1] else f"moved gives {shapes[1]}, initial_state {shapes[0]}"


def _not_a_state(state: object, method: str) -> str | None:
    import torch

    if not isinstance(state, dict):
        return f"{method} gives a {type(state).__name__}, not a dict of tensors"
    for name, x in state.items():
        if not isinstance(name, str) or not name or not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return f"{method} gives {name!r}, which is no fp32 tensor with a name"
    return None


def _not_of(x: object, shape: tuple[int, ...], method: str) -> str | None:
    import torch

    if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        return f"{method} gives {got} instead of {shape} in fp32"
    return None if bool(torch.isfinite(x).all()) else f"{method} gives values that are not finite"
