"""What an encoder is fine-tuned for, and how gently."""

from dataclasses import dataclass, field
from typing import Literal

from d2v_scale import modalities
from d2v_scale.data.config import LETTERS
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.metric_names import METRICS, Metric
from d2v_scale.model.config import ModelConfig


@dataclass(kw_only=True)
class BackboneOverrides:
    """Regularisation of the pretrained blocks while they are fine-tuned; null: as in the checkpoint's recipe."""

    dropout: float | None = None
    attention_dropout: float | None = None
    activation_dropout: float | None = None
    input_dropout: float | None = None
    drop_path: float | None = None
    layer_drop: float | None = None


@dataclass(kw_only=True)
class CtcConfig:
    """Characters, and what is hidden from the encoder while it learns them (spec 7.1)."""

    letters: str = LETTERS
    """Characters that the head predicts, beside the blank, <unk> and the space between words."""
    time_mask: float = 0.65
    """Fraction of the frames in masked spans, before overlaps; 0: none."""
    time_mask_length: int = 10
    """Frames of a span."""
    noise_std: float = 0.01
    """2.0: standard deviation of what replaces masked frames; 0: zeros. 1.0 has a learned vector."""
    channel_mask: float = 0.5
    """Fraction of the channels in masked spans; they are zero at every frame."""
    channel_mask_length: int = 64
    beam: int = 1
    """Width of the beam that evaluation decodes with; 1: greedy. There is no language model."""

    def check(self, width: int) -> None:
        """Raises ConfigError for letters that are no vocabulary, or spans that do not fit an encoder of `width`
        channels."""
        if len(set(self.letters)) < len(self.letters) or set("| ") & set(self.letters):
            raise ConfigError("task.ctc.letters", "has a letter twice, or a space", "Spaces have their own place.")
        if self.channel_mask > 0 and not 0 < self.channel_mask_length < width:
            raise ConfigError(
                "task.ctc.channel_mask_length", f"is {self.channel_mask_length} of {width} channels", "Shorten it."
            )


@dataclass(kw_only=True)
class ImageConfig:
    """Augmentation of labelled images (spec 7.2), beside the crop, flip and jitter of `data.vision`.

    Images are mixed with others of their micro-batch: with which depends on the number of processes and micro-batches,
    whether and in which proportion does not.
    """

    rand_augment: float = 0.0
    """Magnitude of two random operations an image, 0-10 (published: 9); 0: none."""
    rand_augment_std: float = 0.5
    """Standard deviation of that magnitude."""
    erase: float = 0.0
    """Probability that a rectangle is replaced by noise."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that images are mixed with; 0: not."""
    cutmix: float = 0.0
    """The same for rectangles pasted from another image."""
    mix_probability: float = 1.0
    """Share of the steps that mix."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    @property
    def changes_batches(self) -> bool:
        """Whether anything happens to images after they were decoded."""
        return self.mixes or self.erase > 0

    def check(self) -> None:
        """Raises ConfigError for a strength that RandAugment does not have."""
        if self.rand_augment > 10:
            raise ConfigError("task.image.rand_augment", f"is {self.rand_augment}", "Give a value from 0 to 10.")


@dataclass(kw_only=True)
class TaskConfig:
    """One downstream task. The encoder is the one of `--init_from`, or starts from scratch without it."""

    kind: Literal["classify", "regress", "ctc"] = "classify"
    """`classify`: `.cls`; `regress`: `.score`; `ctc`: the characters of `.txt`, from recordings."""
    weights: Literal["teacher", "student"] = "teacher"
    """Whose weights `--init_from` gives: the teacher's averages (what it shares is the student's), or the student's."""
    classes: int | None = None
    """Outputs of a classifier; null: the classes that the shards' index names."""
    label_smoothing: float = 0.0
    layer_decay: float = 1.0
    """Each block's learning rate is this times that of the block above it."""
    stem_decay: bool | None = None
    """Whether the stem's goes on below the first block's; null: as published (1.0: yes, 2.0: full rate)."""
    freeze_updates: int = 0
    """Updates during which only the head learns."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that never change, by prefix of their names; the convolutions of speech are always among them."""
    metrics: list[Metric] = field(default_factory=list)
    """What evaluation measures; empty: accuracy, Pearson, or WER and CER."""
    backbone: BackboneOverrides = field(default_factory=BackboneOverrides)
    ctc: CtcConfig = field(default_factory=CtcConfig)
    image: ImageConfig = field(default_factory=ImageConfig)

    def check(self, model: ModelConfig, model_parallel: int = 1) -> None:
        """Raises ConfigError for what contradicts itself or the model, of which `model_parallel` ranks share a copy."""
        if len(model.modalities) != 1:
            raise ConfigError("task", f"needs a model of one modality, this one has {', '.join(model.modalities)}")
        [stem] = modalities.stems(model)
        if self.kind not in stem.tasks:
            raise ConfigError("task.kind", f"is {self.kind!r}", f"It needs a model of recordings, not of {stem.name}.")
        if model_parallel > 1:
            remedy = "Fine-tuning divides the batch only: set tensor and pipeline to 1, and use ZeRO-3 for room."
            raise ConfigError("parallel", f"divides the model over {model_parallel} processes", remedy)
        if self.classes is not None and self.classes < 2:
            raise ConfigError("task.classes", f"is {self.classes}", "Give at least 2.")
        if self.kind == "ctc":
            self.ctc.check(model.backbone.width)
        self.image.check()
        self._check_effects(model)
        wrong = [metric for metric in self.metrics if metric not in METRICS[self.kind]]
        if wrong:
            raise ConfigError("task.metrics", f"has {wrong[0]!r}", f"For {self.kind} there are: {METRICS[self.kind]}.")

    def _check_effects(self, model: ModelConfig) -> None:
        """Raises ConfigError for an option that this task would not heed."""
        image, of_images = self.image, modalities.stems(model)[0].content == "image"
        of_classes = self.kind == "classify"
        for key, is_set, heeded in (
            ("task.label_smoothing", self.label_smoothing > 0, of_classes),
            ("task.image.rand_augment", image.rand_augment > 0, of_images),
            ("task.image.erase", image.erase > 0, of_images and of_classes),
            ("task.image.mixup", image.mixup > 0, of_images and of_classes),
            ("task.image.cutmix", image.cutmix > 0, of_images and of_classes),
        ):
            if is_set and not heeded:
                kind = f"{self.kind} of {model.modalities[0]}"
                raise ConfigError(key, f"has no effect on {kind}", "Set it to 0.")

    def chosen_metrics(self) -> list[Metric]:
        """What evaluation measures."""
        defaults: dict[str, list[Metric]] = {"classify": ["accuracy"], "regress": ["pearson"], "ctc": ["wer", "cer"]}
        return self.metrics or defaults[self.kind]

    def masking(self) -> MaskingConfig:
        """Frames that are hidden in training; nothing but for CTC."""
        if self.kind != "ctc" or self.ctc.time_mask == 0:
            # Of the kinds, only this one can mask nothing at all.
            return MaskingConfig(kind="spans", starts="anywhere", prob=0.0)
        return MaskingConfig(kind="spans", prob=self.ctc.time_mask, length=self.ctc.time_mask_length)
