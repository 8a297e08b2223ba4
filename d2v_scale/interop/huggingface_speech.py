"""Speech in Hugging Face's classes."""

import bisect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data.labels import Vocabulary
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.heads import PROJECTION
from d2v_scale.interop.huggingface_row import STEM_EPS, Example, Head, HuggingFaceRow, blocks_of, has_plain_blocks
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Shapes
from d2v_scale.interop.weight_files import write_json
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import SpeechStem
from d2v_scale.recipe import Recipe


class SpeechRow(HuggingFaceRow):
    """Native in 1.0; 2.0 has ALiBi, which no class of transformers computes."""

    kind = "speech"
    model_type = "data2vec-audio"
    native_class = "Data2VecAudioModel"
    native_prefix = "data2vec_audio"
    remote_configuration = "Data2Vec2AudioConfig"
    remote_classes: ClassVar = {
        "AutoModel": "Data2Vec2AudioModel",
        "AutoModelForCTC": "Data2Vec2ForCTC",
        "AutoModelForAudioClassification": "Data2Vec2ForSequenceClassification",
        "AutoModelForAudioFrameClassification": "Data2Vec2ForAudioFrameClassification",
    }
    heads: ClassVar = {
        **dict.fromkeys(
            ("classify", "regress"),
            Head("AutoModelForAudioClassification", "Data2VecAudioForSequenceClassification", "audio-classification"),
        ),
        "ctc": Head("AutoModelForCTC", "Data2VecAudioForCTC", "automatic-speech-recognition"),
    }
    input_name = "input_values"
    dropout_names = ("hidden_dropout", "attention_dropout")

    def is_native(self, model: ModelConfig) -> bool:
        return not model.visible_only and not _stem(model).alibi and has_plain_blocks(model.backbone)

    def beyond_remote(self, model: ModelConfig) -> list[str]:
        # What the modelling file computes of 2.0, with another epsilon of 1.0 nobody does.
        other = not model.visible_only and model.backbone.norm_eps != STEM_EPS
        return super().beyond_remote(model) + ["model.backbone.norm_eps"] * other

    def add_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        ours, stem = f"stems.{name}", _stem(model)
        for i in range(len(stem.conv_layers)):
            theirs = f"feature_extractor.conv_layers.{i}"
            keys.add(f"{ours}.features.convs.{i}.weight", f"{theirs}.conv.weight")
            keys.layer(f"{ours}.features.conv_norms.{i}", f"{theirs}.layer_norm")
        keys.layer(f"{ours}.features.norm", "feature_projection.layer_norm")
        keys.layer(f"{ours}.features.proj", "feature_projection.projection")
        keys.add(f"{ours}.context.mask_embedding", "masked_spec_embed", optional=True)
        for i in range(stem.pos_conv_depth):
            keys.layer(f"{ours}.context.pos_convs.{i}", f"encoder.pos_conv_embed.layers.{i}.conv")
        keys.layer(f"{ours}.context.norm", "encoder.layer_norm")
        for i, block in enumerate(blocks_of(model, name)):
            theirs = f"encoder.layers.{i}"
            for part in ("weight", "bias"):
                names = (
                    f"{theirs}.attention.q_proj.{part}",
                    f"{theirs}.attention.k_proj.{part}",
                    f"{theirs}.attention.v_proj.{part}",
                )
                keys.separate_qkv(f"{block}.attention.qkv.{part}", names, model.backbone.heads)
            keys.layer(f"{block}.attention.out", f"{theirs}.attention.out_proj")
            keys.layer(f"{block}.norm1", f"{theirs}.layer_norm")
            keys.layer(f"{block}.ffn.fc1", f"{theirs}.feed_forward.intermediate_dense")
            keys.layer(f"{block}.ffn.fc2", f"{theirs}.feed_forward.output_dense")
            keys.layer(f"{block}.norm2", f"{theirs}.final_layer_norm")

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        backbone, stem = model.backbone, _stem(model)
        channels, kernels, strides = zip(*stem.conv_layers, strict=True)
        return {
            "conv_dim": list(channels),
            "conv_kernel": list(kernels),
            "conv_stride": list(strides),
            "conv_bias": False,
            "feat_extract_activation": "gelu",
            "num_feat_extract_layers": len(channels),
            # The number of positional convolutions, not a kernel size.
            "num_conv_pos_embeddings": stem.pos_conv_depth,
            "conv_pos_kernel_size": stem.pos_conv_kernel,
            "num_conv_pos_embedding_groups": stem.pos_conv_groups,
            "hidden_dropout": backbone.dropout,
            "attention_dropout": backbone.attention_dropout,
            "activation_dropout": backbone.activation_dropout,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "layerdrop": backbone.layer_drop,
            # Above 0, or the class has no mask embedding.
            "mask_time_prob": 0.05,
            "mask_time_length": 10,
            "mask_feature_prob": 0.0,
            "vocab_size": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def remote_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        return {
            "conv_layers": [list(layer) for layer in stem.conv_layers],
            "pos_conv_depth": stem.pos_conv_depth,
            "pos_conv_kernel": stem.pos_conv_kernel,
            "pos_conv_groups": stem.pos_conv_groups,
            "alibi": stem.alibi,
        }

    def joint_settings(self, model: ModelConfig) -> dict[str, Any]:
        normed = not (model.visible_only and model.backbone.norm_first)
        return {"kind": "waves", "context_norm": normed, **self.remote_settings(model)}

    def joint_reading(self, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
        frame = bisect.bisect_left(range(60 * SAMPLE_RATE), 1, key=_stem(model).frames_of)
        reading = {"sample_rate": SAMPLE_RATE, "shortest": frame, "normalise": recipe.data.speech.normalize}
        return {"kind": "recording", **reading}

    def joint_example(self, model: ModelConfig, name: str, folder: Path) -> str:
        return f"{name} = np.random.randn(16000).astype(np.float32)  # one second, 16 kHz"

    def read_settings(self, settings: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> ModelConfig:
        layers = zip(settings["conv_dim"], settings["conv_kernel"], settings["conv_stride"], strict=True)
        stem = SpeechStem(
            conv_layers=[tuple(layer) for layer in layers],  # type: ignore[misc]
            pos_conv_depth=settings.get("num_conv_pos_embeddings", 5),
            pos_conv_kernel=settings.get("conv_pos_kernel_size", 19),
            pos_conv_groups=settings.get("num_conv_pos_embedding_groups", 16),
        )
        return ModelConfig(speech=stem, backbone=backbone, predictor=Predictor(kind="linear"))

    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        if task.kind == "ctc":
            keys.layer("head.out", "lm_head")
        else:
            keys.layer("head.dense", "projector")
            keys.layer("head.out", "classifier")

    def head_settings(self) -> dict[str, Any]:
        return {"classifier_proj_size": PROJECTION}

    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        settings: dict[str, Any] = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": 16000,
            "padding_value": 0.0,
            "padding_side": "right",
            "do_normalize": recipe.data.speech.normalize,
            "return_attention_mask": True,
        }
        if recipe.task is not None and recipe.task.kind == "ctc":
            _write_ctc_tokenizer(Vocabulary(recipe.task.ctc.letters), out)
            settings["processor_class"] = "Wav2Vec2Processor"
        write_json(out / "preprocessor_config.json", settings)
        return []

    def example(self, model: ModelConfig, folder: Path) -> Example:
        return Example(
            ("AutoFeatureExtractor",),
            "wave = torch.randn(16000)  # one second, 16 kHz",
            '**processor(wave.numpy(), sampling_rate=16000, return_tensors="pt")',
        )

    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        waves = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
        valid = torch.arange(16000)[None] < torch.tensor([16000, 11000])[:, None]
        waves = waves * valid
        return self.unmasked(name, waves, valid), {self.input_name: waves, "attention_mask": valid.long()}

    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        return -1, -1


def _stem(model: ModelConfig) -> SpeechStem:
    return model.sole(SpeechStem)


def _write_ctc_tokenizer(vocabulary: Vocabulary, out: Path) -> None:
    """vocab.json, tokenizer_config.json and special_tokens_map.json of a Wav2Vec2CTCTokenizer."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        "word_delimiter_token": "|",
        "do_lower_case": False,
        **special,
    }
    files = {
        "vocab.json": {piece: number for number, piece in enumerate(vocabulary.pieces)},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
