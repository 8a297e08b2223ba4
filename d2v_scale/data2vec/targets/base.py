"""What a target is: which taps it reads, its width, and the state that it may have.

Taps come block by block, and each adds to a running sum, so that one (B, T, D) is all that is ever held (or sent from
one pipeline stage to the next). From the sum come the raw targets, and from these, with the state, the targets.

A recipe is checked by building its targets: what needs torch imports it where it computes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.norms import normalise, split_norms
from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
"""A target's state: fp32 tensors by name, whose shapes never change."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What there is to make the targets of one stem from."""

    depth: int
    """Main blocks."""
    width: int
    """Channels of their taps, D."""
    input_width: int | None
    """Values of the raw input at one position; None: it has none to regress (tokens)."""


class Made(NamedTuple):
    """The targets of a micro-batch, and what is observed of them."""

    targets_btd: "Tensor"
    """fp32 (B, T, `Target.width`)."""
    raw_btd: "Tensor"
    """fp32 (B, T, `Target.raw_width`): before the state entered. Health is judged on it: whitened targets always have
    spread 1."""
    counted_bt: "Tensor | None"
    """fp32 (B, T): 1 for positions of the input, 0 for padding and samples that are not there. None: there is no state
    that asks."""


class Target:
    """A kind of target; as it stands, one without state. Everything is computed in fp32, without gradient.

    A subclass outside this package is named `package.module:Class` in `objective.target.kind`. Its methods must not
    wait for the device, and must be pure: state changes in `moved` alone.
    """

    defaults: ClassVar[Mapping[str, float]] = {}
    """The numbers of `objective.target.options` that this kind has, with their defaults."""
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The options of this kind that are words, with those that each may be; the first is its default."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Those of `defaults` that are from 0 to 1."""
    in_reference: ClassVar[bool] = False
    """Whether the reference's configuration has words for it, so that its checkpoints can say it. Kinds of the table
    alone are asked."""
    reads_inputs: ClassVar[bool] = False
    """Whether `raw` gets the raw input at each position."""

    layers: tuple[int, ...]
    """Main blocks whose taps it gets, ascending."""
    width: int
    """Channels of the targets, which the predictor has."""
    raw_width: int
    """Channels of what `raw` gives."""

    def __init__(self, config: TargetConfig, place: Place) -> None:
        """Raises `ConfigError` for what cannot be made of this place."""
        self.config = config
        self.layers = self.choose_layers(config, place)
        self.width = self.raw_width = place.width
        given = config.options or {}
        self.options = self._options({name: x for name, x in given.items() if name not in self.choices})
        """Those that are numbers."""
        self.chosen = self._chosen({name: x for name, x in given.items() if name in self.choices})
        """Those that are words."""
        self._tap_norms = split_norms(config.layer_norm, "objective.target.layer_norm")
        self._final_norms = split_norms(config.final_norm, "objective.target.final_norm")

    def choose_layers(self, config: TargetConfig, place: Place) -> tuple[int, ...]:
        """Which main blocks are tapped. Raises `ConfigError` for some that the model lacks."""
        return tapped_layers(config, place.depth)

    @property
    def is_by_position(self) -> bool:
        """Whether each position's values are made from that position alone, without state: then only those that are
        read need to be given, as (1, N, D). Never of a kind with computations of its own."""
        own = ("add", "raw", "targets", "initial_state", "_normalised")
        is_plain = all(getattr(type(self), name) is getattr(Target, name) for name in own)
        return is_plain and {*self._tap_norms, *self._final_norms} <= {"layer"}

    def add(self, running_btd: "Tensor | None", tap_btd: "Tensor") -> "Tensor":
        """The running sum after one more tap, (B, T, D) of any float type: fp32 (B, T, D). Extra tokens (CLS) are cut
        off before. `running_btd` may be written to; it is None at the first tap."""
        x_btd = tap_btd.float()
        for name in self._tap_norms:
            x_btd = normalise(x_btd, name)
        if running_btd is None:
            # A copy unless a norm made one: the tap's own memory belongs to the block.
            return x_btd.clone() if x_btd is tap_btd else x_btd
        return running_btd.add_(x_btd)

    def raw(self, running_btd: "Tensor | None", inputs_btd: "Tensor | None") -> "Tensor":
        """fp32 (B, T, `raw_width`) of the sum of all taps (None: it reads none) and, with `reads_inputs`, of fp32
        inputs (B, T, `Place.input_width`)."""
        del inputs_btd
        assert running_btd is not None, "no tap was added"
        return self._normalised(running_btd / len(self.layers))

    def targets(self, raw_btd: "Tensor", state: State) -> "Tensor":
        """fp32 (B, T, `width`)."""
        del state
        return raw_btd

    def flops(self) -> float:
        """FLOPs of one position in training, of the matrix products of `targets` and `statistics`."""
        return 0.0

    def scratch(self) -> int:
        """fp32 values of one position that these need at once beside the targets."""
        return 0

    def initial_state(self) -> State:
        """The state that a run begins with, fp32, on the CPU; {}: there is none."""
        return {}

    def statistics(self, raw_btd: "Tensor", counted_bt: "Tensor", state: State) -> "dict[str, Tensor]":
        """What a micro-batch tells the state: tensors that are added up over micro-batches and replicas. `counted_bt`:
        as in `Made`; other positions must not enter."""
        del raw_btd, counted_bt, state
        return {}

    def moved(self, state: State, sums: "dict[str, Tensor]") -> State:
        """The state after a step whose `statistics` added up to these (float64). Asked if and only if the optimizer
        stepped."""
        del sums
        return state

    def _normalised(self, x_btd: "Tensor") -> "Tensor":
        for name in self._final_norms:
            x_btd = normalise(x_btd, name)
        return x_btd

    def _options(self, given: Mapping[str, object]) -> dict[str, float]:
        found = dict(self.defaults)
        for name, value in given.items():
            if name not in self.defaults:
                named = ", ".join([*self.defaults, *self.choices])
                has = f"It has {named}." if named else "It has none: leave them out."
                raise ConfigError("objective.target.options", f"{self.config.kind} has no option {name!r}.", has)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError("objective.target.options", f"{name} is {value!r}.", "Give a finite number.")
            if name in self.shares and not 0 <= value <= 1:
                raise ConfigError("objective.target.options", f"{name} is {value}.", "Give a value from 0 to 1.")
            found[name] = value
        return found

    def _chosen(self, given: Mapping[str, object]) -> dict[str, str]:
        found = {name: words[0] for name, words in self.choices.items()}
        for name, value in given.items():
            if value not in self.choices[name]:
                remedy = f"Choose one of {', '.join(self.choices[name])}."
                raise ConfigError("objective.target.options", f"{name} is {value!r}.", remedy)
            found[name] = str(value)
        return found


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


def make(
    target: Target, running_btd: "Tensor | None", inputs_btd: "Tensor | None", counted_bt: "Tensor | None", state: State
) -> Made:
    """The targets of a micro-batch, in training and in evaluation alike."""
    import torch

    with torch.no_grad():
        raw_btd = target.raw(running_btd, inputs_btd)
        return Made(target.targets(raw_btd, state), raw_btd, counted_bt)
