"""One run, described: the typed configuration that everything else is built from.

Every section is defined beside what it configures. A recipe is YAML; the resolved one is kept in the run directory.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from d2v_scale import modalities, ranges
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data2vec import block_sizes, masking, targets
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.targets import Place, Target
from d2v_scale.errors import ConfigError
from d2v_scale.evaluation.config import EvaluationConfig
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.modalities import published_parts
from d2v_scale.modalities.paired.config_check import check_pairs
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel.config import ParallelConfig, data_parallel_size
from d2v_scale.parallel.step_sizes import check_step
from d2v_scale.process.config import ProfileConfig
from d2v_scale.redaction import redact_values
from d2v_scale.teacher import own_model
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.tracking.config import TrackingConfig

# Keys that a resumed run may change without becoming another experiment: where and how it runs, not what it computes.
FREE_TO_CHANGE = (
    "accumulation",
    "parallel",
    "deepspeed_config",
    "checkpoint",
    "tracking",
    "evaluation",
    "profile",
    "teacher.placement",
    "model.activation_checkpointing",
    "model.compile",
    "max_skipped_in_a_row",
    "optim.spikes",
    "hang_limit_minutes",
)


Precision = Literal["auto", "fp32", "bf16"]
"""Of the compute weights."""


@dataclass(kw_only=True)
class Recipe:
    """Everything a run computes, independent of the number of processes that compute it."""

    name: str = "unnamed"
    """What the run directory is named after."""
    seed: int = 1
    """Seed of initial weights, sample order, crops, masks and dropout."""
    precision: Precision = "auto"
    """`auto`: bf16 on a GPU, and on a CPU whose first start measures that a block is clearly faster in it, else fp32; a
    run keeps it. Masters, moments and teacher are fp32 either way."""
    global_batch_size: int = 256
    """Size of one optimizer step over all processes, in `batch_unit`."""
    batch_unit: Literal["samples", "seconds", "tokens"] = "samples"
    """Unit of global_batch_size: samples, seconds of audio, or text tokens."""
    accumulation: int = 1
    """Micro-batches per step and data-parallel rank."""
    max_skipped_in_a_row: int = 20
    """Steps in a row that may be skipped because something was not finite, before the run ends."""
    hang_limit_minutes: float = 30.0
    """A step that takes longer ends the run: the watchdog names the silent process. Minutes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_parts: TeacherParts | None = None
    """What the teacher owns, shares and copies; null: as published for this kind of model."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed_config: str | None = None
    """Path of a DeepSpeed JSON (ds_configs/); null: ZeRO-1 without offload."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    task: TaskConfig | None = None
    """What the encoder is fine-tuned for, on labels; null: it is pretrained."""

    def of(self, name: str) -> "Recipe":
        """The same recipe with the stem `name` alone, and what this stem does differently entered where it counts."""
        source = next((source for source in self.data.sources if source.modality == name), SourceConfig())
        return replace(
            self,
            model=self.model.of(name),
            objective=self.objective.of(name),
            teacher_parts=self.parts(),
            global_batch_size=source.batch_size or self.global_batch_size,
            batch_unit=source.batch_unit or self.batch_unit,
        )

    def targets(self) -> dict[str, list[TargetConfig]]:
        """How each stem's targets are made, the first one first."""
        return {name: self.objective.of(name).targets for name in self.model.modalities}

    def built_targets(self) -> dict[str, tuple[Target, ...]]:
        """Each stem's targets, the first one first."""
        places = {name: self._target_place(name) for name in self.model.modalities}
        return {name: targets.build_all(each, places[name]) for name, each in self.targets().items()}

    def target_widths(self) -> dict[str, dict[str, int]]:
        """Channels of each stem's targets by their names, the first one first: of its predictor's output and heads."""
        return {name: targets.widths(each) for name, each in self.built_targets().items()}

    def has_target_state(self) -> bool:
        """Whether any stem's target has a state."""
        return any(one.initial_state() for each in self.built_targets().values() for one in each)

    def masking(self) -> dict[str, MaskingConfig]:
        """What is masked of each stem's samples, sizes of blocks in positions of its axes."""
        return {name: self.masking_of(name) for name in self.model.modalities}

    def masking_of(self, name: str) -> MaskingConfig:
        """What is masked of the samples of the stem `name`, likewise."""
        return block_sizes.resolved(self.objective.of(name).masking, modalities.of(self.model, name).named_axes)

    def parts(self) -> TeacherParts:
        """The teacher's parts, with the published ones where the recipe names none."""
        return self.teacher.parts(self.teacher_parts or published_parts(self.model))

    def _target_place(self, name: str) -> Place:
        return modalities.target_place(self.teacher.model_beside(self.model), name)

    def resolved_precision(self, auto: Literal["fp32", "bf16"]) -> Literal["fp32", "bf16"]:
        """The precision of the compute weights; `auto`: what that word stands for here."""
        return auto if self.precision == "auto" else self.precision

    def check(self, world_size: int) -> None:
        """Raises ConfigError for what contradicts itself. Pure: before any process group is formed."""
        ranges.check(self)
        self.optim.check()
        self.profile.bounds()
        self.tracking.check()
        self._check_model()
        if self.task is None:
            own_model.check(self)
            self._check_objective()
        else:
            self.task.check(self.model, self.parallel.tensor * self.parallel.pipeline)
        self._check_sizes(world_size)

    def _check_model(self) -> None:
        model = self.model
        if not model.modalities:
            raise ConfigError(
                "model",
                "has no stem",
                "Give at least one of model.vision, model.speech, model.text, model.arrays.NAME, or to fine-tune "
                "--init_from.",
            )
        model.check()
        self.data.check_names(model.modalities)
        check_pairs(model, self.objective, self.data, tuned=self.task is not None)
        for name in model.modalities if model.visible_only else []:
            model.decoder_dimensions(name, modalities.of(model, name).axes)
        keys = [f"optim.lr_scale.{name}" for name in self.optim.lr_scale or {}]
        for key in [*keys, *(f"evaluation.sets.{name}" for name in self.evaluation.sets)]:
            if (name := key.split(".", 2)[2]) not in model.modalities:
                there = ", ".join(model.modalities)
                raise ConfigError(
                    key, f"is set, but the model has no stem {name}", f"Leave it out; the model has {there}."
                )

    def enter_pairs(self) -> None:
        """Enter in the model which stems read parts of paired samples, where it does not say so itself."""
        for source in self.data.sources:
            for name in source.stems if len(source.stems) > 1 else []:
                if name in self.model.stems and self.model.stems[name].paired is None:
                    self.model.stems[name].paired = True

    @property
    def sequences(self) -> list[str]:
        """What steps are of, as far as costs and sizes go: the stems; where sources have paired samples, what each
        source reads."""
        read = list(dict.fromkeys(source.modality for source in self.data.sources))
        return read if any(len(source.stems) > 1 for source in self.data.sources) else self.model.modalities

    def _check_objective(self) -> None:
        for name in self.objective.own:
            if name not in self.model.modalities:
                there = ", ".join(self.model.modalities)
                remedy = f"Leave it out; the model has {there}."
                raise ConfigError(self.objective.section_of(name), f"is set, but the model has no stem {name}", remedy)
            if name in self.objective.arrays and name not in self.model.arrays:
                key = self.objective.section_of(name)
                raise ConfigError(key, f"is set, but {name} is no stem of arrays", f"Write objective.{name}.")
        for stem in self._trained_stems():
            try:
                self._check_own_objective(stem, self.objective.of(stem.name))
            except ConfigError as error:
                raise self._where_it_stands(error, stem.name) from None
        self._check_shared_heads()

    def _where_it_stands(self, error: ConfigError, name: str) -> ConfigError:
        """The same error with the keys of values that are the own ones of the stem `name` as they are written."""
        keys = r"\bobjective\.(masking|target|further_targets|loss|health)\.[\w.]*\w"
        said = re.sub(keys, lambda found: self.objective.key(name, found[0]), str(error))
        key = self.objective.key(name, error.key)
        return ConfigError(key, said.removeprefix(f"{key}: "))

    def _check_shared_heads(self) -> None:
        """Raises ConfigError where stems that share a predictor would have one head for targets of two widths."""
        found: dict[str, int] = {}
        heads = [pair for widths in self.target_widths().values() for pair in list(widths.items())[1:]]
        for name, width in heads if self.model.predictor.shared else []:
            if found.setdefault(name, width) != width:
                raise ConfigError(
                    "objective.further_targets",
                    f"{name!r} is {found[name]} wide in one stem and {width} in another, but all share one predictor",
                    "Give them different names, or set model.predictor.shared to false.",
                )

    def _check_own_objective(self, stem: modalities.Modality, objective: ObjectiveConfig) -> None:
        """Raises ConfigError for what contradicts a stem, whose own values are entered in `objective`."""
        model = self.model
        target, *_ = targets.check_all(objective.targets, self._target_place(stem.name))
        if objective.loss.cls_weight > 0 and target.width != model.backbone.width:
            raise ConfigError(
                "objective.loss.cls_weight",
                f"compares an output of width {model.backbone.width} with targets of width {target.width}, and has no "
                "projection",
                "Set it to 0, or choose another objective.target.kind or a teacher of that width.",
            )
        if model.predictor.shared and target.width != model.backbone.width:
            raise ConfigError(
                "objective.target.kind",
                f"makes targets of width {target.width} of {stem.name}, but the predictor that all stems share has "
                f"{model.backbone.width}",
                "Choose another kind, or set model.predictor.shared to false.",
            )
        masks = objective.masking
        if masks.clones > 1 and not model.visible_only:
            raise ConfigError(
                "objective.masking.clones",
                f"is {masks.clones}, which needs model.visible_only",
                "Several masks per sample are part of data2vec 2.0.",
            )
        trimmed = masks.kind == "spans" and objective.compat.equalize_masks
        if model.visible_only and not trimmed and masks.kind not in ("block1d", "block2d", "random", "blocks"):
            raise ConfigError(
                "objective.masking.kind",
                f"is {masks.kind!r}, which hides more positions in some rows than in others",
                "With model.visible_only all rows keep equally many: give random, block1d, block2d or blocks, or spans "
                "with objective.compat.equalize_masks.",
            )
        # A weight that all stems have counts in the steps of those with an extra token alone.
        key = self.objective.key(stem.name, "objective.loss.cls_weight")
        heard = self._trained_stems() if key == "objective.loss.cls_weight" else [stem]
        if objective.loss.cls_weight > 0 and not (model.visible_only and any(one.extra_tokens for one in heard)):
            names = ", ".join(one.name for one in heard)
            raise ConfigError(
                key,
                f"needs a 2.0 model (model.visible_only) with an extra token before the positions of {names}",
                f"Set it to 0, or in 2.0 {model.key(heard[0].name)}.extra_tokens to 1.",
            )
        _, grid = stem.extent(self.data)
        if math.prod(grid) < 2:
            raise ConfigError(
                model.key(stem.name),
                "makes a single position of a sample, which cannot be both seen and masked",
                "Give smaller patches, or longer samples.",
            )
        block_sizes.check(masks, stem.named_axes, grid)
        masks = block_sizes.resolved(masks, stem.named_axes)
        # As a data worker will: masks that cannot be drawn are refused here.
        drawn = masking.collate(masks, grid=grid, sample_ids=[0], seed=self.seed, step=0)
        if masks.prob == 0 and not drawn.masked_rt.any():
            raise ConfigError("objective.masking.prob", "is 0, which masks nothing", "Give a number above 0.")

    def _trained_stems(self) -> list[modalities.Modality]:
        """Those that a source is read for; without any, all."""
        read = {stem for source in self.data.sources for stem in source.stems}
        return [stem for stem in modalities.stems(self.model) if stem.name in read or not read]

    def _check_sizes(self, world_size: int) -> None:
        replicas = data_parallel_size(self.parallel, world_size)
        if self.model.backbone.heads % self.parallel.tensor:
            raise ConfigError(
                "parallel.tensor", f"{self.parallel.tensor} does not divide the {self.model.backbone.heads} heads"
            )
        if self.model.backbone.ffn % self.parallel.tensor:
            raise ConfigError(
                "parallel.tensor",
                f"{self.parallel.tensor} does not divide model.backbone.ffn {self.model.backbone.ffn}",
            )
        self._check_mixing()
        for name in self.sequences:
            check_step(self, name, replicas)
        if self.task is not None and self.task.image.mixes:
            rows = self.global_batch_size // (replicas * self.accumulation)
            if rows < 2:
                raise ConfigError(
                    "task.image",
                    f"mixes the images of a micro-batch, which are {rows} here",
                    "Raise global_batch_size, lower accumulation, start fewer processes, or set mixup and cutmix to 0.",
                )

    @property
    def rounds(self) -> int:
        """Micro-batches of each source that a step reads: of one source, or with data.mixing together of every."""
        return self.accumulation // self.data.sources_of_step()

    @property
    def samples_of_step(self) -> int | None:
        """Samples of an optimizer step over all processes; None where it is not samples that are counted."""
        read: list[SourceConfig] = self.data.sources if self.data.mixing == "together" else []
        sizes = [(one.batch_size or self.global_batch_size, one.batch_unit or self.batch_unit) for one in read]
        sizes = sizes or [(self.global_batch_size, self.batch_unit)]
        return sum(size for size, _ in sizes) if all(unit == "samples" for _, unit in sizes) else None

    def _check_mixing(self) -> None:
        """Raises ConfigError for steps that cannot be divided among the sources."""
        self.data.check_mixing()
        if self.data.mixing == "together" and self.task is not None:
            raise ConfigError("data.mixing", "is together, but labels are read from one source a step", "Leave it out.")
        sources = self.data.sources_of_step()
        if self.accumulation % sources:
            more = -(-self.accumulation // sources) * sources
            raise ConfigError(
                "accumulation",
                f"is {self.accumulation}, which {sources} sources ({', '.join(self.data.source_names())}) cannot share "
                "equally: with data.mixing together every step has as many micro-batches of each",
                f"Give a multiple of {sources}, such as {more}.",
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, for YAML, the checkpoint and MLflow: secrets in paths are left out."""
    return redact_values(dataclasses.asdict(recipe))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with the old and the new value."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = _numbered(old.get(name)), _numbered(new.get(name))
        if name == "axes" and isinstance(before, dict) and isinstance(after, dict) and list(before) != list(after):
            found[f"{prefix}{name}"] = (before, after)  # whose order is that of a member's shape
        elif isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{name}.")
        elif _plain(before) != _plain(after):
            found[f"{prefix}{name}"] = (before, after)
    return found


def _numbered(value: Any) -> Any:
    """A list of sections as a section with a key for each; anything else as it is."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def _plain(value: Any) -> Any:
    """YAML knows no tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def binding_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The differences that make it another experiment: all but `FREE_TO_CHANGE` and the data's paths and workers."""
    free = (*FREE_TO_CHANGE, *DataConfig.FREE_TO_CHANGE)
    return {
        name: values
        for name, values in differences(old, new).items()
        if not any(fnmatchcase(name, prefix) or fnmatchcase(name, prefix + ".*") for prefix in free)
    }
