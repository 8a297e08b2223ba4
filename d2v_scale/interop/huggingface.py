"""Hugging Face's Data2Vec classes: key tables, configurations, and which of our models they can hold.

Native: 1.0 speech, text and vision, and 2.0 text (a post-norm stack with separate q, k, v is what they compute). 2.0
speech (ALiBi) and vision (post-norm) are not: see `remote_code`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_config import Reference, Shapes
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import (
    Backbone,
    Modality,
    ModelConfig,
    Predictor,
    SpeechStem,
    TextStem,
    VisionStem,
)

MODEL_TYPES: dict[str, Modality] = {
    "data2vec-audio": "speech",
    "data2vec-text": "text",
    "data2vec-vision": "vision",
}
CLASSES: dict[Modality, str] = {
    "speech": "Data2VecAudioModel",
    "text": "Data2VecTextModel",
    "vision": "Data2VecVisionModel",
}
# Task models hold the encoder under one of these.
PREFIXES = ("data2vec_audio.", "data2vec_text.", "data2vec_vision.", "data2vec2.")
WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and compilation put before every name."""
TIED = ("embeddings.word_embeddings.weight", "lm_head.decoder.weight")
"""One tensor of a language model under two names; a file may hold either."""
# Constants that older versions of transformers saved with the weights; newer ones make them anew.
_BUFFERS = ("position_ids", "token_type_ids", "relative_position_index")
_HEADS = ("pooler.", "lm_head.", "classifier.", "qa_outputs.", "projector.", "decode_head.", "auxiliary_head.")

# Settings that change what is computed: their values in every data2vec model.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_python"),
    "feat_extract_activation": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "conv_bias": (False,),
    "add_adapter": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


def is_native(config: ModelConfig, modality: Modality) -> bool:
    """Whether a Hugging Face class computes exactly this encoder."""
    if modality == "speech":
        assert config.speech is not None
        return not config.visible_only and not config.speech.alibi and not config.backbone.norm_first
    if modality == "text":
        return not config.backbone.norm_first
    assert config.vision is not None
    backbone = config.backbone
    relative = config.vision.positions == "relative" and not config.visible_only
    return (
        relative and backbone.norm_first and not backbone.key_bias and backbone.final_norm and backbone.layer_scale > 0
    )


def huggingface_keys(config: ModelConfig, modality: Modality) -> KeyMap:
    """The table between our names and those of the native class."""
    keys = KeyMap(ignored=_HEADS, buffers=_BUFFERS, initialised=("predictors.",))
    if modality == "speech":
        _audio(keys, config)
    elif modality == "text":
        _text(keys, config)
    else:
        _vision(keys, config)
    return keys


def _blocks(config: ModelConfig, modality: Modality) -> list[str]:
    """Names of all blocks in order, those before the main ones first."""
    prenet = [f"stems.{modality}.prenet.{i}" for i in range(config.backbone.prenet_depth)]
    return prenet + [f"blocks.{i}" for i in range(config.backbone.depth)]


def _audio(keys: KeyMap, config: ModelConfig) -> None:
    assert config.speech is not None
    ours = "stems.speech"
    for i in range(len(config.speech.conv_layers)):
        theirs = f"feature_extractor.conv_layers.{i}"
        keys.add(f"{ours}.features.convs.{i}.weight", f"{theirs}.conv.weight")
        keys.layer(f"{ours}.features.conv_norms.{i}", f"{theirs}.layer_norm")
    keys.layer(f"{ours}.features.norm", "feature_projection.layer_norm")
    keys.layer(f"{ours}.features.proj", "feature_projection.projection")
    keys.add(f"{ours}.context.mask_embedding", "masked_spec_embed", optional=True)
    for i in range(config.speech.pos_conv_depth):
        keys.layer(f"{ours}.context.pos_convs.{i}", f"encoder.pos_conv_embed.layers.{i}.conv")
    keys.layer(f"{ours}.context.norm", "encoder.layer_norm")
    for i, block in enumerate(_blocks(config, "speech")):
        theirs = f"encoder.layers.{i}"
        for part in ("weight", "bias"):
            names = (
                f"{theirs}.attention.q_proj.{part}",
                f"{theirs}.attention.k_proj.{part}",
                f"{theirs}.attention.v_proj.{part}",
            )
            keys.separate_qkv(f"{block}.attention.qkv.{part}", names, config.backbone.heads)
        keys.layer(f"{block}.attention.out", f"{theirs}.attention.out_proj")
        keys.layer(f"{block}.norm1", f"{theirs}.layer_norm")
        keys.layer(f"{block}.ffn.fc1", f"{theirs}.feed_forward.intermediate_dense")
        keys.layer(f"{block}.ffn.fc2", f"{theirs}.feed_forward.output_dense")
        keys.layer(f"{block}.norm2", f"{theirs}.final_layer_norm")


