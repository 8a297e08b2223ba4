"""Bytes that the student's forward pass keeps for its backward pass, layer by layer, counted from the sizes alone.

Counted as autograd saves them: the input of every matrix product, convolution, norm and activation, once per storage,
in the precision of the forward pass; means and roots of norms in fp32. A layer's bytes include its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2v_scale import modalities
from d2v_scale.data2vec.targets import Target
from d2v_scale.modalities.costs import INDEX_BYTES, NORM_BYTES, Lengths, Setting
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import LayerSpec
from d2v_scale.networks.layers import describe


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for one micro-batch on one device."""

    layer: LayerSpec
    saved: float
    """Without activation checkpointing."""
    kept: float
    """With it: of a block only the input; everything of other layers."""


def activations(model: ModelConfig, modality: str, lengths: Lengths, setting: Setting) -> tuple[LayerActivations, ...]:
    """What each layer of `describe` keeps of a micro-batch of samples of these lengths."""
    found = []
    joint = _joint_bias(model, modality, lengths, setting)
    for layer in describe(model, modality):
        stem = layer.stem or modality
        own = lengths.of(layer.stem)
        saved = _saved(model, stem, own, setting, layer)
        kept = _block_input(model, own, setting) if layer.kind == "block" else saved
        if layer.main == 0:  # which is the first that needs it
            saved, kept = saved + joint, kept + joint
        found.append(LayerActivations(layer, saved, kept))
    return tuple(found)


def _joint_bias(model: ModelConfig, modality: str, lengths: Lengths, setting: Setting) -> float:
    """The position biases of all parts of paired samples as one: a CPU's operators add it to logits, and keep none."""
    if not lengths.parts or setting.kernels == "cpu" or not modalities.of(model, modality).has_bias:
        return 0.0
    length = lengths.kept + lengths.extra
    rows = setting.samples * lengths.clones
    return setting.itemsize * rows * length * length * model.backbone.heads / setting.tensor


def loss_bytes(lengths: Lengths, samples: float, targets: Sequence[Target]) -> float:
    """Targets and errors at masked positions, fp32; what one target at a time needs beside them at all positions."""
    width = sum(target.width for target in targets)
    scratch = max(target.scratch() for target in targets)
    return 4 * samples * (2 * lengths.clones * lengths.masked * width + lengths.positions * scratch)


def head_bytes(model: ModelConfig, lengths: Lengths, setting: Setting, heads: int) -> float:
    """What heads of further targets keep beside the decoder's output, which the first target's projection has, too: of
    two linears what is between them, before and after its GELU. `model`: of one stem."""
    spec = model.predictor
    two = spec.kind == "mlp" or (spec.kind != "linear" and spec.proj_layers == 2)
    width = model.backbone.width if spec.kind == "mlp" else spec.width
    return heads * two * setting.samples * lengths.clones * lengths.masked * setting.itemsize * 4 * width


def teacher_bytes(model: ModelConfig, lengths: Lengths, setting: Setting, sums: float) -> float:
    """What the teacher's forward pass needs at once: a block's states and each target's fp32 sum of taps, with a
    temporary. `sums`: positions of a sample of which there are such, over all targets."""
    width, ffn = model.backbone.width, model.backbone.ffn
    rows = setting.samples * (lengths.positions + lengths.extra)
    block = setting.itemsize * rows * (4 * width + max(4 * width, 2 * ffn) / setting.tensor)
    return block + 4 * setting.samples * (2 * lengths.positions + sums) * width


def _saved(model: ModelConfig, modality: str, lengths: Lengths, setting: Setting, layer: LayerSpec) -> float:
    size, width, rows = setting.itemsize, model.backbone.width, setting.samples * lengths.clones
    inside = rows * (lengths.kept + lengths.extra)
    match layer.kind:
        case "block":
            return _block(model, modality, lengths, setting)
        case "features":
            return modalities.of(model, modality).feature_bytes(lengths, setting)
        case "context":
            return modalities.of(model, modality).context_bytes(lengths, setting)
        case "bias":
            return modalities.of(model, modality).bias_bytes(lengths, setting)
        case "final_norm":
            return inside * (size * width + NORM_BYTES)
        case _:
            return _predictor(model.of(modality), lengths, setting)


def _block_input(model: ModelConfig, lengths: Lengths, setting: Setting) -> float:
    positions = setting.samples * lengths.clones * (lengths.kept + lengths.extra)
    return setting.itemsize * positions * model.backbone.width


def _block(model: ModelConfig, modality: str, lengths: Lengths, setting: Setting) -> float:
    backbone, size = model.backbone, setting.itemsize
    length = lengths.kept + lengths.extra
    positions = setting.samples * lengths.clones * length
    plain = setting.kernels == "cpu" and modalities.of(model, modality).has_bias
    # Inputs of the two norms and of the two halves; in post-norm blocks the norms' outputs are those inputs.
    whole = (4 + (2 if backbone.layer_scale else 0)) * backbone.width
    split = 4 * backbone.width + 2 * backbone.ffn
    if plain:
        split += backbone.heads * length
    dropped: float = 2 * backbone.width if backbone.dropout else 0
    dropped += backbone.ffn / setting.tensor if backbone.activation_dropout else 0
    masks = dropped * (1 if setting.kernels == "cuda" else size)
    logits = 0 if plain else 4 * backbone.heads / setting.tensor
    return positions * (size * (whole + split / setting.tensor) + 2 * NORM_BYTES + logits + masks)


def _predictor(model: ModelConfig, lengths: Lengths, setting: Setting) -> float:
    spec, width, size = model.predictor, model.backbone.width, setting.itemsize
    rows = setting.samples * lengths.clones
    masked = rows * lengths.masked
    if spec.kind in ("linear", "mlp"):
        return masked * size * width * (5 if spec.kind == "mlp" else 1)
    full = rows * lengths.positions
    inputs = [width, *[spec.width] * (spec.layers - 1)]
    convolutions = sum(full * (size * (each + 2 * spec.width) + NORM_BYTES) for each in inputs)
    projected = masked * (size * spec.width * (5 if spec.proj_layers == 2 else 1) + 2 * INDEX_BYTES)
    return convolutions + projected + rows * lengths.kept * (size * width + INDEX_BYTES)
