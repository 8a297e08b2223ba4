"""Speech in the reference's models: fairseq data2vec_audio (1.0), and the AUDIO part of 2.0."""

from typing import Any

from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import (
    Reference,
    Settings,
    Shapes,
    common_settings,
    listed,
    parse_conv_layers,
    read_ema,
    read_loss,
    read_target,
    require,
    require_post_norm,
)
from d2v_scale.interop.reference_row import ReferenceRow, first_layers
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import SpeechStem
from d2v_scale.model.teacher_parts import TeacherParts

_WAV2VEC_CONVS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


class SpeechReference(ReferenceRow):
    """Waveforms."""

    kind = "speech"
    first_mark = "feature_extractor.conv_layers."
    first_prefix = "encoder."
    word = "audio"
    block_masks = "block1d"

    def first_keys(self, model: ModelConfig, name: str) -> KeyMap:
        keys, ours = KeyMap(), f"stems.{name}"
        keys.add(f"{ours}.context.mask_embedding", "mask_emb")
        _conv_stack(keys, model, name, "feature_extractor.conv_layers", "layer_norm", "post_extract_proj")
        for i in range(_stem(model).pos_conv_depth):
            keys.layer(f"{ours}.context.pos_convs.{i}", f"encoder.pos_conv.{i}.0")
        keys.layer(f"{ours}.context.norm", "encoder.layer_norm")
        first_layers(keys, model, "encoder.layers")
        keys.layer(f"predictors.{model.predictor_name}.proj", "final_proj")
        return keys

    def first_settings(self, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts) -> dict[str, Any]:
        require_post_norm(model, "1.0")
        backbone, stem = model.backbone, _stem(model)
        return {
            "_name": "data2vec_audio",
            **common_settings(objective, backbone.depth),
            "extractor_mode": "layer_norm",
            "layer_norm_first": False,
            "conv_bias": False,
            "encoder_layers": backbone.depth,
            "encoder_embed_dim": backbone.width,
            "encoder_ffn_embed_dim": backbone.ffn,
            "encoder_attention_heads": backbone.heads,
            "conv_feature_layers": listed(stem.conv_layers),
            "conv_pos": stem.pos_conv_kernel * stem.pos_conv_depth,
            "conv_pos_groups": stem.pos_conv_groups,
            "pos_conv_depth": stem.pos_conv_depth,
            "dropout": backbone.dropout,
            "attention_dropout": backbone.attention_dropout,
            "activation_dropout": backbone.activation_dropout,
            "encoder_layerdrop": backbone.layer_drop,
            "mask_prob": objective.masking.prob,
            "mask_length": objective.masking.length,
            "ema_transformer_only": not parts.with_predictor,
            "ema_layers_only": bool(parts.copied),
        }

    def read_first(self, settings: Settings, shapes: Shapes, tokens: Settings | None) -> Reference:
        require(settings, "extractor_mode", "layer_norm", default="layer_norm")
        require(settings, "layer_norm_first", False, None)
        require(settings, "conv_bias", False, None)
        require(settings, "layer_type", "transformer", default="transformer")
        width = settings.get("encoder_embed_dim", 768)
        depth = settings.get("pos_conv_depth", 5)
        model = ModelConfig(
            speech=SpeechStem(
                conv_layers=parse_conv_layers(settings.get("conv_feature_layers") or _WAV2VEC_CONVS),
                pos_conv_depth=depth,
                pos_conv_kernel=max(3, settings.get("conv_pos", 95) // depth),
                pos_conv_groups=settings.get("conv_pos_groups", 16),
            ),
            backbone=Backbone(
                width=width,
                heads=settings.get("encoder_attention_heads", 12),
                ffn=settings.get("encoder_ffn_embed_dim", 3072),
                depth=settings.get("encoder_layers", 12),
                dropout=settings.get("dropout", 0.0),
                attention_dropout=settings.get("attention_dropout", 0.0),
                activation_dropout=settings.get("activation_dropout", 0.0),
                input_dropout=settings.get("dropout", 0.0),
                layer_drop=settings.get("encoder_layerdrop", 0.0),
            ),
            predictor=Predictor(kind="linear"),
        )
        parts = published_parts(model)
        if not settings.get("ema_transformer_only", True):
            parts = TeacherParts(with_predictor=True)
        elif not settings.get("ema_layers_only", False):
            parts.copied = []
        masking = MaskingConfig(
            kind="spans", prob=settings.get("mask_prob", 0.65), length=settings.get("mask_length", 10), starts="inside"
        )
        objective = ObjectiveConfig(
            masking=masking,
            target=read_target(settings, default_k=8, across_batch=True),
            loss=read_loss(settings, width),
            ema=read_ema(settings),
        )
        return Reference(self.kind, model, objective, parts)

    def add_stem_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        theirs, ours, stem = self.second_prefix, f"stems.{name}", _stem(model)
        if stem.alibi:
            heads = model.backbone.heads
            keys.reshaped(f"{ours}.bias.scale", f"{theirs}.alibi_scale", (heads,), (1, 1, heads, 1, 1))
        convs = f"{theirs}.local_encoder.conv_layers"
        _conv_stack(keys, model, name, convs, f"{theirs}.project_features.1", f"{theirs}.project_features.2")
        for i in range(stem.pos_conv_depth):
            keys.layer(f"{ours}.context.pos_convs.{i}", f"{theirs}.relative_positional_encoder.{i + 1}.0")
        keys.layer(f"{ours}.context.norm", f"{theirs}.context_encoder.norm")

    def stem_settings(self, model: ModelConfig) -> dict[str, Any]:
        stem = _stem(model)
        return {
            "extractor_mode": "layer_norm",
            "feature_encoder_spec": listed(stem.conv_layers),
            "conv_pos_width": stem.pos_conv_kernel * stem.pos_conv_depth,
            "conv_pos_groups": stem.pos_conv_groups,
            "conv_pos_depth": stem.pos_conv_depth,
            "conv_pos_pre_ln": False,
            "use_alibi_encoder": stem.alibi,
            "learned_alibi_scale": stem.alibi,
            "learned_alibi_scale_per_head": stem.alibi,
            "learned_alibi_scale_per_layer": False,
            "learned_alibi": False,
        }

    def read_stem(self, model: ModelConfig, stem: Settings, shapes: Shapes, tokens: Settings | None) -> None:
        require(stem, "extractor_mode", "layer_norm", default="layer_norm")
        require(stem, "conv_pos_pre_ln", False, None)
        alibi = bool(stem.get("use_alibi_encoder", False))
        if alibi:
            require(stem, "learned_alibi_scale", True)
            require(stem, "learned_alibi_scale_per_head", True)
            require(stem, "learned_alibi_scale_per_layer", False, None)
            require(stem, "learned_alibi", False, None)
        depth = stem.get("conv_pos_depth", 5)
        model.speech = SpeechStem(
            conv_layers=parse_conv_layers(stem.get("feature_encoder_spec") or _WAV2VEC_CONVS),
            pos_conv_depth=depth,
            pos_conv_kernel=max(3, stem.get("conv_pos_width", 95) // depth),
            pos_conv_groups=stem.get("conv_pos_groups", 16),
            alibi=alibi,
        )


def _stem(model: ModelConfig) -> SpeechStem:
    return model.sole(SpeechStem)


def _conv_stack(keys: KeyMap, model: ModelConfig, name: str, convs: str, norm: str, proj: str) -> None:
    ours = f"stems.{name}.features"
    for i in range(len(_stem(model).conv_layers)):
        keys.add(f"{ours}.convs.{i}.weight", f"{convs}.{i}.0.weight")
        keys.layer(f"{ours}.conv_norms.{i}", f"{convs}.{i}.2.1")
    keys.layer(f"{ours}.norm", norm)
    keys.layer(f"{ours}.proj", proj)
