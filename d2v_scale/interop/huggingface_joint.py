"""Samples of several parts in Hugging Face's classes: transformers has none, so that they are ours."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.config import DataConfig
from d2v_scale.data.paired import joined
from d2v_scale.errors import CheckpointError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.huggingface_row import Example, Head, HuggingFaceRow, RowOfOurs
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.weight_files import write_json
from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import Recipe

PROCESSOR_FILE = Path(__file__).with_name("feature_extraction_data2vec2_joint.py")
_SUFFIXES = ("_mask", "_present")
"""Behind a part's name, of what else is given of it."""
_PROCESSOR = f"{PROCESSOR_FILE.stem}.Data2Vec2JointProcessor"


class JointRow(RowOfOurs):
    """`model` has the stems of the sequence alone, `name` is the sequence's."""

    called = "samples of several parts"
    remote_configuration = "Data2Vec2JointConfig"
    remote_module = "modeling_data2vec2_joint"
    remote_imports = ("stems_data2vec2_joint", "modeling_data2vec2_array")
    remote_classes: ClassVar = {"AutoModel": "Data2Vec2JointModel"}
    names_are_ours = True
    any_extra_tokens = True
    heads: ClassVar[dict[str, Head]] = {}
    input_name = "inputs"

    def __init__(self, row_of: Callable[[ModelConfig, str], HuggingFaceRow]) -> None:
        """`row_of`: what is said of the stem of a part."""
        self._row_of = row_of

    @property
    def remote_modality(self) -> str:
        return "joint"

    def remote_settings(self, model: ModelConfig) -> dict[str, Any]:
        backbone, names = model.backbone, model.modalities
        if like := [name for name in names if name.rpartition("_")[0] in names and name.endswith(_SUFFIXES)]:
            raise CheckpointError(
                f"The stem {like[0]} is called as an input of the stem {like[0].rpartition('_')[0]} would be.",
                "Use --to safetensors, which writes any model under our own names.",
            )
        return {
            "parts": [self._part(model, name) for name in model.modalities],
            "depth": backbone.depth,
            "norm_first": backbone.norm_first,
            "key_bias": backbone.key_bias,
            "layer_scale": backbone.layer_scale > 0,
            "final_norm": backbone.final_norm,
        }

    def _part(self, model: ModelConfig, name: str) -> dict[str, Any]:
        own = model.of(name)
        return {
            "name": name,
            "extra_tokens": own.stems[name].extra_token_count,
            "prenet_depth": own.backbone.prenet_depth,
            "blanks_padding": not model.visible_only,
            **self._row_of(model, name).joint_settings(own),
        }

    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        raise AssertionError("no task reads several parts")

    def head_settings(self) -> dict[str, Any]:
        raise AssertionError("no task reads several parts")

    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        lines, parts = [], []
        for name in model.modalities:
            row, own = self._row_of(model, name), model.of(name)
            if modalities.of(model, name).uses_tokenizer:
                lines += row.write_processor(recipe, own, out, tokenizer)
            parts.append({"name": name, **row.joint_reading(recipe, own)})
        settings = {
            "feature_extractor_type": "Data2Vec2JointProcessor",
            "auto_map": {"AutoFeatureExtractor": _PROCESSOR, "AutoProcessor": _PROCESSOR},
            "parts": parts,
        }
        write_json(out / "preprocessor_config.json", settings)
        for file in (PROCESSOR_FILE, PROCESSOR_FILE.with_name("feature_extraction_data2vec2_array.py")):
            shutil.copyfile(file, out / file.name)
        return lines

    def example(self, model: ModelConfig, folder: Path) -> Example:
        given, names = [], []
        for name in model.modalities:
            given.append(self._row_of(model, name).joint_example(model.of(name), name, folder))
            names.append(f"{name}=[{name}]")
        call = f'**processor({", ".join(names)}, return_tensors="pt")'
        return Example(("AutoProcessor",), "\n".join(given), call, remote_processor=True)

    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        """The second one has no first part, of the others shorter ones; or both the one that there is."""
        if len(model.stems) == 1:
            row = self._row_of(model, name)
            batch, its = row.sample(model, name)
            return batch, {name: its[row.input_name]}
        parts: list[Batch] = []
        arguments: dict[str, Tensor] = {}
        for number, stem in enumerate(model.modalities):
            own, row = modalities.of(model, stem), self._row_of(model, stem)
            one, its = row.sample(model.of(stem), stem)
            present_b = torch.tensor([True, number > 0])
            length = one.inputs.shape[1] - (own.content == "text")
            [positions] = own.positions_of(np.array([length]), DataConfig())
            part = replace(
                one,
                masked_rt=torch.zeros(2, int(positions), dtype=torch.bool),
                grid=own.fixed_grid or (),
                extra_tokens=own.extra_tokens,
                present_b=present_b,
                layout=None,  # type: ignore[arg-type]
            )
            parts.append(part)
            arguments |= {stem: its[row.input_name], f"{stem}_present": present_b.long()}
            if "attention_mask" in its:
                arguments[f"{stem}_mask"] = its["attention_mask"]
        return joined(tuple(parts), name), arguments

    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        raise CheckpointError(
            "MLflow's form of an encoder takes one array, and this one takes several parts.",
            "Leave --log_model out, or export one stem with --modality.",
        )
