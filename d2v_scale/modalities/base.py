"""What a modality says of itself: the one place to ask, instead of asking which modality it is.

A *kind* (vision, speech, text, array) is a class here. The *name of a stem* is what batches, parameters, sources and
metrics carry. What shards hold (`Content`) and what a stem reads are two things: one set of shards may serve several
stems.

Nothing here imports torch: the planner and the command line ask, too. What needs it is imported where it is built.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.modalities.costs import Lengths, Setting
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.shards.content import Content

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.data.items import Items
    from d2v_scale.data.items import Lengths as SampleLengths
    from d2v_scale.data2vec.masking import Masks
    from d2v_scale.model.layers import Section
    from d2v_scale.model.position_tables import PositionTable
    from d2v_scale.model.stem import Stem
    from d2v_scale.plots.drawing import Drawing
    from d2v_scale.shards.rows import Decoder
    from d2v_scale.shards.shard_set import ShardSet


class Modality(ABC):
    """A stem of a model, and everything that differs between kinds of stems."""

    content: Content
    """What it reads. Of a class: what is usual."""
    axes: int = 1
    """Axes along which its positions lie."""
    unit: ClassVar[str | None] = None
    """The `batch_unit` that its samples have beside `samples`; None: all are of one size."""
    tasks: ClassVar[tuple[str, ...]] = ("classify", "regress")
    """Kinds of fine-tuning that it has a head for."""
    uses_tokenizer: ClassVar[bool] = False
    """Whether its inputs are ids of a tokenizer."""
    cropped: ClassVar[bool] = False
    """Whether rows take the length of their batch's shortest."""
    limit_key: ClassVar[str] = ""
    """The key that says how much of a sample is read (`longest_read`)."""
    throughput: ClassVar[tuple[str, int] | None] = None
    """Name of what is counted of its inputs in the record, and how many values of an input are one of it."""
    usual_size: ClassVar[int] = 0
    """`size` of samples of noise (`noise`), unless another is asked for; 0: all are of one size."""
    feature_bias: ClassVar[str]
    """The parameter below `stems.NAME` that is added to all features, last of all."""
    raw_name: ClassVar[str]
    """What `raw_features` are called."""

    def __init__(self, model: ModelConfig, name: str) -> None:
        """`name`: of the stem in `model`."""
        self.model = model
        self.name = name

    @classmethod
    @abstractmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """A model with a stem of this kind and nothing but defaults, for whoever has shards and no recipe.
        `tokenizer`: of the shards, where they have one."""

    @property
    def width(self) -> int:
        """Channels of the model, D."""
        return self.model.backbone.width

    # Geometry

    @property
    def extra_tokens(self) -> int:
        """Positions before those of the input (CLS)."""
        [stem] = self.model.stems.values()
        return stem.extra_token_count

    @property
    @abstractmethod
    def named_axes(self) -> tuple[Axis, ...]:
        """The axes along which its positions lie, in the order of `Lengths.grid`."""

    @abstractmethod
    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """`Lengths.inputs` and `Lengths.grid` of the longest sample that is trained on, or of one of this `size` where
        samples differ (samples of audio, tokens). Raises ConfigError for one without positions."""

    def mean_size(self, data: "DataConfig", length_n: "NDArray[np.int64]") -> float | None:
        """Mean `size` of the training samples that are made of members of these lengths (as an index counts them);
        None where all are of one size."""
        del data, length_n
        return None

    def longest_read(self, data: "DataConfig") -> int | None:
        """The longest sample that a row holds all of, as an index counts lengths; None: all are read whole."""
        del data
        return None

    def read_of(
        self, length_n: "NDArray[np.int64]", data: "DataConfig", extensions: "Sequence[str]"
    ) -> "NDArray[np.int64]":
        """How much a row holds at most of parts of paired samples, as an index counts lengths (0: there is no part).
        `extensions`: of the members of their shard."""
        del extensions
        longest = self.longest_read(data)
        return length_n if longest is None else length_n.clip(max=longest)

    @abstractmethod
    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Inputs of a batch of so many samples of this `size` that mean nothing, for benchmarks. On the CPU."""

    @property
    def most_pieces(self) -> int | None:
        """How many pieces a tokenizer may have; None: it reads no ids."""
        return None

    @property
    def parts(self) -> "list[Modality]":
        """The stems that a sample is read by: this one, or those of a sequence of several."""
        return [self]

    @property
    def fixed_grid(self) -> tuple[int, ...] | None:
        """The grid of every sample; None where it depends on the sample."""
        return None

    @property
    def position_tables(self) -> "dict[str, PositionTable]":
        """By parameter of the stem, those that have a row for each place of its grid; none as it stands."""
        return {}

    @property
    def has_bias(self) -> bool:
        """Whether attention gets a position bias."""
        return False

    def positions_of(self, length_n: "NDArray[np.int64]", data: "DataConfig") -> "NDArray[np.int64]":
        """Positions of parts of paired samples that are so long as an index counts them (0 or more); 0 for those that
        are too short to be read. As it stands, of samples of one size."""
        del data
        assert self.fixed_grid is not None
        return length_n * 0 + math.prod(self.fixed_grid)

    # From shards to a batch

    def read(self, shards: "ShardSet") -> "ShardSet":
        """These shards as one sees them who reads of their samples what this stem does. Raises DataError."""
        from d2v_scale.shards.one_content import reading

        return reading(shards, self.content)

    def items(self, shards: "ShardSet", data: "DataConfig", lengths: "SampleLengths") -> "Items":
        """What of these shards a plan deals with."""
        from d2v_scale.data.items import Items

        return Items(shards, data, lengths)

    @abstractmethod
    def build_decoder(self, data: "DataConfig", tokenizer: "Path | None") -> "Decoder":
        """How samples become rows, and rows a batch. Raises ConfigError where data and model do not fit."""

    def shortest_seconds(self, data: "DataConfig") -> float:
        """Samples that last less are left out."""
        del data
        return 0.0

    def uncut(self, data: "DataConfig", longest: int) -> "DataConfig":
        """Settings that cut nothing off a sample of this length, as the index counts it."""
        del longest
        return data

    def sizes(self, batch: "Batch") -> tuple[int, int]:
        """What of a batch is no padding, and all of it, as the record counts it: values of the inputs."""
        padded = batch.inputs.numel()
        return padded if batch.valid is None else int(batch.valid.sum()), padded

    def student_inputs(self, inputs: "Tensor", masks: "Masks") -> "Tensor | None":
        """What the student is given where masks change the inputs themselves; None: it is given what the teacher is.
        `masks` with no position: of a row that stands for none."""
        del inputs, masks
        return None

    def masked_only(
        self, inputs: "Tensor", valid: "Tensor | None", masked_bt: "Tensor"
    ) -> "tuple[Tensor, Tensor | None]":
        """Inputs of which the teacher sees the masked positions alone, and what of them is real: a bug of the reference
        that `objective.compat` can repeat."""
        del masked_bt
        return inputs, valid

    @property
    def input_width(self) -> int | None:
        """Values of the raw input at one position; None: there are none to regress."""
        return None

    def input_values(self, batch: "Batch") -> "Tensor":
        """fp32 (B, T, `input_width`): the raw input at each position, to be regressed."""
        del batch
        raise AssertionError(f"{self.name} has no values at a position")

    # Networks

    @abstractmethod
    def build_stem(self, exists: Callable[[str], bool], section: "Section") -> "Stem":
        """The stem's layers that are in `section`, without its prenet. `exists`: whether a parameter below
        `stems.NAME` (`features`, `context.mask_embedding`) is to be built."""

    @property
    def decoder_projection_std(self) -> float | None:
        """Standard deviation that a decoder's projections start from; None: torch's default."""
        return None

    @abstractmethod
    def build_head(self, outputs: int) -> "nn.Module":
        """The head of a fine-tuning task that gives one answer a sample."""

    @property
    def keeps_predictor(self) -> bool:
        """Whether the teacher of the published recipes has the predictor, too, although targets do not need it."""
        return False

    def add_published_parts(self, parts: TeacherParts) -> None:
        """Enter what the published recipes share with the teacher, or copy to it, of this stem (spec 1.4)."""
        del parts

    # Costs

    @abstractmethod
    def feature_flops(self, lengths: Lengths) -> list[float]:
        """FLOPs of the feature layers' forward for a sample, the one that reads the raw input first."""

    def context_flops(self, lengths: Lengths) -> float:
        """FLOPs of the context's forward for one row."""
        del lengths
        return 0.0

    @abstractmethod
    def feature_weights(self) -> float:
        """Weights of the feature layers' matrices, tables and kernels."""

    def context_weights(self) -> float:
        """Weights of the context's kernels."""
        return 0.0

    @abstractmethod
    def feature_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Bytes that the feature layers keep of a micro-batch for the backward pass."""

    @abstractmethod
    def context_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Bytes that the context keeps of a micro-batch for the backward pass."""

    def bias_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Bytes that the position bias keeps of a micro-batch for the backward pass."""
        del lengths, setting
        raise AssertionError(f"{self.name} has no position bias")

    # What is looked at

    @classmethod
    @abstractmethod
    def build_drawing(cls) -> "Drawing":
        """How its samples are drawn."""

    @abstractmethod
    def raw_features(self, batch: "Batch") -> "Tensor":
        """float32 (B, F): what samples are without any model."""