def _text(keys: KeyMap, config: ModelConfig) -> None:
    width, ours = config.backbone.width, "stems.text.features"
    keys.add(f"{ours}.tokens.weight", "embeddings.word_embeddings.weight")
    keys.add(f"{ours}.positions.weight", "embeddings.position_embeddings.weight")
    keys.derived["embeddings.token_type_embeddings.weight"] = lambda: torch.zeros(1, width)
    keys.layer(f"{ours}.norm", "embeddings.LayerNorm")
    for i, block in enumerate(_blocks(config, "text")):
        theirs = f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            names = (
                f"{theirs}.attention.self.query.{part}",
                f"{theirs}.attention.self.key.{part}",
                f"{theirs}.attention.self.value.{part}",
            )
            keys.separate_qkv(f"{block}.attention.qkv.{part}", names, config.backbone.heads)
        keys.layer(f"{block}.attention.out", f"{theirs}.attention.output.dense")
        keys.layer(f"{block}.norm1", f"{theirs}.attention.output.LayerNorm")
        keys.layer(f"{block}.ffn.fc1", f"{theirs}.intermediate.dense")
        keys.layer(f"{block}.ffn.fc2", f"{theirs}.output.dense")
        keys.layer(f"{block}.norm2", f"{theirs}.output.LayerNorm")


def _vision(keys: KeyMap, config: ModelConfig) -> None:
    ours = "stems.vision"
    keys.add(f"{ours}.context.cls", "embeddings.cls_token")
    keys.add(f"{ours}.context.mask_token", "embeddings.mask_token", optional=True)
    keys.layer(f"{ours}.features.patch", "embeddings.patch_embeddings.projection")
    keys.add(f"{ours}.bias.table", "encoder.relative_position_bias.relative_position_bias_table")
    for i, block in enumerate(_blocks(config, "vision")):
        theirs = f"encoder.layer.{i}"
        attention = f"{theirs}.attention.attention"
        weights = (f"{attention}.query.weight", f"{attention}.key.weight", f"{attention}.value.weight")
        keys.separate_qkv(f"{block}.attention.qkv.weight", weights, config.backbone.heads)
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


