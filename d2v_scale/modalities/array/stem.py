"""Arrays to patches along one to four axes, and patches to what the blocks see."""

import math

import torch
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule, linear_rules, set_rule
from d2v_scale.model.layers import Section, rows_of
from d2v_scale.model.position_bias import sincos_positions
from d2v_scale.model.stem import Exists, ExtraTokens, Stem
from d2v_scale.model.stem_config import ArrayStem

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class PatchFeatures(nn.Module):
    """Patch embedding: one linear, as a convolution whose kernel is its stride, so that of two axes it is that of
    images, bit by bit. Of four axes, which no convolution has, steps within a patch along the first are channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem, width = config.sole(ArrayStem), config.backbone.width
        self.first_patch, *last = (1, *stem.patch) if len(stem.patch) < 4 else stem.patch
        conv = _CONVOLUTIONS[len(last)]
        self.patch = conv(stem.channels * self.first_patch, width, tuple(last), tuple(last))  # type: ignore[arg-type]
        self.folds = len(stem.patch) == 4
        if config.init == "beit":
            linear_rules(self.patch, BEIT)
        elif config.visible_only:
            # Xavier-uniform on the flattened width x values-of-a-patch matrix; the bias keeps torch's default.
            bound = math.sqrt(6.0 / (stem.patch_values + width))
            set_rule(self.patch.weight, InitRule("uniform", -bound, bound))

    def forward(self, arrays: Tensor) -> Tensor:
        """(B, C, E_1 ... E_n) to (B, T, D), row-major patches."""
        arrays = arrays.to(self.patch.weight.dtype)
        if not self.folds:
            return self.patch(arrays).flatten(2).transpose(1, 2)
        samples, channels, extent, *others = arrays.shape
        split = arrays.view(samples, channels, extent // self.first_patch, self.first_patch, *others)
        folded = split.transpose(1, 2).reshape(-1, channels * self.first_patch, *others)
        return self.patch(folded).flatten(2).transpose(1, 2).reshape(samples, -1, self.patch.out_channels)


class PatchContext(ExtraTokens):
    """Positions, masking, extra tokens, norm."""

    positions_td: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem = config.sole(ArrayStem)
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
        self.learns_positions = stem.positions == "learned"
        if self.learns_positions:
            self.positions = nn.Parameter(torch.empty(math.prod(stem.grid), width))
            set_rule(self.positions, BEIT if beit else InitRule("normal", 0.02))
        else:
            self.register_buffer("positions_td", sincos_positions(width, stem.grid), persistent=False)

    def forward(
        self,
        features_btd: Tensor,
        masked_rt: Tensor | None,
        visible_rs: Tensor | None,
        valid_bt: Tensor | None,
        clones: int,
    ) -> Tensor:
        """(B, T, D) to (R, extra tokens + S, D): R = B * clones; S = visible patches if given, else all, masked ones
        replaced, whose positions are still told."""
        del valid_bt
        positions_td = (self.positions if self.learns_positions else self.positions_td).to(features_btd.dtype)
        if visible_rs is None and masked_rt is not None:
            x_rsd = rows_of(features_btd, None, clones)
            x_rsd = torch.where(masked_rt[..., None], self.mask_token.to(x_rsd.dtype), x_rsd) + positions_td
        else:
            x_rsd = rows_of(features_btd + positions_td, visible_rs, clones)
        x_rsd = self.behind_tokens(x_rsd)
        if self.norm is not None:
            x_rsd = self.norm(x_rsd)
        return cpu_ops.dropout(x_rsd, self.dropout, self.training)


class PatchedArrays(Stem):
    """Patches, their positions, extra tokens."""

    def __init__(self, config: ModelConfig, exists: Exists, section: Section) -> None:
        super().__init__(config)
        if not section.starts:
            return
        if exists("features"):
            self.features = PatchFeatures(config)
        self.context = PatchContext(config)

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """Decoders say it of patches."""
        del inputs
        return valid
