"""From student states to predicted targets, at masked positions only."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.model import cpu_ops
from d2v_scale.model.config import Modality, ModelConfig
from d2v_scale.model.init import InitRule, linear_rules
from d2v_scale.model.norm_gelu import norm_gelu
from d2v_scale.model.vision import BEIT

SMALL = InitRule("normal", 0.02)


class LinearPredictor(nn.Module):
    """D to the targets' width, which is D, too, in 1.0 speech and vision."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.proj = cpu_ops.Linear(config.backbone.width, outputs)
        if config.init == "beit":
            linear_rules(self.proj, BEIT)

    def forward(self, x_nd: Tensor) -> Tensor:
        """States at masked positions (N, D) to predictions (N, W)."""
        return self.proj(x_nd)


class MlpPredictor(nn.Module):
    """D to 2D, GELU, to the targets' width (1.0 text: D)."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        width = config.backbone.width
        self.fc1 = cpu_ops.Linear(width, 2 * width)
        self.fc2 = cpu_ops.Linear(2 * width, outputs)
        for layer in (self.fc1, self.fc2):
            linear_rules(layer, SMALL)

    def forward(self, x_nd: Tensor) -> Tensor:
        """States at masked positions (N, D) to predictions (N, W)."""
        return self.fc2(F.gelu(self.fc1(x_nd)))


class ConvPredictor(nn.Module):
    """The 2.0 decoder: visible states and noise back in their places, grouped convolutions, projection (spec 4.2)."""

    def __init__(self, config: ModelConfig, modality: Modality, outputs: int) -> None:
        super().__init__()
        spec, width = config.predictor, config.backbone.width
        stem = modalities.of(config, modality)
        self.planar = spec.kind == "conv2d" and stem.axes == 2
        self.residual = spec.residual
        self.dropout = spec.input_dropout
        conv = nn.Conv2d if self.planar else cpu_ops.SequenceConv
        widths = [width, *[spec.width] * spec.layers]
        self.convs = nn.ModuleList(
            conv(inputs, outputs, spec.kernel, padding=spec.kernel // 2, groups=spec.groups)
            for inputs, outputs in itertools.pairwise(widths)
        )
        if spec.final_norm:
            self.norm = nn.LayerNorm(spec.width, config.backbone.norm_eps)
        self.final_norm = spec.final_norm
        self.proj_layers = spec.proj_layers
        if spec.proj_layers == 1:
            self.proj = cpu_ops.Linear(spec.width, outputs)
            projections = [self.proj]
        else:
            self.proj1 = cpu_ops.Linear(spec.width, 2 * spec.width)
            self.proj2 = cpu_ops.Linear(2 * spec.width, outputs)
            projections = [self.proj1, self.proj2]
        if stem.decoder_projection_std is not None and not spec.shared:
            for layer in projections:
                linear_rules(layer, InitRule("normal", stem.decoder_projection_std))

    def forward(
        self, visible_rsd: Tensor, visible_rs: Tensor, masked_n: Tensor, noise_nd: Tensor, grid: tuple[int, ...]
    ) -> Tensor:
        """Visible states (R, S, D) at `visible_rs` and noise (N, D) at flat `masked_n` to predictions (N, W). `grid`:
        how the positions lie (`Batch.extents`)."""
        rows, kept, width = visible_rsd.shape
        visible_rsd = cpu_ops.dropout(visible_rsd, self.dropout, self.training)
        length = kept + masked_n.shape[0] // max(1, rows)
        index_n = (torch.arange(rows, device=visible_rs.device)[:, None] * length + visible_rs).flatten()
        x_nd = visible_rsd.new_empty(rows * length, width)
        x_nd.index_copy_(0, masked_n, noise_nd.to(x_nd.dtype))
        x_nd.index_copy_(0, index_n, visible_rsd.reshape(-1, width))
        # Channels stay last between the layers; planar convolutions see a permuted view.
        x = x_nd.view(rows, *(grid if self.planar else (length,)), width)
        for conv in self.convs:
            x = self._layer(conv, x)
        out_nd = x.reshape(rows * length, -1).index_select(0, masked_n)
        if self.final_norm:
            out_nd = self.norm(out_nd)
        return self.proj(out_nd) if self.proj_layers == 1 else self.proj2(F.gelu(self.proj1(out_nd)))

    def _layer(self, conv: nn.Module, x: Tensor) -> Tensor:
        out = conv(x.movedim(-1, 1)).movedim(1, -1) if self.planar else conv(x)
        # An even kernel makes one position too many at each end.
        out = out[:, : x.shape[1], : x.shape[2]] if self.planar else out[:, : x.shape[1]]
        out = norm_gelu(out, None, None, 1e-5)
        return out + x if self.residual and out.shape[-1] == x.shape[-1] else out


def build_predictor(config: ModelConfig, modality: Modality, outputs: int) -> nn.Module:
    """The predictor that `config.predictor.kind` names, of targets with so many channels."""
    match config.predictor.kind:
        case "linear":
            return LinearPredictor(config, outputs)
        case "mlp":
            return MlpPredictor(config, outputs)
        case _:
            return ConvPredictor(config, modality, outputs)
