"""Waveforms to 20 ms frames, and frames to what the blocks see."""

import math

import torch
from torch import Tensor, nn

from d2v_scale.modalities.speech import conv_rows
from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import InitRule, set_rule
from d2v_scale.model.layers import Section, rows_of
from d2v_scale.model.norm_gelu import NormGelu, norm_gelu
from d2v_scale.model.position_bias import AlibiBias
from d2v_scale.model.stem import Exists, ExtraTokens, Stem, StemFeatures
from d2v_scale.model.stem_config import SpeechStem


class SpeechFeatures(StemFeatures):
    """Conv stack, norm, projection to the backbone's width (spec 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem = config.sole(SpeechStem)
        channels = [1, *(layer[0] for layer in stem.conv_layers)]
        self.convs = nn.ModuleList()
        self.conv_norms = nn.ModuleList()
        for inputs, (outputs, kernel, stride) in zip(channels, stem.conv_layers, strict=False):
            conv = conv_rows.FrameConv(inputs, outputs, kernel, stride, bias=False)
            set_rule(conv.weight, InitRule("normal", math.sqrt(2.0 / (inputs * kernel))))
            self.convs.append(conv)
            self.conv_norms.append(NormGelu(outputs))
        self.norm = nn.LayerNorm(channels[-1])
        self.proj = cpu_ops.Linear(channels[-1], config.backbone.width)
        self.frozen_convs = False
        """Fine-tuning: no gradient reaches the convolutions."""
        self.add_modality(config)

    def forward(self, wave_bn: Tensor) -> Tensor:
        """(B, samples) at 16 kHz to (B, T, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_convs):
            x_btc = self._convolve(wave_bn.to(self.proj.weight.dtype))
        return self.with_modality(self.proj(self.norm(x_btc)))

    def _convolve(self, wave_bn: Tensor) -> Tensor:
        if conv_rows.applies(wave_bn, self.convs):
            x_nc, rows, frames = conv_rows.to_rows(wave_bn, self.convs)
            for conv, norm in zip(self.convs, self.conv_norms, strict=True):
                x_nc = norm(conv(x_nc))
            return x_nc.view(len(wave_bn), rows, -1)[:, :frames]
        x_bct = wave_bn[:, None]
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            x_bct = norm(conv(x_bct.contiguous()).transpose(1, 2)).transpose(1, 2)
        return x_bct.transpose(1, 2)


class SpeechContext(ExtraTokens):
    """Masking, positional convolutions, extra tokens, norm (spec 3.2)."""

    def __init__(self, config: ModelConfig, *, with_mask_embedding: bool) -> None:
        super().__init__()
        width, stem = config.backbone.width, config.sole(SpeechStem)
        kernel = stem.pos_conv_kernel
        self.dropout = config.backbone.input_dropout
        self.visible_only = config.visible_only
        if with_mask_embedding:
            self.mask_embedding = nn.Parameter(torch.empty(width))
            set_rule(self.mask_embedding, InitRule("uniform", 0.0, 1.0))
        self.pos_convs = nn.ModuleList(
            cpu_ops.SequenceConv(width, width, kernel, padding=kernel // 2, groups=stem.pos_conv_groups)
            for _ in range(stem.pos_conv_depth)
        )
        self.add_tokens(config)
        # Except of 2.0 where the blocks normalise their own input.
        normed = not (config.visible_only and config.backbone.norm_first)
        self.norm = nn.LayerNorm(width, config.backbone.norm_eps) if normed else nn.Identity()
        self.channel_mask = (0.0, 64)
        """Fine-tuning: share of the channels in spans that are zero while training, and a span's length."""

    def forward(
        self,
        features_btd: Tensor,
        masked_rt: Tensor | None,
        visible_rs: Tensor | None,
        valid_bt: Tensor | None,
        clones: int,
    ) -> Tensor:
        """(B, T, D) to (R, n + S, D): R = B * clones; n extra tokens; S = visible frames if given, else all, masked
        ones replaced.

        The positional convolutions always run over the full length; where frames are to be removed, they see zeros.
        """
        x_rtd = rows_of(features_btd, None, clones)
        zeros = x_rtd.new_zeros(())
        if masked_rt is not None:
            blank = zeros if self.visible_only else self.mask_embedding.to(x_rtd.dtype)
            x_rtd = torch.where(masked_rt[..., None], blank, x_rtd)
        if valid_bt is not None and not self.visible_only:
            # 1.0 only: the reference's 2.0 lets padded frames through.
            x_rtd = torch.where(valid_bt.repeat_interleave(clones, dim=0)[..., None], x_rtd, zeros)
        if self.training and self.channel_mask[0] > 0:
            hidden_rd = masked_channels(x_rtd.shape[0], x_rtd.shape[-1], *self.channel_mask, x_rtd.device)
            x_rtd = x_rtd.masked_fill(hidden_rd[:, None], 0.0)
        positions_rtd = self._positions(x_rtd)
        if visible_rs is None:
            x_rsd = x_rtd + positions_rtd
        else:
            x_rsd = rows_of(features_btd, visible_rs, clones) + rows_of(positions_rtd, visible_rs, 1)
        return cpu_ops.dropout(self.norm(self.behind_tokens(x_rsd)), self.dropout, self.training)

    def _positions(self, x_rtd: Tensor) -> Tensor:
        length = x_rtd.shape[1]
        for conv in self.pos_convs:
            # An even kernel makes one frame too many at the end.
            x_rtd = norm_gelu(conv(x_rtd)[:, :length], None, None, 1e-5)
        return x_rtd


def masked_channels(rows: int, width: int, share: float, length: int, device: torch.device) -> Tensor:
    """bool (R, D), True: hidden. int(share * D / length + u) spans a row with distinct starts (spec 2.1).

    Drawn like dropout, from torch's global generator.
    """
    counts_r = (share * width / length + torch.rand(rows, device=device)).long()
    places = width - length + 1
    most = min(int(share * width / length) + 1, places)
    starts_rn = torch.rand(rows, places, device=device).topk(most, dim=1).indices
    at = torch.arange(width, device=device)
    inside_rnd = (at >= starts_rn[..., None]) & (at < starts_rn[..., None] + length)
    used_rn = torch.arange(most, device=device) < counts_r[:, None]
    return (inside_rnd & used_rn[..., None]).any(dim=1)


class WaveformStem(Stem):
    """Convolutions over a waveform, and positions from convolutions over its frames."""

    features: SpeechFeatures
    context: SpeechContext

    def __init__(self, config: ModelConfig, exists: Exists, section: Section) -> None:
        super().__init__(config)
        stem = config.sole(SpeechStem)
        self.frames_of = stem.frames_of
        if stem.alibi:
            self.bias = AlibiBias(config.backbone.heads, owned=section.starts)
        if not section.starts:
            return
        if exists("features"):
            self.features = SpeechFeatures(config)
        own = not config.visible_only and exists("context.mask_embedding")
        self.context = SpeechContext(config, with_mask_embedding=own)

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """Frames of what is real of a waveform."""
        total = self.frames_of(inputs.shape[1])
        frames_b = self.frames_of(valid.sum(dim=1))
        return torch.arange(total, device=inputs.device)[None] < frames_b[:, None]

    def fine_tune(self, channel_mask: tuple[float, int] | None) -> None:
        """The convolutions never learn."""
        self.features.frozen_convs = True
        if channel_mask is not None:
            self.context.channel_mask = channel_mask
