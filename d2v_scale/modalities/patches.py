"""What stems of patches say of themselves, whatever they are cut from: costs, heads, raw features."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from d2v_scale.modalities.base import Modality
from d2v_scale.modalities.costs import INDEX_BYTES, NORM_BYTES, Lengths, Setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2v_scale.batch import Batch


class PatchModality(Modality):
    """A stem whose samples are all of one size, and whose features are `model.patches.PatchFeatures`."""

    feature_bias = "features.patch.bias"

    @property
    @abstractmethod
    def fixed_grid(self) -> tuple[int, ...]:
        """Of every sample, padding included."""

    @property
    @abstractmethod
    def input_width(self) -> int:
        """Values of a patch, all channels."""

    def build_head(self, outputs: int) -> "nn.Module":
        """Mean of the real patches."""
        from d2v_scale.finetuning.heads import PatchHead

        return PatchHead(self.width, outputs, scale=1.0 if self.model.visible_only else 0.001)

    def feature_flops(self, lengths: Lengths) -> list[float]:
        """The patch embedding."""
        return [2.0 * lengths.positions * self.feature_weights()]

    def feature_weights(self) -> float:
        """The patch embedding."""
        return self.input_width * self.width

    def feature_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """What is cut into patches."""
        del lengths
        return setting.itemsize * setting.samples * math.prod(self.fixed_grid) * self.input_width

    def context_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """The norm and the choice of visible patches (2.0), or the masks (1.0)."""
        rows = setting.samples * lengths.clones
        if not self.model.visible_only:
            return rows * lengths.positions
        inside = rows * (lengths.kept + lengths.extra)
        normed = 0.0 if self.model.backbone.norm_first else inside * (setting.itemsize * self.width + NORM_BYTES)
        return normed + INDEX_BYTES * rows * lengths.kept

    def raw_features(self, batch: "Batch") -> "Tensor":
        """What the model reads, padding included."""
        return batch.inputs.flatten(1)
