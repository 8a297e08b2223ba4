"""Our checkpoint in the reference's names and configuration; importing the result gives the same model again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.data2vec.targets import TARGETS, Place, build
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.keymap import export_tensors
from d2v_scale.interop.reference_names import reference_keys
from d2v_scale.model.config import Modality, ModelConfig, TeacherParts
from d2v_scale.recipe import Recipe


def export_reference(checkpoint: Checkpoint, recipe: Recipe, modality: Modality, out: Path) -> list[str]:
    """Write `checkpoint.pt` (fairseq) or `checkpoint.pth` (1.0 vision, data2vec_vision) with student and teacher.

    Raises `CheckpointError` where the reference has no such model.
    """
    model, parts, objective = recipe.model, recipe.parts(), recipe.objective.of(modality)
    if objective.masking.kind == "blocks":
        raise CheckpointError(
            "masks of kind 'blocks' have no name in the reference's configuration.",
            "Export the encoder to Hugging Face's format instead.",
        )
    # What the reference has no words for is refused before anything is read or written.
    if modality == "vision" and not model.visible_only:
        settings, loop = data2vec_vision_settings(model, objective)
    else:
        settings, loop = fairseq_settings(model, objective, parts, modality), {}
    keymap = reference_keys(model, modality)
    student = dict(export_tensors(keymap, _reader(checkpoint, "student")))
    teacher_names = set(checkpoint.names("teacher"))
    owned = [key for entry in keymap.entries if entry.ours in teacher_names for key in entry.theirs]
    teacher = dict(export_tensors(keymap, _reader(checkpoint, "teacher"), only=owned))
    if modality == "vision" and not model.visible_only:
        content: dict[str, Any] = {"model": student, "model_settings": settings, "args": loop}
        if teacher:
            content["model_ema"] = teacher
        path = out / "checkpoint.pth"
    else:
        prefix = _teacher_prefix(model, modality, parts)
        if teacher:
            short = {key.removeprefix(prefix): tensor for key, tensor in teacher.items()}
            nested = "encoder._ema" if modality == "text" and not model.visible_only else "_ema"
            content = {"model": {**student, nested: short}}
        else:
            content = {"model": dict(student)}
        content["cfg"] = {"model": settings}
        if model.text is not None:
            stem = model.text
            content["special_words"] = {
                "bos": stem.bos_id,
                "pad": stem.pad_id,
                "eos": stem.eos_id,
                "unk": stem.unk_id,
                "mask": stem.mask_id,
            }
        path = out / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return [f"{len(student)} tensors of the student, {len(teacher)} of the teacher, in the reference's names"]


def _reader(checkpoint: Checkpoint, kind: str) -> Callable[[str], Tensor | None]:
    names = set(checkpoint.names(kind))
    return lambda name: checkpoint.tensor(kind, name) if name in names else None


def _teacher_prefix(model: ModelConfig, modality: Modality, parts: TeacherParts) -> str:
    if parts.with_predictor:
        return ""
    if model.visible_only:
        return "blocks." if _averages_blocks_only(model, parts) else ""
    return "encoder." if modality == "speech" else "encoder.sentence_encoder."


def _averages_blocks_only(model: ModelConfig, parts: TeacherParts) -> bool:
    """fairseq's `ema_encoder_only`, which published 2.0 text models have."""
    return model.modalities == ["text"] and "stems.text.features" in parts.shared and not model.backbone.prenet_depth


def _norm_flags(objective: ObjectiveConfig) -> dict[str, bool]:
    """The reference's flags; it applies them in one fixed order."""
    per_tap = [n for n in objective.target.layer_norm.split("+") if n != "none"]
    final = [n for n in objective.target.final_norm.split("+") if n != "none"]
    renamed = {"across_batch": "instance", "across_batch_and_channels": "group"}
    per_tap, final = [renamed.get(n, n) for n in per_tap], [renamed.get(n, n) for n in final]
    order_tap, order_final = ["batch", "instance", "group", "layer"], ["layer", "instance"]
    if per_tap != [n for n in order_tap if n in per_tap] or final != [n for n in order_final if n in final]:
        raise CheckpointError(
            f"the reference cannot apply norms as {objective.target.layer_norm} / {objective.target.final_norm}."
        )
    flags = {f"{n}_norm_target_layer": n in per_tap for n in order_tap}
    return flags | {f"{n}_norm_targets": n in final for n in order_final}


