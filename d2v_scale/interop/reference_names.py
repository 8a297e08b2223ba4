"""Names of the reference code: fairseq data2vec 1.0 (speech, text) and 2.0, data2vec_vision (1.0 vision)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from d2v_scale.interop.keymap import KeyMap
from d2v_scale.model.config import Modality, ModelConfig
from d2v_scale.model.position_bias import relative_index, sincos_positions

_MODALITY_2 = {"speech": "AUDIO", "vision": "IMAGE", "text": "TEXT"}


def reference_keys(config: ModelConfig, modality: Modality) -> KeyMap:
    """The table between our names and those of the reference that published this kind of model."""
    if config.visible_only:
        return _fairseq_2(config, modality)
    if modality == "speech":
        return _fairseq_1_speech(config)
    if modality == "text":
        return _fairseq_1_text(config)
    return _data2vec_vision(config)


# What a teacher's keys lack of the student's, since only a part of the model is averaged.
_TEACHER_PREFIXES = ("", "encoder.", "encoder.sentence_encoder.", "blocks.")


def teacher_prefix(keymap: KeyMap, teacher_keys: Iterable[str]) -> str:
    """What to put before a teacher's keys to get the model's; keys that then still fit nothing are unexpected."""
    known = {*keymap.theirs_to_ours_names(), *keymap.derived}
    teacher = list(teacher_keys)
    return max(_TEACHER_PREFIXES, key=lambda prefix: sum(prefix + key in known for key in teacher))


def _fairseq_1_speech(config: ModelConfig) -> KeyMap:
    assert config.speech is not None
    keys = KeyMap()
    keys.add("stems.speech.context.mask_embedding", "mask_emb")
    _conv_stack(keys, config, "feature_extractor.conv_layers", "layer_norm", "post_extract_proj")
    for i in range(config.speech.pos_conv_depth):
        keys.layer(f"stems.speech.context.pos_convs.{i}", f"encoder.pos_conv.{i}.0")
    keys.layer("stems.speech.context.norm", "encoder.layer_norm")
    _fairseq_1_layers(keys, config, "encoder.layers")
    keys.layer("predictors.speech.proj", "final_proj")
    return keys


def _fairseq_1_text(config: ModelConfig) -> KeyMap:
    keys = KeyMap()
    encoder = "encoder.sentence_encoder"
    _embeddings(keys, encoder)
    _fairseq_1_layers(keys, config, f"{encoder}.layers")
    if config.predictor.kind == "mlp":
        keys.layer("predictors.text.fc1", "encoder.regression_head.0")
        keys.layer("predictors.text.fc2", "encoder.regression_head.2")
    else:
        keys.layer("predictors.text.proj", "encoder.regression_head.0")
    keys.derived[f"{encoder}.version"] = lambda: torch.full((1,), 3.0)
    return keys


def _conv_stack(keys: KeyMap, config: ModelConfig, convs: str, norm: str, proj: str) -> None:
    assert config.speech is not None
    for i in range(len(config.speech.conv_layers)):
        keys.add(f"stems.speech.features.convs.{i}.weight", f"{convs}.{i}.0.weight")
        keys.layer(f"stems.speech.features.conv_norms.{i}", f"{convs}.{i}.2.1")
    keys.layer("stems.speech.features.norm", norm)
    keys.layer("stems.speech.features.proj", proj)


def _embeddings(keys: KeyMap, prefix: str) -> None:
    keys.add("stems.text.features.tokens.weight", f"{prefix}.embed_tokens.weight")
    keys.add("stems.text.features.positions.weight", f"{prefix}.embed_positions.weight")
    keys.layer("stems.text.features.norm", f"{prefix}.layernorm_embedding")


def _fairseq_1_layers(keys: KeyMap, config: ModelConfig, prefix: str) -> None:
    for i in range(config.backbone.depth):
        ours, theirs = f"blocks.{i}", f"{prefix}.{i}"
        for part in ("weight", "bias"):
            names = tuple(f"{theirs}.self_attn.{which}_proj.{part}" for which in "qkv")
            keys.separate_qkv(f"{ours}.attention.qkv.{part}", names, config.backbone.heads)  # type: ignore[arg-type]
        keys.layer(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        keys.layer(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
        keys.layer(f"{ours}.ffn.fc1", f"{theirs}.fc1")
        keys.layer(f"{ours}.ffn.fc2", f"{theirs}.fc2")
        keys.layer(f"{ours}.norm2", f"{theirs}.final_layer_norm")


def _timm_block(keys: KeyMap, config: ModelConfig, ours: str, theirs: str) -> None:
    backbone = config.backbone
    keys.layer(f"{ours}.norm1", f"{theirs}.norm1")
    keys.fused_qkv(f"{ours}.attention.qkv.weight", f"{theirs}.attn.qkv.weight", backbone.heads)
    if backbone.key_bias:
        keys.fused_qkv(f"{ours}.attention.qkv.bias", f"{theirs}.attn.qkv.bias", backbone.heads)
    else:
        keys.add(f"{ours}.attention.q_bias", f"{theirs}.attn.q_bias")
        keys.add(f"{ours}.attention.v_bias", f"{theirs}.attn.v_bias")
    keys.layer(f"{ours}.attention.out", f"{theirs}.attn.proj")
    keys.layer(f"{ours}.norm2", f"{theirs}.norm2")
    keys.layer(f"{ours}.ffn.fc1", f"{theirs}.mlp.fc1")
    keys.layer(f"{ours}.ffn.fc2", f"{theirs}.mlp.fc2")
    if backbone.layer_scale > 0:
        keys.add(f"{ours}.scale1", f"{theirs}.gamma_1")
        keys.add(f"{ours}.scale2", f"{theirs}.gamma_2")


def _data2vec_vision(config: ModelConfig) -> KeyMap:
    assert config.vision is not None
    keys = KeyMap()
    keys.layer("stems.vision.features.patch", "patch_embed.proj")
    keys.add("stems.vision.context.cls", "cls_token")
    keys.add("stems.vision.context.mask_token", "mask_token")
    if config.vision.positions == "relative":
        grid = config.vision.grid
        keys.add("stems.vision.bias.table", "rel_pos_bias.relative_position_bias_table")
        keys.derived["rel_pos_bias.relative_position_index"] = lambda: relative_index(grid)
    for i in range(config.backbone.depth):
        _timm_block(keys, config, f"blocks.{i}", f"blocks.{i}")
    keys.layer("final_norm", "norm")
    keys.layer("predictors.vision.proj", "lm_head")
    return keys


def _fairseq_2(config: ModelConfig, modality: Modality) -> KeyMap:
    keys = KeyMap()
    theirs, ours = f"modality_encoders.{_MODALITY_2[modality]}", f"stems.{modality}"
    if modality == "speech":
        assert config.speech is not None
        if config.speech.alibi:
            heads = config.backbone.heads
            keys.reshaped(f"{ours}.bias.scale", f"{theirs}.alibi_scale", (heads,), (1, 1, heads, 1, 1))
        convs = f"{theirs}.local_encoder.conv_layers"
        _conv_stack(keys, config, convs, f"{theirs}.project_features.1", f"{theirs}.project_features.2")
        for i in range(config.speech.pos_conv_depth):
            keys.layer(f"{ours}.context.pos_convs.{i}", f"{theirs}.relative_positional_encoder.{i + 1}.0")
    elif modality == "vision":
        assert config.vision is not None
        keys.add(f"{ours}.context.cls", f"{theirs}.extra_tokens")
        keys.layer(f"{ours}.features.patch", f"{theirs}.local_encoder.proj")
        width, grid = config.backbone.width, config.vision.grid
        keys.derived[f"{theirs}.fixed_positional_encoder.positions"] = lambda: _positions(width, grid)
    else:
        _embeddings(keys, f"{theirs}.local_encoder")
    if modality != "text":
        keys.layer(f"{ours}.context.norm", f"{theirs}.context_encoder.norm")
    for i in range(config.backbone.prenet_depth):
        _timm_block(keys, config, f"{ours}.prenet.{i}", f"{theirs}.context_encoder.blocks.{i}")
    for i in range(config.backbone.depth):
        _timm_block(keys, config, f"blocks.{i}", f"blocks.{i}")
    for i in range(config.predictor.layers):
        keys.layer(f"predictors.{modality}.convs.{i}", f"{theirs}.decoder.blocks.{i}.0")
    if config.predictor.proj_layers == 1:
        keys.layer(f"predictors.{modality}.proj", f"{theirs}.decoder.proj")
    else:
        keys.layer(f"predictors.{modality}.proj1", f"{theirs}.decoder.proj.0")
        keys.layer(f"predictors.{modality}.proj2", f"{theirs}.decoder.proj.2")
    return keys


def _positions(width: int, grid: tuple[int, int]) -> Tensor:
    return sincos_positions(width, grid)[None]
