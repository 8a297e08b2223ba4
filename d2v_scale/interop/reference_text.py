"""Text in the reference's models: fairseq data2vec_text (1.0), and the TEXT part of 2.0."""

from typing import Any

import torch
from torch import Tensor

from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import (
    Reference,
    Settings,
    Shapes,
    common_settings,
    read_ema,
    read_loss,
    read_target,
    require,
    require_post_norm,
)
from d2v_scale.interop.reference_row import ReferenceRow, Tensors, first_layers
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import TextStem
from d2v_scale.model.teacher_parts import TeacherParts


class TextReference(ReferenceRow):
    """Tokens."""

    kind = "text"
    first_mark = "encoder.sentence_encoder."
    first_prefix = "encoder.sentence_encoder."
    first_nested = "encoder._ema"
    word = "text"
    block_masks = None
    dropout_key = "dropout"
    may_average_blocks_only = True

    def first_keys(self, model: ModelConfig, name: str) -> KeyMap:
        keys, predictor = KeyMap(), f"predictors.{model.predictor_name}"
        encoder = "encoder.sentence_encoder"
        _embeddings(keys, name, encoder)
        first_layers(keys, model, f"{encoder}.layers")
        if model.predictor.kind == "mlp":
            keys.layer(f"{predictor}.fc1", "encoder.regression_head.0")
            keys.layer(f"{predictor}.fc2", "encoder.regression_head.2")
        else:
            keys.layer(f"{predictor}.proj", "encoder.regression_head.0")
        keys.derived[f"{encoder}.version"] = lambda: torch.full((1,), 3.0)
        return keys

    def first_settings(self, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts) -> dict[str, Any]:
        require_post_norm(model, "1.0")
        backbone = model.backbone
        return {
            "_name": "data2vec_text",
            **common_settings(objective, backbone.depth),
            "max_positions": _stem(model).max_positions,
            "head_layers": 2 if model.predictor.kind == "mlp" else 1,
            "ema_transformer_layers_only": bool(parts.copied),
            "transformer": {
                "dropout": backbone.dropout,
                "attention_dropout": backbone.attention_dropout,
                "activation_dropout": backbone.activation_dropout,
                "layernorm_embedding": True,
                "no_scale_embedding": True,
                "encoder": {
                    "embed_dim": backbone.width,
                    "ffn_embed_dim": backbone.ffn,
                    "layers": backbone.depth,
                    "attention_heads": backbone.heads,
                    "normalize_before": False,
                    "learned_pos": True,
                    "layerdrop": backbone.layer_drop,
                },
            },
        }

    def read_first(self, settings: Settings, shapes: Shapes, tokens: Settings | None) -> Reference:
        transformer = settings.get("transformer") or {}
        encoder = transformer.get("encoder") or {}
        require(encoder, "normalize_before", False, None)
        require(settings, "head_layers", 1, 2, default=1)
        width = encoder.get("embed_dim", 768)
        prefix = "encoder.sentence_encoder"
        model = ModelConfig(
            text=_read_stem(
                f"{prefix}.embed_tokens.weight",
                f"{prefix}.embed_positions.weight",
                shapes,
                settings.get("max_positions", 512),
                tokens,
            ),
            backbone=Backbone(
                width=width,
                heads=encoder.get("attention_heads", 12),
                ffn=encoder.get("ffn_embed_dim", 3072),
                depth=encoder.get("layers", 12),
                dropout=transformer.get("dropout", 0.0),
                attention_dropout=transformer.get("attention_dropout", 0.0),
                activation_dropout=transformer.get("activation_dropout", 0.0),
                input_dropout=transformer.get("dropout", 0.0),
                layer_drop=encoder.get("layerdrop", 0.0),
            ),
            predictor=Predictor(kind="mlp" if settings.get("head_layers", 1) == 2 else "linear"),
        )
        parts = published_parts(model)
        if not settings.get("ema_transformer_layers_only", False):
            parts.copied = []
        objective = ObjectiveConfig(
            masking=MaskingConfig(kind="spans", prob=0.35, length=4, starts="anywhere"),
            target=read_target(settings, default_k=8),
            loss=read_loss(settings, width),
            ema=read_ema(settings),
        )
        return Reference(self.kind, model, objective, parts)

    def add_stem_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        _embeddings(keys, name, f"{self.second_prefix}.local_encoder")

    def stem_settings(self, model: ModelConfig) -> dict[str, Any]:
        return {"max_source_positions": _stem(model).max_positions, self.dropout_key: model.backbone.input_dropout}

    def read_stem(self, model: ModelConfig, stem: Settings, shapes: Shapes, tokens: Settings | None) -> None:
        require(stem, "use_alibi_encoder", False, None)
        prefix = f"{self.second_prefix}.local_encoder"
        longest = stem.get("max_source_positions", 512)
        model.text = _read_stem(
            f"{prefix}.embed_tokens.weight", f"{prefix}.embed_positions.weight", shapes, longest, tokens
        )

    def special_words(self, model: ModelConfig) -> dict[str, int]:
        stem = _stem(model)
        return {
            "bos": stem.bos_id,
            "pad": stem.pad_id,
            "eos": stem.eos_id,
            "unk": stem.unk_id,
            "mask": stem.mask_id,
        }

    def recorded_inputs(self, io: Tensors) -> tuple[Tensor | None, Tensor | None]:
        if "in.target_tokens" in io:
            return io["in.target_tokens"], io.get("in.src_tokens")
        return super().recorded_inputs(io)


def _stem(model: ModelConfig) -> TextStem:
    return model.sole(TextStem)


def _embeddings(keys: KeyMap, name: str, prefix: str) -> None:
    ours = f"stems.{name}.features"
    keys.add(f"{ours}.tokens.weight", f"{prefix}.embed_tokens.weight")
    keys.add(f"{ours}.positions.weight", f"{prefix}.embed_positions.weight")
    keys.layer(f"{ours}.norm", f"{prefix}.layernorm_embedding")


def _read_stem(table: str, places: str, shapes: Shapes, longest: int, tokens: Settings | None) -> TextStem:
    ids = dict(tokens or {})
    pad = ids.get("pad", 1)
    vocabulary = shapes.get(table, (50265,))[0]
    return TextStem(
        vocab_size=vocabulary,
        max_positions=shapes[places][0] - pad - 1 if places in shapes else longest,
        bos_id=ids.get("bos", 0),
        pad_id=pad,
        eos_id=ids.get("eos", 2),
        unk_id=ids.get("unk", 3),
        mask_id=ids.get("mask", vocabulary - 1),
    )
