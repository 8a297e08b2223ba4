"""What the student regresses. One file a kind, and the table of them; `base.Target` says what a kind must say.

A kind is one of the table or `package.module:Class`, a subclass of `Target` that a user wrote.
"""

from collections.abc import Iterable

from torch import Tensor

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.average import AverageTopK, LastLayer
from d2v_scale.data2vec.targets.base import Made, Place, State, Target, make, tapped_layers
from d2v_scale.data2vec.targets.codes import Codes
from d2v_scale.data2vec.targets.foreign import check_contract, imported
from d2v_scale.data2vec.targets.inputs import Input
from d2v_scale.data2vec.targets.whitened import Whitened
from d2v_scale.errors import ConfigError

__all__ = ["TARGETS", "Made", "Place", "State", "Target", "build", "check", "make", "make_targets", "tapped_layers"]

TARGETS: dict[str, type[Target]] = {
    "average_top_k": AverageTopK,
    "last_layer": LastLayer,
    "input": Input,
    "whitened": Whitened,
    "codes": Codes,
}


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


def make_targets(taps: Iterable[Tensor], config: TargetConfig) -> Tensor:
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
