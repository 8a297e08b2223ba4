"""What images say of themselves."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.modalities.costs import INDEX_BYTES, Lengths, Setting
from d2v_scale.modalities.patches import PatchModality
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import VisionStem

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.modalities.vision.decoder import VisionDecoder
    from d2v_scale.modalities.vision.drawing import ImageDrawing
    from d2v_scale.modalities.vision.stem import PatchStem
    from d2v_scale.model.layers import Section
    from d2v_scale.model.position_tables import PositionTable


class Vision(PatchModality):
    """Images to a grid of patches, usually after a CLS token."""

    content = "image"
    axes = 2
    raw_name = "pixels"

    @property
    def stem(self) -> VisionStem:
        """Its section of the model's configuration."""
        return self.model.sole(VisionStem)

    @classmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """224 x 224 pixels in colour."""
        del tokenizer
        return ModelConfig(vision=VisionStem())

    @property
    def named_axes(self) -> tuple[Axis, ...]:
        """Of patches; sizes along them may be given in pixels."""
        units = {"px": 1 / self.stem.patch_size}
        return Axis("height", units), Axis("width", units)

    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """All images are cropped to one size."""
        del data, size
        return max(self.stem.size), self.fixed_grid

    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Normal."""
        import torch

        del size
        return torch.randn(samples, self.stem.channels, *self.stem.size, generator=generator)

    @property
    def fixed_grid(self) -> tuple[int, int]:
        """Rows of patches, and patches in a row."""
        return self.stem.grid

    @property
    def input_width(self) -> int:
        """Pixels of a patch, all channels."""
        return self.stem.channels * self.stem.patch_size**2

    def input_values(self, batch: "Batch") -> "Tensor":
        """The patches, row-major; of each its rows of pixels."""
        images, channels, height, width = batch.inputs.shape
        side = self.stem.patch_size
        grid = batch.inputs.float().view(images, channels, height // side, side, width // side, side)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(images, -1, self.input_width)

    @property
    def position_tables(self) -> "dict[str, PositionTable]":
        """The relative positions of 1.0; sine-cosine ones are computed."""
        from d2v_scale.model.position_tables import PositionTable

        return {"bias.table": PositionTable(self.fixed_grid, offsets=True)} if self.has_bias else {}

    @property
    def has_bias(self) -> bool:
        """Relative positions are a bias on attention, sine-cosine ones are added to the patches."""
        return self.stem.positions == "relative"

    def sizes(self, batch: "Batch") -> tuple[int, int]:
        """Images have no padding."""
        del batch
        return 0, 0

    def build_decoder(self, data: "DataConfig", tokenizer: "Path | None") -> "VisionDecoder":
        """Crop, flip, jitter."""
        from d2v_scale.modalities.vision.decoder import VisionDecoder

        del tokenizer
        return VisionDecoder(data.vision, self.stem)

    def build_stem(self, exists: Callable[[str], bool], section: "Section") -> "PatchStem":
        """Patch embedding; positions, masking, extra tokens."""
        from d2v_scale.modalities.vision.stem import PatchStem

        return PatchStem(self.model, exists, section)

    @property
    def keeps_predictor(self) -> bool:
        """In 1.0."""
        return not self.model.visible_only

    def bias_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """The index of the table, and on a GPU the bias."""
        pairs = (lengths.positions + lengths.extra) ** 2
        heads = self.model.backbone.heads / setting.tensor
        return pairs * (INDEX_BYTES + (setting.itemsize * heads if setting.kernels == "cuda" else 0))

    @classmethod
    def build_drawing(cls) -> "ImageDrawing":
        """Images."""
        from d2v_scale.modalities.vision.drawing import ImageDrawing

        return ImageDrawing()
