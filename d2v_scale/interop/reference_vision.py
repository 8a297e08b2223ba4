"""Our configuration of a model that data2vec_vision (1.0) trained: from its configuration and its tensors' shapes."""

import ast
import math
from typing import Any

from d2v_scale.data2vec.config import EmaConfig, LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.reference_config import Reference, Settings, Shapes, modality_of, require
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig, Predictor, VisionStem


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
    if modality_of(shapes) != ("vision", False):
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
    return Reference("vision", model, objective, published_parts(model))
