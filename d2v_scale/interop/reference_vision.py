"""Images in the reference's models: data2vec_vision (1.0), and the IMAGE part of fairseq's 2.0."""

import ast
import math
from typing import Any

from torch import Tensor

from d2v_scale.data2vec.config import EmaConfig, LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import REMEDY, Reference, Settings, Shapes, averaged_layers, require
from d2v_scale.interop.reference_row import ReferenceRow, Tensors, timm_block
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.position_bias import relative_index, sincos_positions
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.model.teacher_parts import TeacherParts

_OTHER_PROGRAM = "1.0 models of images are data2vec_vision's; fairseq has no configuration of them."


class VisionReference(ReferenceRow):
    """Images."""

    kind = "vision"
    first_mark = "patch_embed."
    first_is_fairseq = False
    first_file = "checkpoint.pth"
    first_prefix = ""
    word = "image"
    block_masks = "block2d"
    decoder_kind = "conv2d"
    averages_features = True

    def first_keys(self, model: ModelConfig, name: str) -> KeyMap:
        keys, ours, stem = KeyMap(), f"stems.{name}", _stem(model)
        keys.layer(f"{ours}.features.patch", "patch_embed.proj")
        keys.add(f"{ours}.context.cls", "cls_token")
        keys.add(f"{ours}.context.mask_token", "mask_token")
        if stem.positions == "relative":
            grid = stem.grid
            keys.add(f"{ours}.bias.table", "rel_pos_bias.relative_position_bias_table")
            keys.derived["rel_pos_bias.relative_position_index"] = lambda: relative_index(grid)
        for i in range(model.backbone.depth):
            timm_block(keys, model, f"blocks.{i}", f"blocks.{i}")
        keys.layer("final_norm", "norm")
        keys.layer(f"predictors.{model.predictor_name}.proj", "lm_head")
        return keys

    def first_content(
        self, student: Tensors, teacher: Tensors, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts
    ) -> dict[str, Any]:
        settings, loop = data2vec_vision_settings(model, objective)
        content: dict[str, Any] = {"model": dict(student), "model_settings": settings, "args": loop}
        return content | {"model_ema": dict(teacher)} if teacher else content

    def first_settings(self, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts) -> dict[str, Any]:
        raise CheckpointError(_OTHER_PROGRAM)

    def read_first(self, settings: Settings, shapes: Shapes, tokens: Settings | None) -> Reference:
        raise CheckpointError(_OTHER_PROGRAM)

    def add_stem_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        theirs, ours, stem = self.second_prefix, f"stems.{name}", _stem(model)
        keys.layer(f"{ours}.features.patch", f"{theirs}.local_encoder.proj")
        width, grid = model.backbone.width, stem.grid
        keys.derived[f"{theirs}.fixed_positional_encoder.positions"] = lambda: sincos_positions(width, grid)[None]
        keys.layer(f"{ours}.context.norm", f"{theirs}.context_encoder.norm")

    def stem_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        if not isinstance(stem.image_size, int):
            height, width = stem.size
            raise CheckpointError(
                f"fairseq's 2.0 models read square images; this one reads {height} x {width} pixels "
                "(model.vision.image_size).",
                REMEDY,
            )
        return {
            "input_size": stem.image_size,
            "patch_size": stem.patch_size,
            "in_chans": stem.channels,
            "embed_dim": model.backbone.width,
            "fixed_positions": True,
        }

    def read_stem(self, model: ModelConfig, stem: Settings, shapes: Shapes, tokens: Settings | None) -> None:
        require(stem, "fixed_positions", True, default=True)
        require(stem, "use_alibi_encoder", False, None)
        require(stem, "transformer_decoder", False, None)
        require(stem, "in_chans", *range(1, 17), default=3)
        model.vision = VisionStem(
            image_size=stem.get("input_size", 224),
            patch_size=stem.get("patch_size", 16),
            channels=stem.get("in_chans", 3),
            positions="sincos",
        )

    def recorded_inputs(self, io: Tensors) -> tuple[Tensor | None, Tensor | None]:
        return io.get("in.source", io.get("in.img")), None


def _stem(model: ModelConfig) -> VisionStem:
    return model.sole(VisionStem)


