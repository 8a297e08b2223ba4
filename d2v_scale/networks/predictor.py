"""From student states to predicted targets, at masked positions only.

One target is predicted by the predictor's own projection. Each further one has a head `predictors.STEM.NAME`: a
projection of the same make, of its own width, on the same decoder. The decoder is where a predictor's work is, and one
that serves several targets costs about what it costs for one; a whole decoder for each would double the student's tail.
"""

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule, linear_rules
from d2v_scale.model.norm_gelu import norm_gelu
from d2v_scale.muon import give_structure

SMALL = InitRule("normal", 0.02)
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: cpu_ops.SequenceConv,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""By the axes along which their kernels extend."""

Widths = Mapping[str, Mapping[str, int]]
"""Channels of each stem's targets by their names, the first one first."""


class _Projection(nn.Module):
    """What ends in the targets' width: one linear, or two with GELU between, twice as wide there."""

    def build_projection(self, names: tuple[str, ...], inputs: int, outputs: int, rule: InitRule | None) -> None:
        """Add linears of these names. `rule`: of their initial values; None: torch's."""
        self.projection_names = names
        widths = [inputs, *[2 * inputs] * (len(names) - 1), outputs]
        for name, (before, after) in zip(names, itertools.pairwise(widths), strict=True):
            layer = cpu_ops.Linear(before, after)
            if rule is not None:
                linear_rules(layer, rule)
            self.add_module(name, layer)

    def build_heads(self, heads: Mapping[str, int], inputs: int, rule: InitRule | None) -> None:
        """Add a head of this width for each further target, after the own projection."""
        for name, outputs in heads.items():
            self.add_module(name, Head(self.projection_names, inputs, outputs, rule))

    def project(self, x_nd: Tensor) -> Tensor:
        """(N, D) to predictions (N, W)."""
        first, *others = (self.get_submodule(name) for name in self.projection_names)
        x_nd = first(x_nd)
        for layer in others:
            x_nd = layer(F.gelu(x_nd))
        return x_nd

    def predict(self, x_nd: Tensor, heads: tuple[str, ...]) -> tuple[Tensor, ...]:
        """(N, D) to predictions of the first target, and of those whose heads these are."""
        return self.project(x_nd), *(self.get_submodule(name)(x_nd) for name in heads)


