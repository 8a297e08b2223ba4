"""Our configuration of a model that the reference code trained: from its configuration and its tensors' shapes."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2v_scale.data2vec.config import EmaConfig, LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import (
    Backbone,
    Modality,
    ModelConfig,
    Predictor,
    SpeechStem,
    TeacherParts,
    TextStem,
    VisionStem,
)

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]

_WAV2VEC_CONVS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


@dataclass
class Reference:
    """One reference model in our terms."""

    modality: Modality
    model: ModelConfig
    objective: ObjectiveConfig
    parts: TeacherParts


def modality_of(keys: Settings | Shapes) -> tuple[Modality, bool]:
    """(modality, whether it is a 2.0 model) of a reference state dict. Raises `CheckpointError` if it is neither."""
    marks: list[tuple[str, Modality, bool]] = [
        ("modality_encoders.AUDIO.", "speech", True),
        ("modality_encoders.IMAGE.", "vision", True),
        ("modality_encoders.TEXT.", "text", True),
        ("encoder.sentence_encoder.", "text", False),
        ("feature_extractor.conv_layers.", "speech", False),
        ("patch_embed.", "vision", False),
    ]
    found = [(modality, second) for prefix, modality, second in marks if any(k.startswith(prefix) for k in keys)]
    if len(found) != 1:
        listing = ", ".join(list(keys)[:8])
        which = "several architectures" if found else "no data2vec architecture"
        raise CheckpointError(
            f"the keys belong to {which}: {listing}, ... ({len(keys)} keys).",
            "Known are fairseq data2vec 1.0 (speech, text) and 2.0, data2vec_vision, and Hugging Face Data2Vec.",
        )
    return found[0]


def from_fairseq(
    settings: Settings, shapes: Shapes, tokens: Settings | None = None, rows_per_micro_batch: int = 1
) -> Reference:
    """From fairseq's model configuration (`cfg.model`). `tokens`: ids of special words (bos, pad, eos, unk, mask).
    `rows_per_micro_batch`: samples times clones on one device, which the weight of its CLS term depends on.

    Raises `CheckpointError` for an option that no published model used and this package does not have.
    """
    modality, second = modality_of(shapes)
    if second:
        return _fairseq_2(modality, settings, shapes, tokens, rows_per_micro_batch)
    return _speech_1(settings) if modality == "speech" else _text_1(settings, shapes, tokens)


def require(settings: Settings, key: str, *allowed: Any, default: Any = None) -> None:
    """Raises `CheckpointError` for a setting that is not one of `allowed`."""
    value = settings.get(key, default)
    if value not in allowed:
        raise CheckpointError(
            f"the checkpoint was trained with {key}={value!r}, which is not supported.",
            f"Supported: {', '.join(map(repr, allowed))}.",
        )


def _norms(settings: Settings, *, across_batch: bool) -> tuple[str, str]:
    """The reference's flags as `layer_norm` and `final_norm`, in the order in which it applies them."""
    per_tap = [n for n in ("batch", "instance", "group", "layer") if settings.get(f"{n}_norm_target_layer")]
    final = [n for n in ("layer", "instance") if settings.get(f"{n}_norm_targets")]
    if across_batch and not set(per_tap) & {"batch", "instance"}:
        # fairseq 1.0 speech keeps taps time-major here, so these norms run over the batch instead of over time.
        per_tap = ["across_batch_and_channels" if n == "group" else n for n in per_tap]
        final = ["across_batch" if n == "instance" else n for n in final]
    return "+".join(per_tap) or "none", "+".join(final) or "none"


def _target(settings: Settings, *, default_k: int, across_batch: bool = False) -> TargetConfig:
    layer_norm, final_norm = _norms(settings, across_batch=across_batch)
    return TargetConfig(
        tap="block" if settings.get("end_of_block_targets") else "ffn",
        top_k_layers=settings.get("average_top_k_layers", default_k),
        layer_norm=layer_norm,
        final_norm=final_norm,
    )


