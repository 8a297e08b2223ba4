"""What the student regresses: parameter-free norms and an average of some of the teacher's blocks (spec 1.2).

A target function is named by `TargetConfig.kind` and is an accumulator: blocks add their taps as they run, so that one
(B, T, D) sum is all that is ever held (or sent from one pipeline stage to the next).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.errors import ConfigError

_EPS = 1e-5

# Axes of (B, T, D) that each norm takes its mean and biased variance over.
_AXES: dict[str, tuple[int, ...]] = {
    "instance": (1,),
    "layer": (2,),
    "batch": (0, 1),
    "group": (1, 2),
    "across_batch": (0,),
    "across_batch_and_channels": (0, 2),
}


def split_norms(names: str, key: str) -> list[str]:
    """`instance+layer` to ["instance", "layer"], `none` to []. Raises `ConfigError` at `key` for an unknown name."""
    parts = [] if names == "none" else names.split("+")
    unknown = [part for part in parts if part not in _AXES]
    if unknown:
        raise ConfigError(key, f"unknown norm {unknown[0]!r} in {names!r}.", f"Join any of {', '.join(_AXES)} by '+'.")
    return parts


def _normalise(x_btd: Tensor, name: str) -> Tensor:
    if name == "layer":
        return F.layer_norm(x_btd, x_btd.shape[-1:], eps=_EPS)
    axes = _AXES[name]
    centred_btd = x_btd - x_btd.mean(dim=axes, keepdim=True)
    # Two passes: as exact as torch.var_mean and several times faster over strided axes on a CPU.
    variance = centred_btd.square().mean(dim=axes, keepdim=True)
    return centred_btd.mul_(torch.rsqrt(variance + _EPS))


def tapped_layers(config: TargetConfig, depth: int) -> tuple[int, ...]:
    """Indexes of the main blocks that are tapped, ascending. Raises `ConfigError` for some that the model lacks."""
    if config.layers is not None:
        layers = tuple(sorted(set(config.layers)))
        if not layers or len(layers) < len(config.layers) or layers[0] < 0 or layers[-1] >= depth:
            raise ConfigError(
                "objective.target.layers",
                f"{config.layers} are not different main blocks of {depth}.",
                f"Choose from 0 to {depth - 1}; blocks of the stem (prenet) are never tapped.",
            )
        return layers
    if not 1 <= config.top_k_layers <= depth:
        raise ConfigError(
            "objective.target.top_k_layers",
            f"{config.top_k_layers} of {depth} main blocks cannot be averaged.",
            f"Choose 1 to {depth}; blocks of the stem (prenet) are never tapped.",
        )
    return tuple(range(depth - config.top_k_layers, depth))


class TargetAccumulator:
    """`average_top_k`: each tap normalised, the mean of all taps, normalised again. All in fp32, without gradient.

    CLS tokens must be cut off before `add`, so that instance norms do not see them; padded positions take part in the
    statistics, as in the reference. `total_btd` and `count` continue a sum begun elsewhere (an earlier pipeline stage).
    """

    def __init__(self, config: TargetConfig, total_btd: Tensor | None = None, count: int = 0) -> None:
        self._tap_norms = split_norms(config.layer_norm, "objective.target.layer_norm")
        self._final_norms = split_norms(config.final_norm, "objective.target.final_norm")
        self._taps = config.top_k_layers if config.layers is None else len(config.layers)
        self.total_btd = total_btd
        self.count = count

    @torch.no_grad()
    def add(self, tap_btd: Tensor) -> None:
        """Add one block's tap, (B, T, D) of any float type."""
        x_btd = tap_btd.float()
        for name in self._tap_norms:
            x_btd = _normalise(x_btd, name)
        if self.total_btd is None:
            # A copy unless a norm made one: the tap's own memory belongs to the block.
            self.total_btd = x_btd.clone() if x_btd is tap_btd else x_btd
        else:
            self.total_btd.add_(x_btd)
        self.count += 1

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The targets, fp32 (B, T, D). All taps must have been added."""
        assert self.total_btd is not None, "no tap was added"
        assert self.count == self._taps, f"{self.count} taps instead of {self._taps}"
        targets_btd = self.total_btd / self.count
        for name in self._final_norms:
            targets_btd = _normalise(targets_btd, name)
        return targets_btd


TARGETS: dict[str, Callable[..., TargetAccumulator]] = {"average_top_k": TargetAccumulator}


def accumulator(config: TargetConfig, total_btd: Tensor | None = None, count: int = 0) -> TargetAccumulator:
    """The accumulator that `config.kind` names. Raises `ConfigError` for an unknown kind."""
    if config.kind not in TARGETS:
        raise ConfigError(
            "objective.target.kind", f"unknown target {config.kind!r}.", f"Choose one of {', '.join(TARGETS)}."
        )
    return TARGETS[config.kind](config, total_btd, count)


def make_targets(taps: Iterable[Tensor], config: TargetConfig) -> Tensor:
    """Targets, fp32 (B, T, D), from the taps (B, T, D) of main blocks, first block first.

    The one-call form, for tests and notebooks.
    """
    running = accumulator(config)
    for tap_btd in taps:
        running.add(tap_btd)
    return running.finish()
