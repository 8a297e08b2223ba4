"""Our checkpoint in the reference's names and configuration; importing the result gives the same model again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.half import halved, require_half
from d2v_scale.interop.keymap import export_tensors
from d2v_scale.interop.reference_names import reference_keys
from d2v_scale.interop.reference_options import REMEDY, common_settings, require_post_norm
from d2v_scale.interop.reference_row import ReferenceRow, Tensors
from d2v_scale.interop.reference_table import row_of
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.recipe import Recipe


def export_reference(checkpoint: Checkpoint, recipe: Recipe, modality: str, out: Path, half: bool = False) -> list[str]:
    """Write `checkpoint.pt` (fairseq) or `checkpoint.pth` (1.0 vision, data2vec_vision) with student and teacher.
    `half`: in float16.

    Raises `CheckpointError` where the reference has no such model, and then writes nothing.
    """
    row, parts = row_of(recipe.model, modality), recipe.parts()
    model, objective = recipe.model.of(modality), recipe.objective.of(modality)
    make = _second_content if model.visible_only else type(row).first_content
    # First what can be refused.
    if objective.masking.kind == "blocks":
        raise CheckpointError("masks of kind 'blocks' have no name in the reference's configuration.", REMEDY)
    stem = model.stems[modality]
    if not model.visible_only and stem.extra_token_count != stem.usual_extra_tokens:
        raise CheckpointError(
            f"the reference's 1.0 models of {modality} have {stem.usual_extra_tokens} extra tokens, this one has "
            f"{stem.extra_token_count} (model.{modality}.extra_tokens).",
            REMEDY,
        )
    make(row, {}, {}, model, objective, parts)
    keymap = reference_keys(recipe.model, modality)
    keymap.require_all(_its_own(checkpoint, model), "the reference", REMEDY)
    student = dict(export_tensors(keymap, _reader(checkpoint, "student")))
    teacher_names = set(checkpoint.names("teacher"))
    owned = [key for entry in keymap.entries if entry.ours in teacher_names for key in entry.theirs]
    teacher = dict(export_tensors(keymap, _reader(checkpoint, "teacher"), only=owned))
    if half:
        for tensors in (student, teacher):
            require_half(tensors.items())
            tensors |= dict(halved(tensors.items()))
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("checkpoint.pt" if model.visible_only else row.first_file)
    torch.save(make(row, student, teacher, model, objective, parts), path)
    return [f"{len(student)} tensors of the student, {len(teacher)} of the teacher, in the reference's names"]


def _its_own(checkpoint: Checkpoint, model: ModelConfig) -> list[str]:
    """Names of the student's tensors but those of other stems."""
    [name] = model.modalities
    ours, others = (f"stems.{name}.", f"predictors.{model.predictor_name}."), ("stems.", "predictors.")
    return [n for n in checkpoint.names("student") if n.startswith(ours) or not n.startswith(others)]


def _reader(checkpoint: Checkpoint, kind: str) -> Callable[[str], Tensor | None]:
    names = set(checkpoint.names(kind))
    return lambda name: checkpoint.tensor(kind, name) if name in names else None


def _second_content(
    row: ReferenceRow,
    student: Tensors,
    teacher: Tensors,
    model: ModelConfig,
    objective: ObjectiveConfig,
    parts: TeacherParts,
) -> dict[str, Any]:
    blocks_only = not parts.with_predictor and _averages_blocks_only(row, model, parts)
    settings = _second_settings(row, model, objective, parts)
    return row.fairseq_content(student, teacher, "blocks." if blocks_only else "", "_ema", settings, model)


def _averages_blocks_only(row: ReferenceRow, model: ModelConfig, parts: TeacherParts) -> bool:
    """fairseq's `ema_encoder_only`, which published 2.0 text models have."""
    [name] = model.modalities
    shared = f"stems.{name}.features" in parts.shared
    between = model.backbone.prenet_depth or model.stems[name].extra_token_count
    return row.may_average_blocks_only and shared and not between


def fairseq_settings(
    model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts, modality: str
) -> dict[str, Any]:
    """`cfg.model` of a fairseq checkpoint: what decides sizes and computation, without the optimizer's side."""
    row, model, objective = row_of(model, modality), model.of(modality), objective.of(modality)
    settings = _second_settings if model.visible_only else type(row).first_settings
    return settings(row, model, objective, parts)


def _second_settings(
    row: ReferenceRow, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts
) -> dict[str, Any]:
    backbone, predictor, masking = model.backbone, model.predictor, objective.masking
    require_post_norm(model, "2.0")
    [name] = model.modalities
    axes = modalities.of(model, name).axes
    if model.decoder_dimensions(name, axes) != axes:
        raise CheckpointError(f"fairseq's decoder of {name} has {axes} dimensions; this one has 1.", REMEDY)
    stem: dict[str, Any] = {
        "prenet_depth": backbone.prenet_depth,
        "prenet_dropout": backbone.input_dropout,
        "num_extra_tokens": modalities.of(model, name).extra_tokens,
        "mask_noise_std": predictor.noise_std,
        "mask_prob": masking.prob,
        "mask_prob_adjust": masking.adjust,
        "mask_length": masking.length,
        "inverse_mask": masking.inverse,
        "ema_local_encoder": parts.role(f"stems.{name}.features") != "absent",
        "use_alibi_encoder": False,
        "decoder": {
            "decoder_dim": predictor.width,
            "decoder_groups": predictor.groups,
            "decoder_kernel": predictor.kernel,
            "decoder_layers": predictor.layers,
            "decoder_residual": predictor.residual,
            "input_dropout": predictor.input_dropout,
            "projection_layers": predictor.proj_layers,
            "projection_ratio": 2.0,
            "add_positions_masked": False,
            "add_positions_all": False,
        },
    }
    stem |= row.stem_settings(model)
    return {
        "_name": "data2vec_multi",
        **common_settings(objective, backbone.depth),
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.heads,
        "mlp_ratio": backbone.ffn / backbone.width,
        "norm_eps": backbone.norm_eps,
        "norm_affine": True,
        "layer_norm_first": False,
        "encoder_dropout": backbone.dropout,
        "post_mlp_drop": backbone.dropout,
        "attention_dropout": backbone.attention_dropout,
        "activation_dropout": backbone.activation_dropout,
        "end_drop_path_rate": backbone.drop_path,
        "layerdrop": backbone.layer_drop,
        "end_of_block_targets": objective.target.tap == "block",
        "clone_batch": masking.clones,
        "ema_encoder_only": _averages_blocks_only(row, model, parts),
        # The reference sums this term over the rows of a micro-batch; here it is for one row.
        "cls_loss": objective.loss.cls_weight,
        "recon_loss": 0,
        "d2v_loss": 1,
        "modalities": {row.word: stem},
    }
