"""Names of the reference code: fairseq data2vec 1.0 (speech, text) and 2.0, data2vec_vision (1.0 vision)."""

from collections.abc import Iterable

from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_row import ReferenceRow, timm_block
from d2v_scale.interop.reference_table import row_of
from d2v_scale.model.config import ModelConfig


def reference_keys(config: ModelConfig, modality: str) -> KeyMap:
    """The table between our names and those of the reference that published this kind of model."""
    row, model = row_of(config, modality), config.of(modality)
    return _second_keys(row, model, modality) if model.visible_only else row.first_keys(model, modality)


# What a teacher's keys lack of the student's, since only a part of the model is averaged.
_TEACHER_PREFIXES = ("", "encoder.", "encoder.sentence_encoder.", "blocks.")


def teacher_prefix(keymap: KeyMap, teacher_keys: Iterable[str]) -> str:
    """What to put before a teacher's keys to get the model's; keys that then still fit nothing are unexpected."""
    known = {*keymap.theirs_to_ours_names(), *keymap.derived}
    teacher = list(teacher_keys)
    return max(_TEACHER_PREFIXES, key=lambda prefix: sum(prefix + key in known for key in teacher))


def _second_keys(row: ReferenceRow, model: ModelConfig, name: str) -> KeyMap:
    keys, theirs, predictor = KeyMap(), row.second_prefix, f"predictors.{model.predictor_name}"
    row.add_stem_keys(keys, model, name)
    if model.stems[name].extra_token_count:
        keys.add(f"stems.{name}.context.cls", f"{theirs}.extra_tokens")
    for i in range(model.backbone.prenet_depth):
        timm_block(keys, model, f"stems.{name}.prenet.{i}", f"{theirs}.context_encoder.blocks.{i}")
    for i in range(model.backbone.depth):
        timm_block(keys, model, f"blocks.{i}", f"blocks.{i}")
    for i in range(model.predictor.layers):
        keys.layer(f"{predictor}.convs.{i}", f"{theirs}.decoder.blocks.{i}.0")
    if model.predictor.proj_layers == 1:
        keys.layer(f"{predictor}.proj", f"{theirs}.decoder.proj")
    else:
        keys.layer(f"{predictor}.proj1", f"{theirs}.decoder.proj.0")
        keys.layer(f"{predictor}.proj2", f"{theirs}.decoder.proj.2")
    return keys
