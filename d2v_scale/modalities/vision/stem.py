"""Images to patches, and where patches are."""

from torch import Tensor

from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import Section
from d2v_scale.model.patches import PatchContext, PatchFeatures
from d2v_scale.model.position_bias import RelativeBias
from d2v_scale.model.stem import Exists, Stem
from d2v_scale.model.stem_config import VisionStem


class PatchStem(Stem):
    """Patches, their positions, extra tokens (CLS)."""

    def __init__(self, config: ModelConfig, exists: Exists, section: Section) -> None:
        super().__init__(config)
        spec = config.sole(VisionStem)
        if spec.positions == "relative":
            self.bias = RelativeBias(
                spec.grid, config.backbone.heads, spec.relative_std, extra=self.extra_tokens, owned=section.starts
            )
        if not section.starts:
            return
        if exists("features"):
            self.features = PatchFeatures(config, spec.channels, (spec.patch_size, spec.patch_size))
        self.context = PatchContext(config, spec.grid, "sincos" if spec.positions == "sincos" else "none")

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor | None:
        """Images are whole."""
        del inputs, valid
        return None

    def attention_bias(self, states_rsd: Tensor, visible_rs: Tensor | None, position: Tensor | None) -> Tensor:
        """Of the whole grid."""
        del states_rsd, visible_rs
        return self.bias(position)
