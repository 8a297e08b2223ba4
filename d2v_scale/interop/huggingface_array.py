"""Arrays in Hugging Face's classes: transformers has none, so that they are ours."""

import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.huggingface_row import Example, Head, RowOfOurs
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.weight_files import write_json
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.recipe import Recipe

PROCESSOR_FILE = Path(__file__).with_name("feature_extraction_data2vec2_array.py")
_PROCESSOR = f"{PROCESSOR_FILE.stem}.Data2Vec2ArrayProcessor"


class ArrayRow(RowOfOurs):
    """Any kind of array."""

    kind = "array"
    called = "arrays"
    remote_configuration = "Data2Vec2ArrayConfig"
    remote_module = "modeling_data2vec2_array"
    remote_classes: ClassVar = {
        "AutoModel": "Data2Vec2ArrayModel",
        "AutoModelForSequenceClassification": "Data2Vec2ForArrayClassification",
    }
    any_extra_tokens = True
    heads: ClassVar = dict.fromkeys(
        ("classify", "regress"), Head("AutoModelForSequenceClassification", "Data2Vec2ForArrayClassification", "other")
    )
    input_name = "values"

    def remote_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem, backbone = _stem(model), model.backbone
        return {
            "num_channels": stem.channels,
            **_axes(stem),
            "positions": stem.positions,
            "extra_tokens": stem.extra_token_count,
            "mask_token": not model.visible_only,
            "context_norm": model.visible_only and not backbone.norm_first,
            "norm_first": backbone.norm_first,
            "key_bias": backbone.key_bias,
            "layer_scale": backbone.layer_scale > 0,
            "final_norm": backbone.final_norm,
        }

    def joint_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        sizes = {"num_channels": stem.channels, "patch": list(stem.patch), "extents": list(stem.extents)}
        normed = model.visible_only and not model.backbone.norm_first
        return {"kind": "patches", "positions": stem.positions, "context_norm": normed, **sizes}

    def joint_reading(self, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
        rate = {"sample_rate": _stem(model).log_mel.sample_rate} if _stem(model).reads_recordings else {}
        return {"kind": "array", "reading": _reading(_stem(model)), **rate}

    def joint_example(self, model: ModelConfig, name: str, folder: Path) -> str:
        return self.example(model, folder).given.replace("array =", f"{name} =", 1)

    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        del task, native
        keys.layer("head.norm", "head_norm")
        keys.layer("head.out", "classifier")

    def head_settings(self) -> dict[str, Any]:
        return {"final_norm": False}

    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        del recipe, tokenizer
        settings: dict[str, Any] = {
            "feature_extractor_type": "Data2Vec2ArrayProcessor",
            "auto_map": {"AutoFeatureExtractor": _PROCESSOR, "AutoProcessor": _PROCESSOR},
            **_reading(_stem(model)),
        }
        shutil.copyfile(PROCESSOR_FILE, out / PROCESSOR_FILE.name)
        write_json(out / "preprocessor_config.json", settings)
        return []

    def example(self, model: ModelConfig, folder: Path) -> Example:
        del folder
        stem = _stem(model)
        shape = ", ".join(str(size) for size in (stem.channels, *stem.extents))
        given = f"array = np.ones(({shape}), dtype=np.float32)  # {', '.join(('channels', *stem.axes))}"
        if stem.reads_recordings:
            rate = stem.log_mel.sample_rate
            given = f"array = np.ones({rate}, dtype=np.float32)  # a waveform in -1 ... 1, {rate} samples a second"
        call = '**processor([array], return_tensors="pt")'
        return Example(("AutoFeatureExtractor",), given, call, remote_processor=True)

    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        """The second one is half as long along the first axis of several patches."""
        stem = _stem(model)
        _, *shape = self.input_shape(model)
        values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        valid = torch.ones(2, *stem.grid, dtype=torch.bool)
        halved = next(axis for axis, patches in enumerate(stem.grid) if patches > 1)
        kept = stem.grid[halved] // 2
        valid[1].narrow(halved, kept, stem.grid[halved] - kept).zero_()
        start = kept * stem.patch[halved]
        values[1].narrow(1 + halved, start, stem.extents[halved] - start).zero_()
        valid_bt = valid.view(2, math.prod(stem.grid))
        return self.unmasked(name, values, valid_bt), {self.input_name: values, "attention_mask": valid_bt.long()}

    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        stem = _stem(model)
        return -1, stem.channels, *stem.extents


def _reading(stem: ArrayStem) -> dict[str, Any]:
    """What `Data2Vec2ArrayProcessor` is told."""
    settings = {
        "num_channels": stem.channels,
        **_axes(stem),
        "longer": [axis.longer for axis in stem.axes.values()],
        "transform": stem.transform,
        "log_floor": stem.log_floor,
        "normalise": stem.normalise,
        "mean": stem.mean,
        "std": stem.std,
        "missing": stem.missing,
    }
    return settings | ({"log_mel": _log_mel(stem.log_mel)} if stem.reads_recordings else {})


def _log_mel(config: LogMel) -> dict[str, Any]:
    return {
        "sample_rate": config.sample_rate,
        "hop": config.hop,
        "length": config.length,
        "window": config.window,
        "low_hz": config.low_hz,
        "high_hz": config.highest_hz,
    }


def _axes(stem: ArrayStem) -> dict[str, Any]:
    """Lists, as transformers sorts what is in mappings by their names."""
    return {"axes": list(stem.axes), "patch": list(stem.patch), "extents": list(stem.extents)}


def _stem(model: ModelConfig) -> ArrayStem:
    return model.sole(ArrayStem)
