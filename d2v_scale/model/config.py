"""What a model is made of: stems, one backbone, predictors. Sizes only; no tensors here.

The name of a stem is open: batches, sources, overrides, metrics and parameters carry it. `ModelConfig.kind` knows the
kind of the stem that is called so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from d2v_scale.errors import ConfigError
from d2v_scale.merging import merged
from d2v_scale.model.stem_config import (
    KINDS,
    AnyStem,
    ArrayStem,
    Kind,
    OneStem,
    SpeechStem,
    TextStem,
    VisionStem,
    require_divisor,
)

_SINGLE = tuple(kind for kind in KINDS if kind != "array")
"""Kinds of which a model has one stem at most, in the field that is called so."""


@dataclass(kw_only=True)
class Backbone:
    """The Transformer shared by all modalities of a run."""

    width: int = 768
    heads: int = 12
    ffn: int = 3072
    """Width of the feed-forward layer."""
    depth: int = 12
    """Main blocks: the ones whose outputs the teacher's targets average."""
    prenet_depth: int = 0
    """Blocks before the main ones, belonging to the stem (2.0)."""
    norm_first: bool = False
    """True: pre-norm with layer scale (1.0 vision); False: post-norm."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of the blocks' matrices at initialisation (`init: default`). Published: 0.02, at width 768
    and above. In a narrow model that makes attention add next to nothing to the residual stream."""
    key_bias: bool = True
    """False: the key projection has no bias (1.0 vision)."""
    layer_scale: float = 0.0
    """Initial layer scale; 0 builds none."""
    final_norm: bool = False
    """A LayerNorm after the last block (1.0 vision)."""
    dropout: float = 0.0
    """After attention-out and after the second FFN linear."""
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    input_dropout: float = 0.0
    """On the input of the first block (after the stem's norm)."""
    drop_path: float = 0.0
    """Rate of the last block; grows linearly from 0 at the first (see `drop_path_rates`)."""
    layer_drop: float = 0.0
    """Probability of skipping a block in the student, the same block on all ranks."""

    def drop_path_rates(self) -> list[float]:
        """Of every block, the prenet's first. A prenet takes the first of the rates that are linear over the main
        blocks, which then go on linearly from the next one to the last (spec 7.2)."""

        def linear(first: float, last: float, count: int) -> list[float]:
            return [first + (last - first) * k / max(1, count - 1) for k in range(count)]

        prenet, depth = self.prenet_depth, self.depth
        if not 0 < prenet < depth:
            return linear(0.0, self.drop_path, prenet + depth)
        rates = linear(0.0, self.drop_path, depth)
        return rates[:prenet] + linear(rates[prenet], self.drop_path, depth)


@dataclass(kw_only=True)
class Predictor:
    """From student states to predicted targets."""

    kind: Literal["linear", "mlp", "conv", "conv1d", "conv2d", "conv3d"] = "linear"
    """`linear`: D to D (1.0 speech, vision); `mlp`: D-2D-GELU-D (1.0 text); `conv*`: the 2.0 decoder. Its kernels
    extend along the one to three axes of the stem (`conv`), along so many (`conv2d`, `conv3d`), or along the line of
    all positions (`conv1d`), which fits any stem."""
    width: int = 768
    """Decoder channels (conv only)."""
    kernel: int = 7
    groups: int = 16
    layers: int = 4
    residual: bool = True
    """Add a layer's input to its output where the channel counts match (conv only)."""
    proj_layers: int = 1
    """Linears after the convolutions; 2 means width-2*width-GELU-D (2.0 text)."""
    input_dropout: float = 0.0
    noise_std: float = 0.01
    """Standard deviation of the decoder's mask tokens (conv only)."""
    final_norm: bool = False
    """A LayerNorm between the convolutions and the projection (conv only)."""
    shared: bool = False
    """One predictor for all stems; its parameters are below `predictors.shared`."""


