"""Arrays to patches along one to four axes."""

from torch import Tensor

from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import Section
from d2v_scale.model.patches import PatchContext, PatchFeatures
from d2v_scale.model.stem import Exists, Stem
from d2v_scale.model.stem_config import ArrayStem


class PatchedArrays(Stem):
    """Patches, their positions, extra tokens."""

    def __init__(self, config: ModelConfig, exists: Exists, section: Section) -> None:
        super().__init__(config)
        if not section.starts:
            return
        spec = config.sole(ArrayStem)
        if exists("features"):
            self.features = PatchFeatures(config, spec.channels, spec.patch)
        self.context = PatchContext(config, spec.grid, spec.positions)

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """Decoders say it of patches."""
        del inputs
        return valid
