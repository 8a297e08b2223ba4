"""Modalities: one folder each, and the table of them.

`of(model, name)` is what a stem says of itself (`base.Modality`). The name of a stem is what batches, parameters and
metrics carry; its *kind* decides which class answers.
"""

from typing import TYPE_CHECKING, assert_never

from d2v_scale.modalities.array.modality import Array
from d2v_scale.modalities.base import Modality
from d2v_scale.modalities.paired.modality import Paired
from d2v_scale.modalities.speech.modality import Speech
from d2v_scale.modalities.text.modality import Text
from d2v_scale.modalities.vision.modality import Vision
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import KINDS, Kind, parts_of
from d2v_scale.model.teacher_parts import TeacherParts

if TYPE_CHECKING:
    from d2v_scale.data2vec.targets import Place
    from d2v_scale.model.position_tables import PositionTable

__all__ = [
    "KINDS",
    "Kind",
    "Modality",
    "class_of",
    "of",
    "position_tables",
    "published_parts",
    "stems",
    "target_place",
]


def class_of(kind: Kind) -> type[Modality]:
    """Who answers for stems of this kind: what needs no model."""
    match kind:
        case "vision":
            return Vision
        case "speech":
            return Speech
        case "text":
            return Text
        case "array":
            return Array
    assert_never(kind)


def of(model: ModelConfig, name: str) -> Modality:
    """What the stem `name` of `model` says of itself; of `vision+text` what its samples' parts say together. The
    `model` of a stem has this one alone (`ModelConfig.of`)."""
    if len(names := parts_of(name)) > 1:
        return Paired(model, [of(model, one) for one in names])
    return class_of(model.kind(name))(model.of(name), name)


def stems(model: ModelConfig) -> list[Modality]:
    """All stems of a model, in a fixed order."""
    return [of(model, name) for name in model.modalities]


def position_tables(model: ModelConfig) -> "dict[str, PositionTable]":
    """Tables of positions of all stems, by the parameter's name in the model."""
    return {
        f"stems.{stem.name}.{parameter}": table
        for stem in stems(model)
        for parameter, table in stem.position_tables.items()
    }


def target_place(model: ModelConfig, name: str) -> "Place":
    """What there is to make the targets of the stem `name` from."""
    from d2v_scale.data2vec.targets import Place

    backbone = model.backbone
    return Place(depth=backbone.depth, width=backbone.width, input_width=of(model, name).input_width)


def published_parts(model: ModelConfig) -> TeacherParts:
    """Which parameters the teacher of a published recipe for this kind of model has, and how (spec 1.4)."""
    parts = TeacherParts(with_predictor=any(stem.keeps_predictor for stem in stems(model)))
    for stem in stems(model):
        stem.add_published_parts(parts)
    return parts