def data2vec_vision_settings(model: ModelConfig, objective: ObjectiveConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model arguments and training-loop arguments of data2vec_vision."""
    backbone, target = model.backbone, objective.target
    layers = averaged_layers(objective, backbone.depth)
    if (
        target.tap != "block"
        or target.layer_norm not in ("layer", "none")
        or target.final_norm not in ("layer", "none")
    ):
        raise CheckpointError("data2vec_vision has no such targets; they are block outputs with layer norms there.")
    settings = {
        "img_size": _stem(model).image_size,
        "patch_size": _stem(model).patch_size,
        "in_chans": _stem(model).channels,
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.heads,
        "mlp_ratio": backbone.ffn / backbone.width,
        "qkv_bias": True,
        "drop_rate": backbone.dropout,
        "attn_drop_rate": backbone.attention_dropout,
        "drop_path_rate": backbone.drop_path,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "init_values": backbone.layer_scale,
    }
    loop = {
        "target_layers": list(layers),
        "layer_results": "end",
        "target_layer_norm_last": target.layer_norm == "layer",
        "post_target_layer_norm": target.final_norm == "layer",
        "l2_loss": objective.loss.beta == 0,
        "l1_beta": objective.loss.beta,
        "loss_scale": -1 if objective.loss.scale is None else objective.loss.scale,
        "ema_decay_init": objective.ema.start,
        "ema_decay": objective.ema.end,
        "ema_start_at": objective.ema.anneal_steps,
        "norm_eps": backbone.norm_eps,
        "num_mask_patches": objective.masking.target_count,
        "min_mask_patches_per_block": objective.masking.min_block,
    }
    return settings, loop


def input_size(given: Any, patch_size: int, table: tuple[int, ...] | None) -> int | tuple[int, int]:
    """The size of the images that a model with a table of relative positions of this shape reads: `given`, one number
    or height and width, where it fits the table, else a square that does. Raises `CheckpointError` where none does.
    """
    try:
        height, width = (int(number) for number in (given if isinstance(given, (list, tuple)) else (given, given)))
    except (TypeError, ValueError):
        raise CheckpointError(f"its configuration says that images are of size {given!r}.") from None
    if table is None or table[0] == (2 * (height // patch_size) - 1) * (2 * (width // patch_size) - 1) + 3:
        return height // patch_size * patch_size, width // patch_size * patch_size
    distances = math.isqrt(max(0, table[0] - 3))
    if distances % 2 == 0 or distances**2 != table[0] - 3:
        raise CheckpointError(
            f"it has {table[0]} relative positions, which are those of no square image and not of {height} x {width} "
            f"pixels in patches of {patch_size}."
        )
    return ((distances + 1) // 2 * patch_size,) * 2


def from_data2vec_vision(settings: Settings, loop: Settings, shapes: Shapes) -> Reference:
    """From data2vec_vision's model arguments and training-loop arguments (either may lack keys; sizes are in shapes).

    Raises `CheckpointError` for options that are not supported.
    """
    if not any(key.startswith(VisionReference.first_mark) for key in shapes):
        raise CheckpointError("the keys are not those of a data2vec_vision model, but its configuration is.")
    require(settings, "use_abs_pos_emb", False, None)
    require(settings, "use_rel_pos_bias", False, None)
    patch = shapes.get(
        "patch_embed.proj.weight", (settings.get("embed_dim", 768), 3, settings.get("patch_size", 16), 16)
    )
    table = shapes.get("rel_pos_bias.relative_position_bias_table")
    width, channels, patch_size = patch[0], patch[1], patch[2]
    depth = 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")), default=-1)
    depth = settings.get("depth", depth)
    heads = settings.get("num_heads") or (table[1] if table else width // 64)
    scaled = "blocks.0.gamma_1" in shapes or bool(settings.get("init_values"))
    init_values = settings.get("init_values", loop.get("layer_scale_init_value", 1e-4)) or 1e-4
    model = ModelConfig(
        vision=VisionStem(
            image_size=input_size(settings.get("img_size", settings.get("input_size", 224)), patch_size, table),
            patch_size=patch_size,
            channels=channels,
            positions="relative",
        ),
        backbone=Backbone(
            width=width,
            heads=heads,
            ffn=shapes.get("blocks.0.mlp.fc1.weight", (int(width * settings.get("mlp_ratio", 4)),))[0],
            depth=depth,
            norm_first=True,
            norm_eps=loop.get("norm_eps", 1e-6),
            key_bias=False,
            layer_scale=init_values if scaled else 0.0,
            final_norm=True,
            dropout=settings.get("drop_rate", 0.0),
            attention_dropout=settings.get("attn_drop_rate", loop.get("attn_drop_rate", 0.0)),
            drop_path=settings.get("drop_path_rate", loop.get("drop_path", 0.0)),
        ),
        predictor=Predictor(kind="linear"),
        init="beit",
    )
    layers = loop.get("target_layers", list(range(depth - 6, depth)))
    layers = list(ast.literal_eval(layers)) if isinstance(layers, str) else list(layers)
    if not layers or not all(type(layer) is int and -depth <= layer < depth for layer in layers):
        raise CheckpointError(f"target layers {layers} are not blocks of {depth}.")
    # Negative numbers count from the end there.
    layers = sorted(layer % depth for layer in layers)
    if len(set(layers)) < len(layers):
        raise CheckpointError(f"target layers {layers} name a block twice, which is not supported.")
    require(loop, "layer_results", "end", default="end")
    for flag in ("target_batch_norm", "target_instance_norm", "post_target_instance_norm"):
        require(loop, flag, False, None)
    scale = loop.get("loss_scale", -1)
    objective = ObjectiveConfig(
        masking=MaskingConfig(
            kind="blockwise",
            target_count=loop.get("num_mask_patches", 120),
            min_block=loop.get("min_mask_patches_per_block", 16),
        ),
        target=TargetConfig(
            tap="block",
            top_k_layers=len(layers),
            layers=None if layers[-1] == depth - 1 and layers[0] == depth - len(layers) else layers,
            layer_norm="layer" if loop.get("target_layer_norm_last", True) else "none",
            final_norm="layer" if loop.get("post_target_layer_norm", False) else "none",
        ),
        loss=LossConfig(
            beta=0.0 if loop.get("l2_loss") else float(loop.get("l1_beta", 2.0)),
            scale=None if scale is None or scale <= 0 else scale,
            reduction="mean_channels",
        ),
        ema=EmaConfig(
            start=loop.get("ema_decay_init", 0.9998),
            end=loop.get("ema_decay", 0.9998),
            anneal_steps=int(loop.get("ema_start_at", 0) or 0),
            index="zero_based",
        ),
    )
    return Reference(VisionReference.kind, model, objective, published_parts(model))
