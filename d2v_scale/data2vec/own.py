"""What the objective of one stem does differently. `objective.masking` and so on have the words; null: as there."""

from dataclasses import dataclass, field
from typing import Literal

from d2v_scale.data2vec.target_config import TargetConfig


@dataclass(kw_only=True)
class OwnMasking:
    """Which positions the student does not see, for one stem; null: as in `objective.masking`."""

    kind: Literal["spans", "bert", "blockwise", "block1d", "block2d", "random", "blocks"] | None = None
    prob: float | None = None
    length: int | None = None
    size: dict[str, int | float | str] | int | float | str | None = None
    tubes: list[str] | None = None
    starts: Literal["inside", "anywhere"] | None = None
    adjust: float | None = None
    inverse: bool | None = None
    target_count: int | None = None
    min_block: int | None = None
    clones: int | None = None


@dataclass(kw_only=True)
class OwnTarget:
    """How taps become a target, for one stem; null: as in `objective.target`."""

    kind: str | None = None
    name: str | None = None
    weight: float | None = None
    tap: Literal["ffn", "block"] | None = None
    top_k_layers: int | None = None
    layers: list[int] | None = None
    layer_norm: str | None = None
    final_norm: str | None = None
    options: dict[str, float | str] | None = None


@dataclass(kw_only=True)
class OwnLoss:
    """How prediction and target are compared, for one stem; null: as in `objective.loss`."""

    beta: float | None = None
    scale: float | None = None
    reduction: Literal["sum_channels", "mean_channels"] | None = None
    cls_weight: float | None = None
    weight: float | None = None
    koleo_weight: float | None = None
    koleo_group: int | None = None


@dataclass(kw_only=True)
class OwnHealth:
    """When a stem counts as collapsed; null: as in `objective.health`."""

    min_target_std: float | None = None
    min_prediction_std: float | None = None
    after: int | None = None
    patience: int | None = None


@dataclass(kw_only=True)
class OwnObjective:
    """What one stem does differently."""

    masking: OwnMasking = field(default_factory=OwnMasking)
    target: OwnTarget = field(default_factory=OwnTarget)
    further_targets: list[TargetConfig] | None = None
    """Instead of `objective.further_targets`; null: as there, []: none."""
    loss: OwnLoss = field(default_factory=OwnLoss)
    health: OwnHealth = field(default_factory=OwnHealth)