def _averaged_layers(objective: ObjectiveConfig, depth: int) -> tuple[int, ...]:
    """The blocks whose mean the targets are. Raises CheckpointError for targets of another kind, and for several."""
    target = objective.target
    if objective.further_targets:
        raise CheckpointError(
            f"targets {', '.join(one.called for one in objective.targets)} are several, and the reference's "
            "configuration has one.",
            "Export the encoder to Hugging Face's format instead.",
        )
    if target.kind not in TARGETS or not TARGETS[target.kind].in_reference:
        raise CheckpointError(
            f"targets of kind {target.kind!r} have no name in the reference's configuration, which knows averages of "
            "blocks.",
            "Export the encoder to Hugging Face's format instead.",
        )
    return build(target, Place(depth=depth, width=1, input_width=None)).layers


def _common(objective: ObjectiveConfig, depth: int) -> dict[str, Any]:
    layers = _averaged_layers(objective, depth)
    if layers[-1] != depth - 1 or layers[0] != depth - len(layers):
        raise CheckpointError(f"fairseq averages the last blocks; this model's targets are of blocks {list(layers)}.")
    return {
        **_norm_flags(objective),
        "average_top_k_layers": len(layers),
        "loss_beta": objective.loss.beta,
        "loss_scale": objective.loss.scale,
        "ema_decay": objective.ema.start,
        "ema_end_decay": objective.ema.end,
        "ema_anneal_end_step": objective.ema.anneal_steps,
    }