def huggingface_settings(config: ModelConfig, modality: Modality) -> dict[str, Any]:
    """The native class's config.json. Everything that its defaults have differently is written out (spec 8)."""
    backbone = config.backbone
    settings: dict[str, Any] = {
        "model_type": next(name for name, m in MODEL_TYPES.items() if m == modality),
        "architectures": [CLASSES[modality]],
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.prenet_depth + backbone.depth,
        "num_attention_heads": backbone.heads,
        "intermediate_size": backbone.ffn,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm_eps,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if modality == "speech":
        assert config.speech is not None
        channels, kernels, strides = zip(*config.speech.conv_layers, strict=True)
        settings |= {
            "conv_dim": list(channels),
            "conv_kernel": list(kernels),
            "conv_stride": list(strides),
            "conv_bias": False,
            "feat_extract_activation": "gelu",
            "num_feat_extract_layers": len(channels),
            # The number of positional convolutions, not a kernel size.
            "num_conv_pos_embeddings": config.speech.pos_conv_depth,
            "conv_pos_kernel_size": config.speech.pos_conv_kernel,
            "num_conv_pos_embedding_groups": config.speech.pos_conv_groups,
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
    elif modality == "text":
        assert config.text is not None
        settings |= {
            "vocab_size": config.text.vocab_size,
            "max_position_embeddings": config.text.max_positions + config.text.pad_id + 1,
            "type_vocab_size": 1,
            "pad_token_id": config.text.pad_id,
            "bos_token_id": config.text.bos_id,
            "eos_token_id": config.text.eos_id,
            "hidden_dropout_prob": backbone.dropout,
            "attention_probs_dropout_prob": backbone.attention_dropout,
        }
    else:
        assert config.vision is not None
        settings |= {
            "image_size": config.vision.image_size,
            "patch_size": config.vision.patch_size,
            "num_channels": config.vision.channels,
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
    return settings


def from_huggingface(settings: Mapping[str, Any], shapes: Shapes) -> Reference:
    """Our configuration of a native Data2Vec folder's config.json. The predictor is not in it and starts anew.

    Raises `CheckpointError` for another model type or options that no data2vec model has.
    """
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json has model_type {kind!r}.",
            f"Known are {', '.join(MODEL_TYPES)} (2.0 exports are not imported).",
        )
    modality = MODEL_TYPES[kind]
    for key, allowed in _COMPUTED.items():
        if key in settings and settings[key] not in allowed:
            raise CheckpointError(
                f"config.json has {key}={settings[key]!r}, which no pretrained data2vec model has.",
                f"This encoder computes with {allowed[0]!r}.",
            )
    names = {
        "vision": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "text": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "speech": ("hidden_dropout", "attention_dropout"),
    }[modality]
    width = int(settings.get("hidden_size", 768))
    backbone = Backbone(
        width=width,
        heads=int(settings.get("num_attention_heads", 12)),
        ffn=int(settings.get("intermediate_size", 4 * width)),
        depth=int(settings.get("num_hidden_layers", 12)),
        norm_eps=float(settings.get("layer_norm_eps", 1e-5)),
        dropout=float(settings.get(names[0], 0.0)),
        attention_dropout=float(settings.get(names[1], 0.0)),
    )
    model = ModelConfig(backbone=backbone, predictor=Predictor(kind="mlp" if modality == "text" else "linear"))
    if modality == "speech":
        layers = zip(settings["conv_dim"], settings["conv_kernel"], settings["conv_stride"], strict=True)
        model.speech = SpeechStem(
            conv_layers=[tuple(layer) for layer in layers],  # type: ignore[misc]
            pos_conv_depth=settings.get("num_conv_pos_embeddings", 5),
            pos_conv_kernel=settings.get("conv_pos_kernel_size", 19),
            pos_conv_groups=settings.get("num_conv_pos_embedding_groups", 16),
        )
    elif modality == "text":
        pad = settings.get("pad_token_id", 1)
        vocabulary = shapes.get("embeddings.word_embeddings.weight", (settings.get("vocab_size", 50265),))[0]
        model.text = TextStem(
            vocab_size=vocabulary,
            max_positions=int(settings.get("max_position_embeddings", 514)) - pad - 1,
            bos_id=settings.get("bos_token_id", 0),
            pad_id=pad,
            eos_id=settings.get("eos_token_id", 2),
            mask_id=vocabulary - 1,
        )
    else:
        _complete_vision(model, settings, shapes)
    # The folder says nothing of how the model was trained; only what must fit the model is set.
    objective = ObjectiveConfig()
    objective.target.top_k_layers = min(objective.target.top_k_layers, model.backbone.depth)
    return Reference(modality, model, objective, published_parts(model))


def _complete_vision(model: ModelConfig, settings: Mapping[str, Any], shapes: Shapes) -> None:
    for key, wanted in (("use_shared_relative_position_bias", True), ("use_absolute_position_embeddings", False)):
        if bool(settings.get(key)) is not wanted:
            raise CheckpointError(f"config.json has {key}={settings.get(key)}, which no pretrained data2vec model has.")
    backbone = model.backbone
    backbone.norm_first, backbone.key_bias, backbone.final_norm = True, False, True
    # Published files say 1e-12; every published model was trained with 1e-6 (spec 8.4).
    backbone.norm_eps = max(backbone.norm_eps, 1e-6)
    backbone.layer_scale = float(settings.get("layer_scale_init_value", 1e-4))
    backbone.drop_path = float(settings.get("drop_path_rate", 0.0))
    model.init = "beit"
    patch = int(settings.get("patch_size", 16))
    table = shapes.get("encoder.relative_position_bias.relative_position_bias_table")
    grid = (math.isqrt(table[0] - 3) + 1) // 2 if table else int(settings.get("image_size", 224)) // patch
    model.vision = VisionStem(
        image_size=grid * patch, patch_size=patch, channels=int(settings.get("num_channels", 3)), positions="relative"
    )
