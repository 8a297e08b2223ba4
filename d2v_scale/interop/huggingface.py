"""Hugging Face's Data2Vec classes: the table of kinds, key tables, configurations, and what of ours they can hold.

Native: 1.0 speech, text and vision, and 2.0 text (a post-norm stack with separate q, k, v is what they compute). 2.0
speech (ALiBi) and vision (post-norm) are not, nor are arrays: see `remote_code`. A new kind of stem is a row of
`TABLE`; until it has one, it is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.huggingface_array import ArrayRow
from d2v_scale.interop.huggingface_joint import JointRow
from d2v_scale.interop.huggingface_row import HuggingFaceRow
from d2v_scale.interop.huggingface_speech import SpeechRow
from d2v_scale.interop.huggingface_text import TextRow
from d2v_scale.interop.huggingface_vision import VisionRow
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Reference, Shapes
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.stem_config import parts_of

TABLE: tuple[HuggingFaceRow, ...] = (SpeechRow(), TextRow(), VisionRow(), ArrayRow())
"""One row a kind of stem that transformers, or our modelling files, have classes for."""
REMEDY = "Use --to safetensors, which writes any model under our own names."

# Task models hold the encoder under one of these.
PREFIXES = (*(f"{row.native_prefix}." for row in TABLE if row.model_type is not None), "data2vec2.")
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


def row_of(config: ModelConfig, modality: str) -> HuggingFaceRow:
    """What is said of this stem, or of samples of several parts, of which there may be a single one. Raises
    CheckpointError where there is no row."""
    if len(parts_of(modality)) > 1:
        return JointRow(row_of_kind)
    row = row_of_kind(config, modality)
    return JointRow(row_of_kind) if row.joint_unless_native and not row.is_native(config.of(modality)) else row


def row_of_kind(config: ModelConfig, modality: str) -> HuggingFaceRow:
    """What is said of the kind of this stem, whether or not its native class computes it. Raises CheckpointError."""
    kind = config.kind(modality)
    row = next((row for row in TABLE if row.kind == kind), None)
    if row is None:
        raise CheckpointError(f"transformers has no class for {modality}, a stem of the kind {kind}.", REMEDY)
    return row


def model_of(config: ModelConfig, sequence: str) -> ModelConfig:
    """The same model with this stem alone (`ModelConfig.of`), or with those of samples of several parts."""
    names = parts_of(sequence)
    if len(names) == 1:
        return config.of(sequence)
    return dataclasses.replace(config, **config.fields_of({name: config.stems[name] for name in names}))


def is_native(config: ModelConfig, modality: str) -> bool:
    """Whether a Hugging Face class computes exactly this encoder; else our modelling files do. Raises CheckpointError
    where neither does."""
    row, model = row_of(config, modality), model_of(config, modality)
    stem = next(iter(model.stems.values()))
    if not row.any_extra_tokens and stem.extra_token_count != stem.usual_extra_tokens:
        raise CheckpointError(
            f"classes of transformers, and our modelling file, have {stem.usual_extra_tokens} extra tokens before the "
            f"positions of {modality}; this encoder has {stem.extra_token_count} (model.{modality}.extra_tokens).",
            REMEDY,
        )
    if row.is_native(model):
        return True
    unlike = row.beyond_remote(model)
    if row.remote_configuration is None or unlike:
        with_what = f" with its {', '.join(unlike)}" if unlike else ""
        raise CheckpointError(
            f"neither a class of transformers nor our modelling file computes this encoder of {modality}{with_what}.",
            REMEDY,
        )
    return False


def huggingface_keys(config: ModelConfig, modality: str) -> KeyMap:
    """The table between our names and those of the native class."""
    keys = KeyMap(ignored=_HEADS, buffers=_BUFFERS, initialised=("predictors.",))
    row_of_kind(config, modality).add_keys(keys, config.of(modality), modality)
    return keys


def huggingface_settings(config: ModelConfig, modality: str) -> dict[str, Any]:
    """The native class's config.json. Everything that its defaults have differently is written out (spec 8)."""
    row, model = row_of(config, modality), config.of(modality)
    backbone = model.backbone
    return {
        "model_type": row.model_type,
        "architectures": [row.native_class],
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.prenet_depth + backbone.depth,
        "num_attention_heads": backbone.heads,
        "intermediate_size": backbone.ffn,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm_eps,
        "initializer_range": 0.02,
        "dtype": "float32",
        **row.settings(model),
    }


def from_huggingface(settings: Mapping[str, Any], shapes: Shapes) -> tuple[Reference, KeyMap]:
    """Our configuration of a native Data2Vec folder's config.json, and its names. The predictor is not in it and starts
    anew.

    Raises `CheckpointError` for another model type or options that no data2vec model has.
    """
    model_type = settings.get("model_type")
    known = {row.model_type: row for row in TABLE if row.model_type is not None}
    row = known.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise CheckpointError(
            f"config.json has model_type {model_type!r}.",
            f"Known are {', '.join(known)} (our own modelling files' folders are not imported).",
        )
    for key, allowed in _COMPUTED.items():
        if key in settings and settings[key] not in allowed:
            raise CheckpointError(
                f"config.json has {key}={settings[key]!r}, which no pretrained data2vec model has.",
                f"This encoder computes with {allowed[0]!r}.",
            )
    dropout, attention_dropout = row.dropout_names
    width = int(settings.get("hidden_size", 768))
    backbone = Backbone(
        width=width,
        heads=int(settings.get("num_attention_heads", 12)),
        ffn=int(settings.get("intermediate_size", 4 * width)),
        depth=int(settings.get("num_hidden_layers", 12)),
        norm_eps=float(settings.get("layer_norm_eps", 1e-5)),
        dropout=float(settings.get(dropout, 0.0)),
        attention_dropout=float(settings.get(attention_dropout, 0.0)),
    )
    model = row.read_settings(settings, shapes, backbone)
    # The folder says nothing of how the model was trained; only what must fit the model is set.
    objective = ObjectiveConfig()
    objective.target.top_k_layers = min(objective.target.top_k_layers, model.backbone.depth)
    keys = huggingface_keys(model, row.kind)
    for prefix in row.may_lack(settings):
        keys.make_optional(prefix)
    return Reference(row.kind, model, objective, published_parts(model)), keys
