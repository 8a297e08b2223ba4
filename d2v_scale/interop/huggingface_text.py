"""Text in Hugging Face's classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.huggingface_row import Example, Head, HuggingFaceRow, blocks_of, has_plain_blocks
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Shapes
from d2v_scale.interop.tokenizer_files import write_tokenizer
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import TextStem
from d2v_scale.recipe import Recipe


class TextRow(HuggingFaceRow):
    """Native in both versions, unless blocks have another epsilon, or are others."""

    kind = "text"
    model_type = "data2vec-text"
    native_class = "Data2VecTextModel"
    native_prefix = "data2vec_text"
    joint_unless_native = True
    heads: ClassVar = dict.fromkeys(
        ("classify", "regress"),
        Head("AutoModelForSequenceClassification", "Data2VecTextForSequenceClassification", "text-classification"),
    )
    input_name = "input_ids"
    input_type = "int64"
    padded = True

    def is_native(self, model: ModelConfig) -> bool:
        return has_plain_blocks(model.backbone)

    def add_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        width, ours = model.backbone.width, f"stems.{name}.features"
        keys.add(f"{ours}.tokens.weight", "embeddings.word_embeddings.weight")
        keys.add(f"{ours}.positions.weight", "embeddings.position_embeddings.weight")
        keys.derived["embeddings.token_type_embeddings.weight"] = lambda: torch.zeros(1, width)
        keys.layer(f"{ours}.norm", "embeddings.LayerNorm")
        add_text_blocks(keys, model, name, "encoder.layer")

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        backbone, stem = model.backbone, _stem(model)
        return {
            "vocab_size": stem.vocab_size,
            "max_position_embeddings": stem.max_positions + stem.pad_id + 1,
            "type_vocab_size": 1,
            "pad_token_id": stem.pad_id,
            "bos_token_id": stem.bos_id,
            "eos_token_id": stem.eos_id,
            "hidden_dropout_prob": backbone.dropout,
            "attention_probs_dropout_prob": backbone.attention_dropout,
        }

    def read_settings(self, settings: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> ModelConfig:
        pad = settings.get("pad_token_id", 1)
        vocabulary = shapes.get("embeddings.word_embeddings.weight", (settings.get("vocab_size", 50265),))[0]
        stem = TextStem(
            vocab_size=vocabulary,
            max_positions=int(settings.get("max_position_embeddings", 514)) - pad - 1,
            bos_id=settings.get("bos_token_id", 0),
            pad_id=pad,
            eos_id=settings.get("eos_token_id", 2),
            mask_id=vocabulary - 1,
        )
        return ModelConfig(text=stem, backbone=backbone, predictor=Predictor(kind="mlp"))

    def fold(self, tensors: dict[str, Tensor]) -> list[str]:
        """The first token type is added to every token, as its position is. Published weights have zeros there, and no
        other type."""
        types, positions = "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"
        if types not in tensors or positions not in tensors:
            return []
        types_kd = tensors[types].float()
        tensors[positions] = tensors[positions].float() + types_kd[:1]
        tensors[types] = torch.zeros_like(types_kd[:1])
        lost = len(types_kd) - 1
        return [f"{lost} further token types are left out: texts are read as the first"] if lost else []

    def joint_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        sizes = {"vocab_size": stem.vocab_size, "max_positions": stem.max_positions}
        return {"kind": "tokens", **sizes, "pad_id": stem.pad_id}

    def joint_reading(self, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        ids = {"bos_id": stem.bos_id, "pad_id": stem.pad_id, "eos_id": stem.eos_id}
        return {"kind": "text", "vocab_size": stem.vocab_size, "max_positions": stem.max_positions, **ids}

    def joint_example(self, model: ModelConfig, name: str, folder: Path) -> str:
        if (folder / "tokenizer.json").is_file():
            return f'{name} = "Words of a text."'
        return f"{name} = np.array([5, 6, {_stem(model).eos_id}])  # of the tokenizer that it was trained with"

    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        keys.layer("head.dense", "classifier.dense")
        keys.layer("head.out", "classifier.out_proj")

    def head_settings(self) -> dict[str, Any]:
        return {"classifier_dropout": 0.0}

    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        if tokenizer is None:
            return ["no tokenizer was found: AutoTokenizer will not load. Give it with --tokenizer"]
        write_tokenizer(open_tokenizer(tokenizer), _stem(model), out)
        return [f"tokenizer: {tokenizer}"]

    def example(self, model: ModelConfig, folder: Path) -> Example:
        if (folder / "tokenizer.json").is_file():
            call = '**processor(text, return_tensors="pt")'
            return Example(("AutoTokenizer",), 'text = "Words of a text."', call)
        given = "ids = torch.tensor([[0, 5, 6, 2]])  # of the tokenizer that it was trained with"
        return Example((), given, f"{self.input_name}=ids")

    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        stem = _stem(model)
        length = min(64, stem.max_positions)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(4, max(5, stem.vocab_size - 1), (2, length), generator=generator)
        tokens[:, 0] = stem.bos_id
        tokens[1, 2 * length // 3 :] = stem.pad_id
        valid = tokens != stem.pad_id
        return self.unmasked(name, tokens, valid), {self.input_name: tokens, "attention_mask": valid.long()}

    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        return -1, -1


def _stem(model: ModelConfig) -> TextStem:
    return model.sole(TextStem)


def add_text_blocks(keys: KeyMap, model: ModelConfig, name: str, prefix: str) -> None:
    """`Data2VecTextLayer`s below `prefix`."""
    for i, block in enumerate(blocks_of(model, name)):
        theirs = f"{prefix}.{i}"
        for part in ("weight", "bias"):
            names = (
                f"{theirs}.attention.self.query.{part}",
                f"{theirs}.attention.self.key.{part}",
                f"{theirs}.attention.self.value.{part}",
            )
            keys.separate_qkv(f"{block}.attention.qkv.{part}", names, model.backbone.heads)
        keys.layer(f"{block}.attention.out", f"{theirs}.attention.output.dense")
        keys.layer(f"{block}.norm1", f"{theirs}.attention.output.LayerNorm")
        keys.layer(f"{block}.ffn.fc1", f"{theirs}.intermediate.dense")
        keys.layer(f"{block}.ffn.fc2", f"{theirs}.output.dense")
        keys.layer(f"{block}.norm2", f"{theirs}.output.LayerNorm")
