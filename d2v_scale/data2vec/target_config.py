"""How one target is made, as a recipe says it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TargetConfig:
    """How the teacher's taps become a target (spec 1.2)."""

    kind: str = "average_top_k"
    """`average_top_k`; `last_layer`; `input`: pixels of a patch, samples of a frame; `whitened`: by running moments of
    every channel; `codes`: the nearest of a growing codebook; or `package.module:Class`, your own
    (d2v_scale/data2vec/targets)."""
    name: str | None = None
    """What its figures and, of a further target, its head are called; null: its kind (of a class, the class's name)."""
    weight: float = 1.0
    """Factor on this target's part of the loss."""
    tap: Literal["ffn", "block"] = "ffn"
    """`ffn`: second FFN linear before dropout and residual; `block`: the block's output (1.0 vision)."""
    top_k_layers: int = 8
    """K: the last K main blocks are tapped."""
    layers: list[int] | None = None
    """Which main blocks are tapped instead, in any choice; the first is 0. Where it is set, `top_k_layers` is not
    read."""
    layer_norm: str = "instance"
    """Parameter-free norms of each tap, joined by `+` and applied in that order, or `none`. `instance`: over time for
    each sample and channel; `layer`: over channels; `batch`: over samples and time; `group`: over time and channels."""
    final_norm: str = "none"
    """Parameter-free norms after the average, written as in `layer_norm`."""
    options: dict[str, float | str] | None = None
    """What the kind has for itself; null: its defaults. `whitened`: `momentum` (0.999), `covariance` (diagonal; full:
    whole, of all channels); `codes`: `codes` (256), `momentum` (0.99), `grow_above` (0, share of the variance)."""

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.kind.rpartition(":")[2].rpartition(".")[2]