def fairseq_settings(
    model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts, modality: Modality
) -> dict[str, Any]:
    """`cfg.model` of a fairseq checkpoint: what decides sizes and computation, without the optimizer's side."""
    if model.visible_only:
        return _settings_2(model, objective, parts, modality)
    backbone = model.backbone
    if backbone.norm_first or not backbone.key_bias:
        raise CheckpointError("fairseq's 1.0 models are post-norm with a key bias; this one is not.")
    if modality == "speech":
        assert model.speech is not None
        layers = ", ".join(str(tuple(layer)) for layer in model.speech.conv_layers)
        return {
            "_name": "data2vec_audio",
            **_common(objective, backbone.depth),
            "extractor_mode": "layer_norm",
            "layer_norm_first": False,
            "conv_bias": False,
            "encoder_layers": backbone.depth,
            "encoder_embed_dim": backbone.width,
            "encoder_ffn_embed_dim": backbone.ffn,
            "encoder_attention_heads": backbone.heads,
            "conv_feature_layers": f"[{layers}]",
            "conv_pos": model.speech.pos_conv_kernel * model.speech.pos_conv_depth,
            "conv_pos_groups": model.speech.pos_conv_groups,
            "pos_conv_depth": model.speech.pos_conv_depth,
            "dropout": backbone.dropout,
            "attention_dropout": backbone.attention_dropout,
            "activation_dropout": backbone.activation_dropout,
            "encoder_layerdrop": backbone.layer_drop,
            "mask_prob": objective.masking.prob,
            "mask_length": objective.masking.length,
            "ema_transformer_only": not parts.with_predictor,
            "ema_layers_only": bool(parts.copied),
        }
    assert model.text is not None
    return {
        "_name": "data2vec_text",
        **_common(objective, backbone.depth),
        "max_positions": model.text.max_positions,
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


def _settings_2(
    model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts, modality: Modality
) -> dict[str, Any]:
    backbone, predictor, masking = model.backbone, model.predictor, objective.masking
    if backbone.norm_first:
        raise CheckpointError("fairseq's 2.0 models are post-norm; this one is not.")
    axes = modalities.of(model, modality).axes
    if model.decoder_dimensions(modality, axes) != axes:
        raise CheckpointError(f"fairseq's decoder of {modality} has {axes} dimensions; this one has 1.")
    stem: dict[str, Any] = {
        "prenet_depth": backbone.prenet_depth,
        "prenet_dropout": backbone.input_dropout,
        "num_extra_tokens": 1 if modality == "vision" else 0,
        "mask_noise_std": predictor.noise_std,
        "mask_prob": masking.prob,
        "mask_prob_adjust": masking.adjust,
        "mask_length": masking.length,
        "inverse_mask": masking.inverse,
        "ema_local_encoder": not parts.shared,
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
    if modality == "speech":
        assert model.speech is not None
        layers = ", ".join(str(tuple(layer)) for layer in model.speech.conv_layers)
        alibi = model.speech.alibi
        stem |= {
            "extractor_mode": "layer_norm",
            "feature_encoder_spec": f"[{layers}]",
            "conv_pos_width": model.speech.pos_conv_kernel * model.speech.pos_conv_depth,
            "conv_pos_groups": model.speech.pos_conv_groups,
            "conv_pos_depth": model.speech.pos_conv_depth,
            "conv_pos_pre_ln": False,
            "use_alibi_encoder": alibi,
            "learned_alibi_scale": alibi,
            "learned_alibi_scale_per_head": alibi,
            "learned_alibi_scale_per_layer": False,
            "learned_alibi": False,
        }
    elif modality == "vision":
        assert model.vision is not None
        if not isinstance(model.vision.image_size, int):
            height, width = model.vision.size
            raise CheckpointError(
                f"fairseq's 2.0 models read square images; this one reads {height} x {width} pixels "
                "(model.vision.image_size).",
                "Export the encoder to Hugging Face's format instead.",
            )
        stem |= {
            "input_size": model.vision.image_size,
            "patch_size": model.vision.patch_size,
            "in_chans": model.vision.channels,
            "embed_dim": backbone.width,
            "fixed_positions": True,
        }
    else:
        assert model.text is not None
        stem |= {"max_source_positions": model.text.max_positions, "dropout": backbone.input_dropout}
    return {
        "_name": "data2vec_multi",
        **_common(objective, backbone.depth),
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
        "ema_encoder_only": _averages_blocks_only(model, parts),
        # The reference sums this term over the rows of a micro-batch; here it is for one row.
        "cls_loss": objective.loss.cls_weight,
        "recon_loss": 0,
        "d2v_loss": 1,
        "modalities": {{"speech": "audio", "vision": "image", "text": "text"}[modality]: stem},
    }


def data2vec_vision_settings(model: ModelConfig, objective: ObjectiveConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model arguments and training-loop arguments of data2vec_vision."""
    assert model.vision is not None
    backbone, target = model.backbone, objective.target
    layers = _averaged_layers(objective, backbone.depth)
    if (
        target.tap != "block"
        or target.layer_norm not in ("layer", "none")
        or target.final_norm not in ("layer", "none")
    ):
        raise CheckpointError("data2vec_vision has no such targets; they are block outputs with layer norms there.")
    settings = {
        "img_size": model.vision.image_size,
        "patch_size": model.vision.patch_size,
        "in_chans": model.vision.channels,
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.heads,
        "mlp_ratio": backbone.ffn / backbone.width,
        "qkv_bias": True,
        "drop_rate": backbone.dropout,
        "attn_drop_rate": backbone.attention_dropout,
        "drop_path_rate": backbone.drop_path,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "init_values": backbone.layer_scale,
    }
    loop = {
        "target_layers": list(layers),
        "layer_results": "end",
        "target_layer_norm_last": target.layer_norm == "layer",
        "post_target_layer_norm": target.final_norm == "layer",
        "l2_loss": objective.loss.beta == 0,
        "l1_beta": objective.loss.beta,
        "loss_scale": -1 if objective.loss.scale is None else objective.loss.scale,
        "ema_decay_init": objective.ema.start,
        "ema_decay": objective.ema.end,
        "ema_start_at": objective.ema.anneal_steps,
        "norm_eps": backbone.norm_eps,
        "num_mask_patches": objective.masking.target_count,
        "min_mask_patches_per_block": objective.masking.min_block,
    }
    return settings, loop