@dataclass(kw_only=True)
class ModelConfig:
    """One model. Exactly the stems of the modalities that a run trains are present."""

    visible_only: bool = False
    """False: masked positions are replaced (1.0); True: they are removed before the blocks (2.0)."""
    speech: SpeechStem | None = None
    vision: VisionStem | None = None
    text: TextStem | None = None
    arrays: dict[str, ArrayStem] = field(default_factory=dict)
    """Stems of arrays of any kind, each by a name of its own: `model.arrays.ecg.channels`."""
    backbone: Backbone = field(default_factory=Backbone)
    predictor: Predictor = field(default_factory=Predictor)
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass (torch, non-reentrant)."""
    compile: bool = False
    """Compile every block with torch.compile (needs a C++ compiler on a CPU, Triton on a GPU). Logged steps run
    uncompiled, since they look into the blocks."""
    init: Literal["default", "beit"] = "default"
    """`beit`: truncated normals and depth-scaled output weights (1.0 vision, spec 3.7)."""

    @property
    def stems(self) -> dict[str, AnyStem]:
        """The stems there are, by name, in a fixed order. The only one of its kind is called as its kind."""
        single: dict[str, AnyStem | None] = {kind: getattr(self, kind) for kind in _SINGLE}
        return {kind: stem for kind, stem in single.items() if stem is not None} | self.arrays

    def fields_of(self, stems: Mapping[str, AnyStem]) -> dict[str, Any]:
        """The fields that hold these stems, and no others."""
        arrays = {name: stem for name, stem in stems.items() if isinstance(stem, ArrayStem)}
        return {kind: stems.get(kind) for kind in _SINGLE} | {"arrays": arrays}

    def key(self, name: str) -> str:
        """The dotted key of the stem `name`."""
        return f"model.arrays.{name}" if name in self.arrays else f"model.{name}"

    def kind(self, name: str) -> Kind:
        """Of the stem that is called `name`, which must be there."""
        return self.stems[name].kind

    def alone(self, name: str) -> "ModelConfig":
        """The same model with the stem `name` alone."""
        return dataclasses.replace(self, **self.fields_of({name: self.stems[name]}))

    def sole(self, kind: type[OneStem]) -> OneStem:
        """The one stem of a model that has no other, which is of this kind."""
        [stem] = self.stems.values()
        assert isinstance(stem, kind)
        return stem

    def of(self, name: str) -> "ModelConfig":
        """The same model with the stem `name` alone, and what this stem does differently entered in `backbone` and
        `predictor`. The blocks and the widths are those of the whole model."""
        stem = self.stems[name]
        plain = dataclasses.replace(stem, prenet_depth=None, input_dropout=None, predictor=None)
        backbone = self.backbone
        if stem.prenet_depth is not None:
            backbone = dataclasses.replace(backbone, prenet_depth=stem.prenet_depth)
        if stem.input_dropout is not None:
            backbone = dataclasses.replace(backbone, input_dropout=stem.input_dropout)
        predictor = merged(self.predictor, stem.predictor)
        return dataclasses.replace(self, **self.fields_of({name: plain}), predictor=predictor, backbone=backbone)

    @property
    def modalities(self) -> list[str]:
        """The names of the stems, in a fixed order."""
        return list(self.stems)

    def check(self) -> None:
        """Raises `ConfigError` for sizes that do not fit together. Allocates nothing."""
        backbone = self.backbone
        require_divisor("model.backbone.heads", backbone.heads, "model.backbone.width", backbone.width)
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "drop_path", "layer_drop"):
            if not 0 <= getattr(backbone, name) < 1:
                raise ConfigError(f"model.backbone.{name}", f"is {getattr(backbone, name)}", "It must be in [0, 1).")
        if backbone.layer_scale and not backbone.norm_first:
            raise ConfigError("model.backbone.layer_scale", "needs model.backbone.norm_first", "Set one of them.")
        for name, stem in self.stems.items():
            if isinstance(stem, ArrayStem):
                stem.check(backbone.width, self.key(name))
            else:
                stem.check(backbone.width)
            self._check_own(name)

    def _check_own(self, name: str) -> None:
        stem, one = self.stems[name], self.of(name)
        if not 0 <= one.backbone.input_dropout < 1:
            raise ConfigError(f"{self.key(name)}.input_dropout", f"is {stem.input_dropout}", "It must be in [0, 1).")
        if self.predictor.shared and stem.predictor is not None:
            remedy = "Leave it out, or set model.predictor.shared to false."
            raise ConfigError(f"{self.key(name)}.predictor", "is set, but all stems share one", remedy)
        if self.predictor.shared and self.predictor.kind in ("conv", "conv2d", "conv3d"):
            shown = f"is {self.predictor.kind!r}, but stems of a line share it"
            raise ConfigError("model.predictor.kind", shown, "Give conv1d.")
        spec = one.predictor
        if self.visible_only != spec.kind.startswith("conv"):
            raise ConfigError(
                self.predictor_key(name, "kind"),
                f"is {spec.kind!r} with model.visible_only={self.visible_only}",
                "2.0 (visible_only) decodes with conv, conv1d, conv2d or conv3d, 1.0 predicts with linear or mlp.",
            )
        if spec.kind.startswith("conv"):
            key = self.predictor_key(name, "groups")
            require_divisor(key, spec.groups, "model.backbone.width", self.backbone.width)
            require_divisor(key, spec.groups, self.predictor_key(name, "width"), spec.width)
            if spec.layers == 0 and spec.width != self.backbone.width:
                key, width = self.predictor_key(name, "layers"), self.predictor_key(name, "width")
                remedy = f"Give at least 1, or set {width} to {self.backbone.width}."
                raise ConfigError(key, f"is 0, and no convolution makes {spec.width} channels", remedy)
            if spec.proj_layers not in (1, 2):
                key = self.predictor_key(name, "proj_layers")
                raise ConfigError(key, f"is {spec.proj_layers}", "Choose 1 or 2.")

    def decoder_dimensions(self, name: str, axes: int) -> int:
        """Axes along which the kernels of a stem's 2.0 decoder extend, where its positions lie along `axes`. Raises
        ConfigError for kernels that do not fit."""
        kind = self.of(name).predictor.kind
        if kind == "conv1d":
            return 1
        wanted = axes if kind == "conv" else int(kind.removeprefix("conv").removesuffix("d"))
        if wanted != axes or wanted > 3:
            shown = "1 axis" if axes == 1 else f"{axes} axes"
            raise ConfigError(
                self.predictor_key(name, "kind"),
                f"is {kind!r}, but positions of {name} lie along {shown}",
                "Give conv1d, which convolves along the line of all positions."
                if axes > 3
                else "Give conv, which has as many dimensions as the stem has axes, or conv1d.",
            )
        return wanted

    @property
    def predictor_name(self) -> str:
        """The name below `predictors` of a model with one stem (`of`)."""
        [name] = self.stems
        return "shared" if self.predictor.shared else name

    def predictor_key(self, name: str, field: str) -> str:
        """The dotted key that this setting of a stem's predictor comes from."""
        own = self.stems[name].predictor
        prefix = "model" if getattr(own, field, None) is None else self.key(name)
        return f"{prefix}.predictor.{field}"
