"""What the student regresses. One file a kind, and the table of them; `base.Target` says what a kind must say.

A kind is one of the table or `package.module:Class`, a subclass of `Target` that a user wrote.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.average import AverageTopK, LastLayer
from d2v_scale.data2vec.targets.base import Made, Place, State, Target, make, tapped_layers
from d2v_scale.data2vec.targets.codes import Codes
from d2v_scale.data2vec.targets.foreign import check_contract, imported
from d2v_scale.data2vec.targets.inputs import Input
from d2v_scale.data2vec.targets.whitened import Whitened
from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TARGETS",
    "Made",
    "Place",
    "State",
    "Target",
    "build",
    "build_all",
    "check",
    "check_all",
    "make",
    "make_targets",
    "tapped_layers",
    "widths",
]

TARGETS: dict[str, type[Target]] = {
    "average_top_k": AverageTopK,
    "last_layer": LastLayer,
    "input": Input,
    "whitened": Whitened,
    "codes": Codes,
}

TAKEN = frozenset(
    {"convs", "dropout", "fc1", "fc2", "final_norm", "norm", "predict", "proj", "proj1", "proj2", "project"}
    | {"projection_names", "build_heads", "build_projection", "dimensions", "residual", "training"}
)
"""What a predictor has beside heads, whose names stand beside these."""


def build(config: TargetConfig, place: Place) -> Target:
    """The target that `config.kind` names. Raises `ConfigError` for an unknown kind, and for what a kind refuses."""
    if ":" in config.kind:
        return imported(config.kind)(config, place)
    if config.kind not in TARGETS:
        raise ConfigError(
            "objective.target.kind",
            f"unknown target {config.kind!r}.",
            f"Choose one of {', '.join(TARGETS)}, or give your own as package.module:Class.",
        )
    return TARGETS[config.kind](config, place)


def check(config: TargetConfig, place: Place) -> Target:
    """As `build`; of a kind from outside also that it does what it says, on a few numbers. Raises `ConfigError`."""
    return check_contract(config, place) if ":" in config.kind else build(config, place)


def build_all(configs: Sequence[TargetConfig], place: Place) -> tuple[Target, ...]:
    """The targets of one stem, the first one first. Raises `ConfigError`, with the key of the target it is about."""
    return tuple(_named(build, config, place, number) for number, config in enumerate(configs))


def check_all(configs: Sequence[TargetConfig], place: Place) -> tuple[Target, ...]:
    """As `build_all`, with `check`; also that weights and names can be meant."""
    for number, config in enumerate(configs):
        key, called = _key(number), config.called
        if not config.weight > 0:
            raise ConfigError(
                f"{key}.weight", f"is {config.weight}.", "Give a number above 0, or leave the target out."
            )
        if not called:
            raise ConfigError(
                f"{key}.kind", f"is {config.kind!r}.", f"Choose one of {', '.join(TARGETS)}, or package.module:Class."
            )
        taken = called in TAKEN or _is_of_modules(called)
        if taken or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", called):
            what = "is what a part of every predictor is called" if taken else "is no name"
            raise ConfigError(f"{key}.name", f"{called!r} {what}.", "Give another one, of letters, digits and _.")
        if called in [one.called for one in configs[:number]]:
            raise ConfigError(
                f"{key}.name", f"two targets are called {called!r}.", "Give each a name; without one it is the kind."
            )
    return tuple(_named(check, config, place, number) for number, config in enumerate(configs))


def _is_of_modules(called: str) -> bool:
    """Whether every module of torch has something of that name; no kind of the table is called so."""
    if called in TARGETS:
        return False
    from torch.nn import Module

    return hasattr(Module, called)


def widths(every: Sequence[Target]) -> dict[str, int]:
    """Channels of these targets by their names."""
    return {one.config.called: one.width for one in every}


def _named(
    make_one: Callable[[TargetConfig, Place], Target], config: TargetConfig, place: Place, number: int
) -> Target:
    try:
        return make_one(config, place)
    except ConfigError as error:
        if number == 0:
            raise
        key = error.key.replace("objective.target", _key(number), 1)
        said = str(error).replace("objective.target", _key(number))
        raise ConfigError(key, said.removeprefix(f"{key}: ")) from error


def _key(number: int) -> str:
    return "objective.target" if number == 0 else f"objective.further_targets.{number - 1}"


def make_targets(taps: "Iterable[Tensor]", config: TargetConfig) -> "Tensor":
    """Targets, fp32 (B, T, D), of a kind without state, from the taps (B, T, D) of main blocks, first block first.

    The one-call form, for tests and notebooks.
    """
    taps = list(taps)
    depth = max(config.layers) + 1 if config.layers else config.top_k_layers
    target = build(config, Place(depth=depth, width=taps[0].shape[-1], input_width=None))
    assert len(taps) == len(target.layers), f"{len(taps)} taps instead of {len(target.layers)}"
    running_btd = None
    for tap_btd in taps:
        running_btd = target.add(running_btd, tap_btd.detach())
    return make(target, running_btd, None, None, {}).targets_btd
