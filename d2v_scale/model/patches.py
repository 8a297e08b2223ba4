"""Stems of patches, whatever they are cut from: values along one to four axes to what the blocks see."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule, linear_rules, set_rule
from d2v_scale.model.layers import rows_of
from d2v_scale.model.position_bias import sincos_positions
from d2v_scale.model.stem import ExtraTokens, StemFeatures

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class PatchFeatures(StemFeatures):
    """Patch embedding: one linear, as a convolution whose kernel is its stride. Of four axes, which no convolution has,
    steps within a patch along the first are channels."""

    def __init__(self, config: ModelConfig, channels: int, patch: tuple[int, ...]) -> None:
        """`patch`: steps along each axis."""
        super().__init__()
        width = config.backbone.width
        self.folds = len(patch) == 4
        self.first_patch, *last = patch if self.folds else (1, *patch)
        conv = _CONVOLUTIONS[len(last)]
        self.patch = conv(channels * self.first_patch, width, tuple(last), tuple(last))  # type: ignore[arg-type]
        if config.init == "beit":
            linear_rules(self.patch, BEIT)
        elif config.visible_only:
            # Xavier-uniform on the flattened width x values-of-a-patch matrix; the bias keeps torch's default.
            bound = math.sqrt(6.0 / (channels * math.prod(patch) + width))
            set_rule(self.patch.weight, InitRule("uniform", -bound, bound))
        self.add_modality(config)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, E_1 ... E_n) to (B, T, D), row-major patches."""
        values = values.to(self.patch.weight.dtype)
        if not self.folds:
            return self.with_modality(self.patch(values).flatten(2).transpose(1, 2))
        samples, channels, extent, *others = values.shape
        split = values.view(samples, channels, extent // self.first_patch, self.first_patch, *others)
        folded = split.transpose(1, 2).reshape(-1, channels * self.first_patch, *others)
        x_btd = self.patch(folded).flatten(2).transpose(1, 2).reshape(samples, -1, self.patch.out_channels)
        return self.with_modality(x_btd)


class PatchContext(ExtraTokens):
    """Positions, masking, extra tokens, norm."""

    positions_td: Tensor

    def __init__(
        self, config: ModelConfig, grid: tuple[int, ...], positions: Literal["none", "sincos", "learned"]
    ) -> None:
        """`grid`: patches along each axis. `positions`: what is added to the patches."""
        super().__init__()
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
        self.kind = positions
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(math.prod(grid), width))
            set_rule(self.positions, BEIT if beit else InitRule("normal", 0.02))
        elif positions == "sincos":
            self.register_buffer("positions_td", sincos_positions(width, grid), persistent=False)

    def forward(
        self,
        features_btd: Tensor,
        masked_rt: Tensor | None,
        visible_rs: Tensor | None,
        valid_bt: Tensor | None,
        clones: int,
    ) -> Tensor:
        """(B, T, D) to (R, n + S, D): R = B * clones; n extra tokens; S = visible patches if given, else all, masked
        ones replaced, whose positions are still told."""
        del valid_bt
        if visible_rs is None and masked_rt is not None:
            x_rsd = rows_of(features_btd, None, clones)
            x_rsd = self._placed(torch.where(masked_rt[..., None], self.mask_token.to(x_rsd.dtype), x_rsd))
        else:
            x_rsd = rows_of(self._placed(features_btd), visible_rs, clones)
        x_rsd = self.behind_tokens(x_rsd)
        if self.norm is not None:
            x_rsd = self.norm(x_rsd)
        return cpu_ops.dropout(x_rsd, self.dropout, self.training)

    def _placed(self, x_btd: Tensor) -> Tensor:
        """With positions added, of (B or R, T, D)."""
        if self.kind == "none":
            return x_btd
        return x_btd + (self.positions if self.kind == "learned" else self.positions_td).to(x_btd.dtype)
