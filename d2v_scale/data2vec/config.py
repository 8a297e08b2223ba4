"""The method's knobs: what is masked, what is regressed, how it is weighed, how the teacher follows."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from d2v_scale.data2vec.own import OwnObjective
from d2v_scale.data2vec.target_config import TargetConfig
from d2v_scale.merging import merged

__all__ = [
    "CompatConfig",
    "EmaConfig",
    "HealthConfig",
    "LossConfig",
    "MaskingConfig",
    "ObjectiveConfig",
    "TargetConfig",
]


@dataclass(kw_only=True)
class MaskingConfig:
    """Which positions the student does not see (spec section 2)."""

    kind: Literal["spans", "bert", "blockwise", "block1d", "block2d", "random", "blocks"] = "blockwise"
    """`spans` 1.0 speech/text; `bert` 1.0 text's main row; `blockwise` BEiT; `block1d`, `block2d` and `random` 2.0.
    `blocks`: over any axes, of `size`; not published."""
    prob: float = 0.65
    """Fraction to mask (spans: before overlaps)."""
    length: int = 10
    """Span length, or side of a block, positions."""
    size: dict[str, int | float | str] | int | float | str | None = None
    """Size of a block (`blocks`): positions (3), a share of the axis (0.2) or a number with a unit of it ('0.2 s'),
    along every axis or by its name: `{time: 0.2 s}`, `{height: 3, width: 0.25}`. null: `length`. Images have height and
    width (unit px), recordings time (s, ms), texts tokens, arrays the axes and units of their section."""
    tubes: list[str] | None = None
    """Axes along which a mask is constant (`blocks`): [time] hides whole channels of a stem that has an axis of
    channels, [height] whole columns of an image."""
    starts: Literal["inside", "anywhere"] = "inside"
    """Where spans begin. `inside`: no later than a span's length before the end (1.0 speech); `anywhere`: at any
    position, cut at the end (1.0 text)."""
    adjust: float = 0.0
    """Added to the selected fraction before the exact count is restored (`block1d`, `block2d`)."""
    inverse: bool = False
    """Blocks are what stays visible (`block1d`, `block2d`, `blocks`; 2.0 vision)."""
    target_count: int = 120
    """Patches to mask (blockwise)."""
    min_block: int = 16
    """Smallest block, patches (blockwise)."""
    clones: int = 1
    """M: masks per sample; the teacher runs once for all of them."""


@dataclass(kw_only=True)
class LossConfig:
    """How prediction and target are compared at masked positions (spec 1.3)."""

    beta: float = 0.0
    """0: squared error without 1/2; above: smooth-L1 with this beta."""
    scale: float | None = None
    """Factor on the sum over channels; null: 1/sqrt(width)."""
    reduction: Literal["sum_channels", "mean_channels"] = "sum_channels"
    """Always a mean over masked positions of the whole step; this is about the channels (1.0 vision: mean)."""
    cls_weight: float = 0.0
    """Weight of the CLS term, a mean per row, in 2.0: the output at the last extra token (`model.STEM.extra_tokens`),
    without a head, against the mean over all positions of the sample's first target."""
    weight: float = 1.0
    """Factor on the whole loss, for stems that weigh more or less than others."""
    koleo_weight: float = 0.0
    """Weight of KoLeo, a mean per row, which keeps the student's mean states of different samples apart (Sablayrolles
    et al. 2019, arXiv 1806.03198). Not of data2vec."""
    koleo_group: int = 8
    """Samples of a micro-batch that KoLeo compares with each other; every micro-batch holds a multiple of it."""


@dataclass(kw_only=True)
class EmaConfig:
    """How fast the teacher follows the student (spec 1.4)."""

    start: float = 0.999
    end: float = 0.9999
    """1 is a decay, too: it freezes the teacher."""
    anneal_steps: int = 30000
    """Linear from start to end over this many optimizer updates."""
    index: Literal["completed", "zero_based"] = "completed"
    """Which update number the schedule is read at: fairseq counts completed updates, BEiT starts at 0."""


@dataclass(kw_only=True)
class CompatConfig:
    """Old behaviour, for bit-parity with published checkpoints only. Each is a bug of the reference."""

    equalize_masks: bool = False
    """Trim every row to the batch's smallest mask count (1.0 spans)."""
    text_teacher_masked_only: bool = False
    """The text teacher sees only the masked tokens (fairseq#4881)."""


@dataclass(kw_only=True)
class HealthConfig:
    """When a run counts as collapsed (spec 1.5)."""

    min_target_std: float = 0.1
    min_prediction_std: float = 0.01
    after: int = 5000
    """Updates before the check starts."""
    patience: int = 3
    """Consecutive log points below a limit before the run is stopped; each one before is a warning. Of several sources
    each has its own: those log points count that a step of it came before."""


_OWN = ("masking", "target", "loss", "health")
"""Blocks that a stem may override."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Everything that turns a batch, a student and a teacher into a loss."""

    masking: MaskingConfig = field(default_factory=MaskingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    further_targets: list[TargetConfig] = field(default_factory=list)
    """What is regressed beside `target`, each with a head of its own and its `weight` in the loss. A list in the place
    of `objective.target` is read as the first and the further ones; each entry says all that is not default."""
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    vision: OwnObjective | None = None
    """What images do differently."""
    speech: OwnObjective | None = None
    """What recordings do differently."""
    text: OwnObjective | None = None
    """What texts do differently."""
    arrays: dict[str, OwnObjective] = field(default_factory=dict)
    """What stems of arrays do differently, by their names: `objective.arrays.ecg.masking.prob`."""

    @property
    def own(self) -> dict[str, OwnObjective]:
        """What stems do differently, by their names."""
        single: dict[str, OwnObjective | None] = {name: getattr(self, name) for name in _SINGLE}
        return {name: own for name, own in single.items() if own is not None} | self.arrays

    def section_of(self, name: str) -> str:
        """The dotted key of what the stem `name` does differently."""
        return f"objective.arrays.{name}" if name in self.arrays else f"objective.{name}"

    def of(self, name: str) -> "ObjectiveConfig":
        """The objective of the stem `name`: what it does differently entered in the blocks of all."""
        own = self.own.get(name)
        parts = {part: merged(getattr(self, part), getattr(own, part)) for part in _OWN} if own is not None else {}
        if own is not None and own.target.top_k_layers is not None and own.target.layers is None:
            # Its own K is nearer than the layers of all.
            parts["target"] = replace(parts["target"], layers=None)
        if own is not None and own.further_targets is not None:
            parts["further_targets"] = own.further_targets
        without_own: dict[str, Any] = dict.fromkeys(_SINGLE)
        return replace(self, **parts, **without_own, arrays={})

    @property
    def targets(self) -> list[TargetConfig]:
        """All that is regressed, the first one first."""
        return [self.target, *self.further_targets]

    def reads_states(self, *stems: str) -> bool:
        """Whether the loss of one of these stems reads the student's states at all positions."""
        return any(self.of(stem).loss.koleo_weight > 0 for stem in stems)

    def key(self, name: str, key: str) -> str:
        """Where the value at a dotted key of this section, as the stem `name` has it, is written."""
        section, _, field = key.removeprefix("objective.").partition(".")
        own = getattr(self.own.get(name), section, None)
        is_own = own is not None if section == "further_targets" else getattr(own, field, None) is not None
        return f"{self.section_of(name)}.{section}.{field}" if is_own else key


_SINGLE = tuple(found.name for found in fields(ObjectiveConfig) if found.type == OwnObjective | None)
"""Stems that are called as their kind, and have a field that is called so."""