def _ema(settings: Settings) -> EmaConfig:
    start = settings.get("ema_decay", 0.999)
    end = settings.get("ema_end_decay", start)
    return EmaConfig(start=start, end=end, anneal_steps=int(settings.get("ema_anneal_end_step") or 0))


def _loss(settings: Settings, width: int, rows: int = 1) -> LossConfig:
    d2v_weight = float(settings.get("d2v_loss", 1))
    scale = settings.get("loss_scale")
    if scale is not None and scale <= 0:
        scale = None
    factor = scale if scale is not None else width**-0.5
    return LossConfig(
        beta=float(settings.get("loss_beta") or 0),
        scale=scale if d2v_weight == 1 else factor * d2v_weight,
        # The reference sums the CLS term over the rows of a micro-batch.
        cls_weight=float(settings.get("cls_loss") or 0) * rows / d2v_weight,
    )


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """fairseq's "[(512, 10, 5)] + [(512, 3, 2)] * 4": lists, tuples, numbers, + and *; nothing else is evaluated."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.List(elts=elements):
                return [value(e) for e in elements]
            case ast.Tuple(elts=elements):
                return tuple(value(e) for e in elements)
            case ast.Constant(value=int() as number):
                return number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise CheckpointError(f"conv_feature_layers {text!r} is not a list of (channels, kernel, stride).")

    try:
        layers = value(ast.parse(text, mode="eval"))
    except (SyntaxError, TypeError) as error:
        raise CheckpointError(f"conv_feature_layers {text!r} cannot be read: {error}.") from error
    return [(channels, kernel, stride) for channels, kernel, stride in layers]


def _speech_1(settings: Settings) -> Reference:
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
        target=_target(settings, default_k=8, across_batch=True),
        loss=_loss(settings, width),
        ema=_ema(settings),
    )
    return Reference("speech", model, objective, parts)


def _text_stem(table: str, places: str, shapes: Shapes, longest: int, tokens: Settings | None) -> TextStem:
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


def _text_1(settings: Settings, shapes: Shapes, tokens: Settings | None) -> Reference:
    transformer = settings.get("transformer") or {}
    encoder = transformer.get("encoder") or {}
    require(encoder, "normalize_before", False, None)
    require(settings, "head_layers", 1, 2, default=1)
    width = encoder.get("embed_dim", 768)
    prefix = "encoder.sentence_encoder"
    model = ModelConfig(
        text=_text_stem(
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
        target=_target(settings, default_k=8),
        loss=_loss(settings, width),
        ema=_ema(settings),
    )
    return Reference("text", model, objective, parts)


def _fairseq_2(modality: Modality, settings: Settings, shapes: Shapes, tokens: Settings | None, rows: int) -> Reference:
    stem = (settings.get("modalities") or {}).get(
        {"speech": "audio", "vision": "image", "text": "text"}[modality]
    ) or {}
    require(settings, "layer_norm_first", False, None)
    require(settings, "recon_loss", 0, None)
    require(settings, "norm_affine", True, default=True)
    require(stem, "num_extra_tokens", 1 if modality == "vision" else 0, default=1 if modality == "vision" else 0)
    require(stem, "keep_masked_pct", 0, None)
    width = settings.get("embed_dim", 768)
    decoder = stem.get("decoder") or {}
    require(decoder, "add_positions_all", False, None)
    require(decoder, "add_positions_masked", False, None)
    require(decoder, "projection_layers", 1, 2, default=1)
    require(decoder, "projection_ratio", 2.0, default=2.0)
    clones = settings.get("clone_batch", 1)
    model = ModelConfig(
        visible_only=True,
        backbone=Backbone(
            width=width,
            heads=settings.get("num_heads", 12),
            ffn=int(width * settings.get("mlp_ratio", 4)),
            depth=settings.get("depth", 12),
            prenet_depth=stem.get("prenet_depth", 0),
            norm_eps=settings.get("norm_eps", 1e-5),
            # fairseq has the block's dropouts as `encoder_dropout` after attention and `post_mlp_drop` after the FFN.
            dropout=settings.get("post_mlp_drop", 0.0),
            attention_dropout=settings.get("attention_dropout", 0.0),
            activation_dropout=settings.get("activation_dropout", 0.0),
            input_dropout=stem.get("dropout" if modality == "text" else "prenet_dropout", 0.0) or 0.0,
            drop_path=settings.get("end_drop_path_rate", 0.0),
            layer_drop=settings.get("layerdrop", 0.0),
        ),
        predictor=Predictor(
            kind="conv2d" if modality == "vision" else "conv1d",
            width=decoder.get("decoder_dim", 384),
            kernel=decoder.get("decoder_kernel", 5),
            groups=decoder.get("decoder_groups", 16),
            layers=decoder.get("decoder_layers", 5),
            residual=decoder.get("decoder_residual", True),
            proj_layers=decoder.get("projection_layers", 1),
            input_dropout=decoder.get("input_dropout", 0.0),
            noise_std=stem.get("mask_noise_std", 0.01),
        ),
    )
    if modality == "speech":
        model.speech = _speech_stem_2(stem)
    elif modality == "vision":
        require(stem, "fixed_positions", True, default=True)
        require(stem, "use_alibi_encoder", False, None)
        require(stem, "transformer_decoder", False, None)
        require(stem, "in_chans", *range(1, 17), default=3)
        model.vision = VisionStem(
            image_size=stem.get("input_size", 224),
            patch_size=stem.get("patch_size", 16),
            channels=stem.get("in_chans", 3),
            positions="sincos",
        )
    else:
        require(stem, "use_alibi_encoder", False, None)
        prefix = "modality_encoders.TEXT.local_encoder"
        longest = stem.get("max_source_positions", 512)
        model.text = _text_stem(
            f"{prefix}.embed_tokens.weight", f"{prefix}.embed_positions.weight", shapes, longest, tokens
        )
    objective = ObjectiveConfig(
        masking=_masking_2(modality, stem, clones),
        target=_target(settings, default_k=12),
        loss=_loss(settings, width, rows),
        ema=_ema(settings),
    )
    return Reference(modality, model, objective, _parts_2(modality, settings, stem))


def _speech_stem_2(stem: Settings) -> SpeechStem:
    require(stem, "extractor_mode", "layer_norm", default="layer_norm")
    require(stem, "conv_pos_pre_ln", False, None)
    alibi = bool(stem.get("use_alibi_encoder", False))
    if alibi:
        require(stem, "learned_alibi_scale", True)
        require(stem, "learned_alibi_scale_per_head", True)
        require(stem, "learned_alibi_scale_per_layer", False, None)
        require(stem, "learned_alibi", False, None)
    depth = stem.get("conv_pos_depth", 5)
    return SpeechStem(
        conv_layers=parse_conv_layers(stem.get("feature_encoder_spec") or _WAV2VEC_CONVS),
        pos_conv_depth=depth,
        pos_conv_kernel=max(3, stem.get("conv_pos_width", 95) // depth),
        pos_conv_groups=stem.get("conv_pos_groups", 16),
        alibi=alibi,
    )


def _masking_2(modality: Modality, stem: Settings, clones: int) -> MaskingConfig:
    length = stem.get("mask_length", 1)
    blocks = "block2d" if modality == "vision" else "block1d"
    return MaskingConfig(
        kind="random" if modality == "text" or length == 1 else blocks,  # type: ignore[arg-type]
        prob=stem.get("mask_prob", 0.5),
        length=length,
        adjust=stem.get("mask_prob_adjust", 0.0),
        inverse=bool(stem.get("inverse_mask", False)),
        clones=clones,
    )


def _parts_2(modality: Modality, settings: Settings, stem: Settings) -> TeacherParts:
    if settings.get("ema_encoder_only", True):
        if modality != "text" or stem.get("prenet_depth", 0):
            raise CheckpointError(
                f"a {modality} teacher of the main blocks only (ema_encoder_only=True) is not supported.",
                "Published speech and vision models average the whole encoder.",
            )
        return TeacherParts(shared=["stems.text.features"])
    if stem.get("ema_local_encoder", modality == "vision"):
        return TeacherParts()
    return TeacherParts(shared=[f"stems.{modality}.features"])
