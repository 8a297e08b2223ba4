"""Images to patches, and patches to what the blocks see."""

import math

import torch
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule, linear_rules, set_rule
from d2v_scale.model.layers import Section, rows_of
from d2v_scale.model.position_bias import RelativeBias, sincos_positions
from d2v_scale.model.stem import Exists, ExtraTokens, Stem
from d2v_scale.model.stem_config import VisionStem


class VisionFeatures(nn.Module):
    """Patch embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem, width = config.sole(VisionStem), config.backbone.width
        self.patch = nn.Conv2d(stem.channels, width, stem.patch_size, stem.patch_size)
        if config.init == "beit":
            linear_rules(self.patch, BEIT)
        elif config.visible_only:
            # Xavier-uniform on the flattened width x (channels * patch^2) matrix; the bias keeps torch's default.
            bound = math.sqrt(6.0 / (stem.channels * stem.patch_size**2 + width))
            set_rule(self.patch.weight, InitRule("uniform", -bound, bound))

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, C, H, W) to (B, T, D), row-major patches."""
        return self.patch(images_bchw.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)


class VisionContext(ExtraTokens):
    """Positions, masking, extra tokens, norm."""

    positions_td: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem = config.sole(VisionStem)
        width = config.backbone.width
        beit = config.init == "beit"
        self.dropout = config.backbone.input_dropout
        self.add_tokens(config)
        self.has_mask_token = not config.visible_only
        if self.has_mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            set_rule(self.mask_token, BEIT if beit else InitRule("normal", 0.02))
        # Of 2.0, where the blocks do not normalise their own input.
        normed = config.visible_only and not config.backbone.norm_first
        self.norm = nn.LayerNorm(width, config.backbone.norm_eps) if normed else None
        self.has_positions = stem.positions == "sincos"
        if self.has_positions:
            self.register_buffer("positions_td", sincos_positions(width, stem.grid), persistent=False)

    def forward(
        self,
        features_btd: Tensor,
        masked_rt: Tensor | None,
        visible_rs: Tensor | None,
        valid_bt: Tensor | None,
        clones: int,
    ) -> Tensor:
        """(B, T, D) to (R, n + S, D): R = B * clones; n extra tokens; S = visible patches if given, else all, masked
        ones replaced."""
        del valid_bt
        if self.has_positions and (masked_rt is None or visible_rs is not None):
            features_btd = features_btd + self.positions_td.to(features_btd.dtype)
        x_rsd = rows_of(features_btd, visible_rs, clones)
        if visible_rs is None and masked_rt is not None:
            x_rsd = torch.where(masked_rt[..., None], self.mask_token.to(x_rsd.dtype), x_rsd)
            if self.has_positions:  # after the replacement, which would leave masked patches without any
                x_rsd = x_rsd + self.positions_td.to(x_rsd.dtype)
        x_rsd = self.behind_tokens(x_rsd)
        if self.norm is not None:
            x_rsd = self.norm(x_rsd)
        return cpu_ops.dropout(x_rsd, self.dropout, self.training)


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
            self.features = VisionFeatures(config)
        self.context = VisionContext(config)

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor | None:
        """Images are whole."""
        del inputs, valid
        return None

    def attention_bias(self, states_rsd: Tensor, visible_rs: Tensor | None, position: Tensor | None) -> Tensor:
        """Of the whole grid."""
        del states_rsd, visible_rs
        return self.bias(position)