class Head(_Projection):
    """Predicts one further target."""

    def __init__(self, names: tuple[str, ...], inputs: int, outputs: int, rule: InitRule | None) -> None:
        super().__init__()
        self.build_projection(names, inputs, outputs, rule)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) to predictions (N, W)."""
        return self.project(x_nd)


class LinearPredictor(_Projection):
    """D to the targets' width, which is D, too, in 1.0 speech and vision."""

    def __init__(self, config: ModelConfig, outputs: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        width, rule = config.backbone.width, BEIT if config.init == "beit" else None
        self.build_projection(("proj",), width, outputs, rule)
        self.build_heads(heads, width, rule)

    def forward(self, x_nd: Tensor, heads: tuple[str, ...]) -> tuple[Tensor, ...]:
        """States at masked positions (N, D) to predictions (N, W): see `_Projection.predict`."""
        return self.predict(x_nd, heads)


class MlpPredictor(_Projection):
    """D to 2D, GELU, to the targets' width (1.0 text: D)."""

    def __init__(self, config: ModelConfig, outputs: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        width = config.backbone.width
        self.build_projection(("fc1", "fc2"), width, outputs, SMALL)
        self.build_heads(heads, width, SMALL)

    def forward(self, x_nd: Tensor, heads: tuple[str, ...]) -> tuple[Tensor, ...]:
        """States at masked positions (N, D) to predictions (N, W): see `_Projection.predict`."""
        return self.predict(x_nd, heads)


class ConvPredictor(_Projection):
    """The 2.0 decoder: visible states and noise back in their places, grouped convolutions, projection (spec 4.2)."""

    def __init__(self, config: ModelConfig, modality: str, outputs: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        spec, width = config.predictor, config.backbone.width
        stem = modalities.of(config, modality)
        self.dimensions = config.decoder_dimensions(modality, stem.axes)
        self.residual = spec.residual
        self.dropout = spec.input_dropout
        conv = _CONVOLUTIONS[self.dimensions]
        widths = [width, *[spec.width] * spec.layers]
        self.convs = nn.ModuleList(
            conv(inputs, outputs, spec.kernel, padding=spec.kernel // 2, groups=spec.groups)
            for inputs, outputs in itertools.pairwise(widths)
        )
        for layer in self.convs:
            give_structure(layer, (1, spec.groups))
        if spec.final_norm:
            self.norm = nn.LayerNorm(spec.width, config.backbone.norm_eps)
        self.final_norm = spec.final_norm
        std = None if spec.shared else stem.decoder_projection_std
        rule = None if std is None else InitRule("normal", std)
        self.build_projection(("proj",) if spec.proj_layers == 1 else ("proj1", "proj2"), spec.width, outputs, rule)
        self.build_heads(heads, spec.width, rule)

    def forward(
        self,
        visible_rsd: Tensor,
        visible_rs: Tensor,
        masked_n: Tensor,
        noise_nd: Tensor,
        grid: tuple[int, ...],
        heads: tuple[str, ...],
        decoded_n: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Visible states (R, S, D) at `visible_rs` and noise (N, D) at flat `masked_n` to predictions (N, W): see
        `_Projection.predict`. `grid`: how the positions lie (`Batch.extents`); `decoded_n`: positions that are
        predicted, where they are others than `masked_n`."""
        rows, kept, width = visible_rsd.shape
        visible_rsd = cpu_ops.dropout(visible_rsd, self.dropout, self.training)
        length = kept + masked_n.shape[0] // max(1, rows)
        index_n = (torch.arange(rows, device=visible_rs.device)[:, None] * length + visible_rs).flatten()
        x_nd = visible_rsd.new_empty(rows * length, width)
        x_nd.index_copy_(0, masked_n, noise_nd.to(x_nd.dtype))
        x_nd.index_copy_(0, index_n, visible_rsd.reshape(-1, width))
        # Channels stay last between the layers; convolutions over several axes see a permuted view.
        x = x_nd.view(rows, *(grid if self.dimensions > 1 else (length,)), width)
        for conv in self.convs:
            x = self._layer(conv, x)
        out_nd = x.reshape(rows * length, -1).index_select(0, masked_n if decoded_n is None else decoded_n)
        if self.final_norm:
            out_nd = self.norm(out_nd)
        return self.predict(out_nd, heads)

    def _layer(self, conv: nn.Module, x: Tensor) -> Tensor:
        out = conv(x.movedim(-1, 1)).movedim(1, -1) if self.dimensions > 1 else conv(x)
        # An even kernel makes one position too many along every axis.
        out = out[(slice(None), *map(slice, x.shape[1:-1]))]
        out = norm_gelu(out, None, None, 1e-5)
        return out + x if self.residual and out.shape[-1] == x.shape[-1] else out


def build_predictors(configs: Mapping[str, ModelConfig], target_widths: Widths) -> dict[str, nn.Module]:
    """Of stems, each as a model of its own (`ModelConfig.of`), by the name below `predictors`; one that several stems
    share has the heads of all. Stems that `target_widths` lacks have one target, of the model's width."""
    heads: dict[str, dict[str, int]] = {}
    first: dict[str, tuple[ModelConfig, str, int]] = {}
    for modality, one in configs.items():
        name = one.predictor_name
        widths = dict(target_widths.get(modality) or {"": one.backbone.width})
        first[name] = one, modality, widths.pop(next(iter(widths)))
        heads[name] = heads.get(name, {}) | widths
    return {name: _build_predictor(*what, heads[name]) for name, what in first.items()}


def _build_predictor(config: ModelConfig, modality: str, outputs: int, heads: Mapping[str, int]) -> nn.Module:
    match config.predictor.kind:
        case "linear":
            return LinearPredictor(config, outputs, heads)
        case "mlp":
            return MlpPredictor(config, outputs, heads)
        case _:
            return ConvPredictor(config, modality, outputs, heads)
