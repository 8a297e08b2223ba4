"""What configurations of the reference code have in common, in our terms and in its own."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2v_scale.data2vec.config import EmaConfig, LossConfig, ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.targets import TARGETS, Place, build
from d2v_scale.errors import CheckpointError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]


REMEDY = "Export the encoder with --to hf, or any model with --to safetensors."


@dataclass
class Reference:
    """One reference model in our terms."""

    modality: str
    model: ModelConfig
    objective: ObjectiveConfig
    parts: TeacherParts


def require(settings: Settings, key: str, *allowed: Any, default: Any = None) -> None:
    """Raises `CheckpointError` for a setting that is not one of `allowed`."""
    value = settings.get(key, default)
    if value not in allowed:
        raise CheckpointError(
            f"the checkpoint was trained with {key}={value!r}, which is not supported.",
            f"Supported: {', '.join(map(repr, allowed))}.",
        )


def _norms(settings: Settings, *, across_batch: bool) -> tuple[str, str]:
    """The reference's flags as `layer_norm` and `final_norm`, in the order in which it applies them."""
    per_tap = [n for n in ("batch", "instance", "group", "layer") if settings.get(f"{n}_norm_target_layer")]
    final = [n for n in ("layer", "instance") if settings.get(f"{n}_norm_targets")]
    if across_batch and not set(per_tap) & {"batch", "instance"}:
        # fairseq 1.0 speech keeps taps time-major here, so these norms run over the batch instead of over time.
        per_tap = ["across_batch_and_channels" if n == "group" else n for n in per_tap]
        final = ["across_batch" if n == "instance" else n for n in final]
    return "+".join(per_tap) or "none", "+".join(final) or "none"


def read_target(settings: Settings, *, default_k: int, across_batch: bool = False) -> TargetConfig:
    """fairseq's targets. `across_batch`: its norms over time run over the batch."""
    layer_norm, final_norm = _norms(settings, across_batch=across_batch)
    return TargetConfig(
        tap="block" if settings.get("end_of_block_targets") else "ffn",
        top_k_layers=settings.get("average_top_k_layers", default_k),
        layer_norm=layer_norm,
        final_norm=final_norm,
    )


def read_ema(settings: Settings) -> EmaConfig:
    """fairseq's decay."""
    start = settings.get("ema_decay", 0.999)
    end = settings.get("ema_end_decay", start)
    return EmaConfig(start=start, end=end, anneal_steps=int(settings.get("ema_anneal_end_step") or 0))


def read_loss(settings: Settings, width: int, rows: int = 1) -> LossConfig:
    """fairseq's loss; `rows` of a micro-batch, which the weight of its CLS term depends on."""
    d2v_weight = float(settings.get("d2v_loss", 1))
    scale = settings.get("loss_scale")
    if scale is not None and scale <= 0:
        scale = None
    factor = scale if scale is not None else width**-0.5
    return LossConfig(
        beta=float(settings.get("loss_beta") or 0),
        scale=scale if d2v_weight == 1 else factor * d2v_weight,
        # The reference sums the CLS term over the rows of a micro-batch.
        cls_weight=float(settings.get("cls_loss") or 0) * rows / d2v_weight,
    )


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """fairseq's "[(512, 10, 5)] + [(512, 3, 2)] * 4": lists, tuples, numbers, + and *; nothing else is evaluated."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.List(elts=elements):
                return [value(e) for e in elements]
            case ast.Tuple(elts=elements):
                return tuple(value(e) for e in elements)
            case ast.Constant(value=int() as number):
                return number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise CheckpointError(f"conv_feature_layers {text!r} is not a list of (channels, kernel, stride).")

    try:
        layers = value(ast.parse(text, mode="eval"))
    except (SyntaxError, TypeError) as error:
        raise CheckpointError(f"conv_feature_layers {text!r} cannot be read: {error}.") from error
    return [(channels, kernel, stride) for channels, kernel, stride in layers]


def _norm_flags(objective: ObjectiveConfig) -> dict[str, bool]:
    """The reference's flags; it applies them in one fixed order."""
    per_tap = [n for n in objective.target.layer_norm.split("+") if n != "none"]
    final = [n for n in objective.target.final_norm.split("+") if n != "none"]
    renamed = {"across_batch": "instance", "across_batch_and_channels": "group"}
    per_tap, final = [renamed.get(n, n) for n in per_tap], [renamed.get(n, n) for n in final]
    order_tap, order_final = ["batch", "instance", "group", "layer"], ["layer", "instance"]
    if per_tap != [n for n in order_tap if n in per_tap] or final != [n for n in order_final if n in final]:
        raise CheckpointError(
            f"the reference cannot apply norms as {objective.target.layer_norm} / {objective.target.final_norm}."
        )
    flags = {f"{n}_norm_target_layer": n in per_tap for n in order_tap}
    return flags | {f"{n}_norm_targets": n in final for n in order_final}


def averaged_layers(objective: ObjectiveConfig, depth: int) -> tuple[int, ...]:
    """The blocks whose mean the targets are. Raises CheckpointError for targets of another kind, and for several."""
    target = objective.target
    if objective.further_targets:
        raise CheckpointError(
            f"targets {', '.join(one.called for one in objective.targets)} are several, and the reference's "
            "configuration has one.",
            REMEDY,
        )
    if target.kind not in TARGETS or not TARGETS[target.kind].in_reference:
        raise CheckpointError(
            f"targets of kind {target.kind!r} have no name in the reference's configuration, which knows averages of "
            "blocks.",
            REMEDY,
        )
    return build(target, Place(depth=depth, width=1, input_width=None)).layers


def common_settings(objective: ObjectiveConfig, depth: int) -> dict[str, Any]:
    """fairseq's options of targets, loss and teacher. Raises CheckpointError where it has no such."""
    layers = averaged_layers(objective, depth)
    if layers[-1] != depth - 1 or layers[0] != depth - len(layers):
        raise CheckpointError(f"fairseq averages the last blocks; this model's targets are of blocks {list(layers)}.")
    return {
        **_norm_flags(objective),
        "average_top_k_layers": len(layers),
        "loss_beta": objective.loss.beta,
        "loss_scale": objective.loss.scale,
        "ema_decay": objective.ema.start,
        "ema_end_decay": objective.ema.end,
        "ema_anneal_end_step": objective.ema.anneal_steps,
    }


def require_post_norm(model: ModelConfig, version: str) -> None:
    """Raises CheckpointError for blocks that fairseq's models of this version do not have."""
    backbone = model.backbone
    if backbone.norm_first or not backbone.key_bias:
        raise CheckpointError(f"fairseq's {version} models are post-norm with a key bias; this one is not.", REMEDY)


def listed(layers: list[tuple[int, int, int]]) -> str:
    """Convolutions as fairseq writes them."""
    return f"[{', '.join(str(tuple(layer)) for layer in layers)}]"
