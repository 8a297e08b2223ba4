"""Images in Hugging Face's classes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.errors import CheckpointError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.huggingface_row import Example, Head, HuggingFaceRow, blocks_of
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Shapes
from d2v_scale.interop.reference_vision import input_size
from d2v_scale.interop.weight_files import write_json
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.recipe import Recipe

IMAGE_PROCESSOR_FILE = Path(__file__).with_name("image_processing_data2vec2.py")


class VisionRow(HuggingFaceRow):
    """Native in 1.0; 2.0 is post-norm, which no class of transformers computes."""

    kind = "vision"
    model_type = "data2vec-vision"
    native_class = "Data2VecVisionModel"
    native_prefix = "data2vec_vision"
    remote_configuration = "Data2Vec2VisionConfig"
    remote_classes: ClassVar = {
        "AutoModel": "Data2Vec2VisionModel",
        "AutoModelForImageClassification": "Data2Vec2ForImageClassification",
    }
    encoder_task = "image-feature-extraction"
    heads: ClassVar = dict.fromkeys(
        ("classify", "regress"),
        Head("AutoModelForImageClassification", "Data2VecVisionForImageClassification", "image-classification"),
    )
    input_name = "pixel_values"

    def is_native(self, model: ModelConfig) -> bool:
        backbone = model.backbone
        relative = _stem(model).positions == "relative" and not model.visible_only and not _is_wide(model)
        scaled = backbone.norm_first and backbone.layer_scale > 0
        return relative and scaled and not backbone.key_bias and backbone.final_norm

    def beyond_remote(self, model: ModelConfig) -> list[str]:
        unlike = super().beyond_remote(model)
        if _stem(model).positions == "relative":
            unlike.append("model.vision.positions")
            if _is_wide(model):
                height, width = _stem(model).size
                unlike.append(f"model.vision.image_size ({height} x {width} pixels: that class computes squares alone)")
        return unlike if model.visible_only else [*unlike, "model.visible_only"]

    def add_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        ours = f"stems.{name}"
        keys.add(f"{ours}.context.cls", "embeddings.cls_token")
        keys.add(f"{ours}.context.mask_token", "embeddings.mask_token", optional=True)
        keys.layer(f"{ours}.features.patch", "embeddings.patch_embeddings.projection")
        keys.add(f"{ours}.bias.table", "encoder.relative_position_bias.relative_position_bias_table")
        for i, block in enumerate(blocks_of(model, name)):
            theirs = f"encoder.layer.{i}"
            attention = f"{theirs}.attention.attention"
            weights = (f"{attention}.query.weight", f"{attention}.key.weight", f"{attention}.value.weight")
            keys.separate_qkv(f"{block}.attention.qkv.weight", weights, model.backbone.heads)
            keys.add(f"{block}.attention.q_bias", f"{attention}.query.bias")
            keys.add(f"{block}.attention.v_bias", f"{attention}.value.bias")
            keys.layer(f"{block}.attention.out", f"{theirs}.attention.output.dense")
            keys.layer(f"{block}.norm1", f"{theirs}.layernorm_before")
            keys.layer(f"{block}.norm2", f"{theirs}.layernorm_after")
            keys.layer(f"{block}.ffn.fc1", f"{theirs}.intermediate.dense")
            keys.layer(f"{block}.ffn.fc2", f"{theirs}.output.dense")
            keys.add(f"{block}.scale1", f"{theirs}.lambda_1")
            keys.add(f"{block}.scale2", f"{theirs}.lambda_2")
        keys.layer("final_norm", "layernorm")

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        backbone, stem = model.backbone, _stem(model)
        return {
            "image_size": stem.image_size,
            "patch_size": stem.patch_size,
            "num_channels": stem.channels,
            "use_mask_token": True,
            "use_absolute_position_embeddings": False,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": True,
            "use_mean_pooling": False,
            "layer_scale_init_value": backbone.layer_scale,
            "drop_path_rate": backbone.drop_path,
            "hidden_dropout_prob": backbone.dropout,
            "attention_probs_dropout_prob": backbone.attention_dropout,
        }

    def remote_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        return {"image_size": stem.image_size, "patch_size": stem.patch_size, "num_channels": stem.channels}

    def joint_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        sizes = {"num_channels": stem.channels, "patch": [stem.patch_size] * 2, "extents": list(stem.size)}
        normed = model.visible_only and not model.backbone.norm_first
        return {"kind": "patches", "positions": stem.positions, "context_norm": normed, **sizes}

    def joint_reading(self, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
        stem, data = _stem(model), recipe.data.vision
        pixels = {"mean": data.mean[: stem.channels], "std": data.std[: stem.channels]}
        sizes = {"size": list(stem.size), "num_channels": stem.channels}
        return {"kind": "image", **sizes, "crop": data.evaluation_crop, **pixels}

    def joint_example(self, model: ModelConfig, name: str, folder: Path) -> str:
        height, width = _stem(model).size
        return f'{name} = Image.new("RGB", ({width}, {height}))'

    def read_settings(self, settings: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> ModelConfig:
        for key, wanted in (("use_shared_relative_position_bias", True), ("use_absolute_position_embeddings", False)):
            if bool(settings.get(key)) is not wanted:
                raise CheckpointError(
                    f"config.json has {key}={settings.get(key)}, which no pretrained data2vec model has."
                )
        backbone.norm_first, backbone.key_bias, backbone.final_norm = True, False, True
        # Published files say 1e-12; every published model was trained with 1e-6 (spec 8.4).
        backbone.norm_eps = max(backbone.norm_eps, 1e-6)
        backbone.layer_scale = float(settings.get("layer_scale_init_value", 1e-4))
        backbone.drop_path = float(settings.get("drop_path_rate", 0.0))
        patch = int(settings.get("patch_size", 16))
        table = shapes.get("encoder.relative_position_bias.relative_position_bias_table")
        size = input_size(settings.get("image_size", 224), patch, table)
        channels = int(settings.get("num_channels", 3))
        stem = VisionStem(image_size=size, patch_size=patch, channels=channels, positions="relative")
        model = ModelConfig(vision=stem, backbone=backbone, predictor=Predictor(kind="linear"), init="beit")
        if _is_wide(model):
            height, width = stem.size
            raise CheckpointError(
                f"it reads images of {height} x {width} pixels, for which transformers' class exchanges height and "
                "width of the table of relative positions: what it computes, no other program does.",
                "Import the checkpoint that it was made from.",
            )
        return model

    def may_lack(self, settings: Mapping[str, Any]) -> list[str]:
        # Classes that average the patches have no norm behind the encoder.
        return ["final_norm."] if settings.get("use_mean_pooling") else []

    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        keys.layer("head.norm", "pooler.layernorm" if native else "head_norm")
        keys.layer("head.out", "classifier")

    def head_settings(self) -> dict[str, Any]:
        return {"use_mean_pooling": True}

    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        stem, data = _stem(model), recipe.data.vision
        (height, width), channels = stem.size, stem.channels
        before = {"height": round(height / data.evaluation_crop), "width": round(width / data.evaluation_crop)}
        settings: dict[str, Any] = {
            # Without trust_remote_code transformers' own: the same, but for EXIF's turns and for 16 bits a channel.
            "image_processor_type": "BeitImageProcessorPil",
            "auto_map": {"AutoImageProcessor": f"{IMAGE_PROCESSOR_FILE.stem}.UprightImageProcessor"},
            "do_convert_rgb": channels == 3,
            "do_resize": True,
            # The centre crop that evaluation takes.
            "size": before if _is_wide(model) else {"shortest_edge": before["height"]},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": data.mean[:channels],
            "image_std": data.std[:channels],
            "do_reduce_labels": False,
        }
        shutil.copyfile(IMAGE_PROCESSOR_FILE, out / IMAGE_PROCESSOR_FILE.name)
        write_json(out / "preprocessor_config.json", settings)
        if not _is_wide(model):
            return []
        return [
            f"images are cropped to {height} x {width} by {IMAGE_PROCESSOR_FILE.name} (trust_remote_code=True); "
            "without it transformers stretches them"
        ]

    def example(self, model: ModelConfig, folder: Path) -> Example:
        (height, width), channels = _stem(model).size, _stem(model).channels
        if channels == 3:
            call = '**processor(image, return_tensors="pt")'
            image = f'image = Image.new("RGB", ({width}, {height}))'
            # transformers' own would stretch images to a shape that is no square.
            return Example(("AutoImageProcessor",), image, call, remote_processor=_is_wide(model))
        given = f"pixels = torch.randn(1, {channels}, {height}, {width})"
        return Example((), given, f"{self.input_name}=pixels")

    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        _, *shape = self.input_shape(model)
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return self.unmasked(name, images, None), {self.input_name: images}

    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        stem = _stem(model)
        return -1, stem.channels, *stem.size


def _is_wide(model: ModelConfig) -> bool:
    """Whether images are no squares. With relative positions no class of transformers computes them:
    Data2VecVisionRelativePositionBias takes the table for one of width x height and stretches it to height x width
    (5.24)."""
    height, width = _stem(model).size
    return height != width


def _stem(model: ModelConfig) -> VisionStem:
    return model.sole(VisionStem)
