"""What arrays say of themselves."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.patches import PatchModality
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem
from d2v_scale.shards.content import Content

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.modalities.array.decoder import ArrayDecoder
    from d2v_scale.modalities.array.drawing import ArrayDrawing
    from d2v_scale.modalities.array.stem import PatchedArrays
    from d2v_scale.model.layers import Section
    from d2v_scale.model.position_tables import PositionTable


class Array(PatchModality):
    """Arrays along one to four axes to a grid of patches."""

    content: Content = "array"
    raw_name = "values"

    def __init__(self, model: ModelConfig, name: str) -> None:
        """`name`: of the stem in `model`."""
        super().__init__(model, name)
        self.axes = len(self.stem.axes)
        self.content = "recording" if self.stem.reads_recordings else "array"

    @property
    def stem(self) -> ArrayStem:
        """Its section of the model's configuration."""
        return self.model.sole(ArrayStem)

    @classmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """There is none: what arrays are, a recipe says. Raises ConfigError."""
        del tokenizer
        raise ConfigError("recipe", "is not given, and only model.arrays says what arrays are", "Give a recipe.")

    @property
    def named_axes(self) -> tuple[Axis, ...]:
        """Of patches; sizes along one with a rate may be given in its unit."""
        axes = zip(self.stem.axes.items(), self.stem.rates, strict=True)
        return tuple(Axis(name, _units(axis, rate)) for (name, axis), rate in axes)

    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """All arrays are padded to, or cropped to, one size."""
        del data, size
        return max(self.stem.extents), self.stem.grid

    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Normal."""
        import torch

        del size
        return torch.randn(samples, self.stem.channels, *self.stem.extents, generator=generator)

    @property
    def fixed_grid(self) -> tuple[int, ...]:
        """Of every sample, padding included."""
        return self.stem.grid

    @property
    def input_width(self) -> int:
        """Values of a patch, all channels."""
        return self.stem.patch_values

    def input_values(self, batch: "Batch") -> "Tensor":
        """The patches, row-major; of each its steps along the axes, and of each of these the channels."""
        stem, axes = self.stem, range(len(self.stem.axes))
        samples, channels = batch.inputs.shape[:2]
        pairs = [size for pair in zip(stem.grid, stem.patch, strict=True) for size in pair]
        split = batch.inputs.float().reshape(samples, channels, *pairs)
        order = (0, *(2 + 2 * axis for axis in axes), *(3 + 2 * axis for axis in axes), 1)
        return split.permute(order).reshape(samples, -1, self.input_width)

    def sizes(self, batch: "Batch") -> tuple[int, int]:
        """Patches; those that miss a value are no padding."""
        padded = batch.inputs.shape[0] * batch.masked_rt.shape[1]
        return padded if batch.valid is None else int(batch.valid.sum()) + batch.missing, padded

    def build_decoder(self, data: "DataConfig", tokenizer: "Path | None") -> "ArrayDecoder":
        """Crop, transform, normalise, pad."""
        from d2v_scale.modalities.array.decoder import ArrayDecoder

        del data, tokenizer
        return ArrayDecoder(self.stem, f"model.arrays.{self.name}")

    def build_stem(self, exists: Callable[[str], bool], section: "Section") -> "PatchedArrays":
        """Patch embedding; positions, masking, extra tokens."""
        from d2v_scale.modalities.array.stem import PatchedArrays

        return PatchedArrays(self.model, exists, section)

    @property
    def position_tables(self) -> "dict[str, PositionTable]":
        """Learned positions, of patches."""
        from d2v_scale.model.position_tables import PositionTable

        return {"context.positions": PositionTable(self.fixed_grid)} if self.stem.positions == "learned" else {}

    def context_weights(self) -> float:
        """Learned positions."""
        return math.prod(self.stem.grid) * self.width if self.stem.positions == "learned" else 0.0

    @classmethod
    def build_drawing(cls) -> "ArrayDrawing":
        """Arrays."""
        from d2v_scale.modalities.array.drawing import ArrayDrawing

        return ArrayDrawing()


def _units(axis: ArrayAxis, rate: float | None) -> dict[str, float]:
    if rate is None:
        return {}
    patches = rate / axis.patch
    return {axis.unit: patches} | ({"ms": patches / 1000} if axis.unit == "s" else {})
