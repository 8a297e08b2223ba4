"""Our configuration of a model that fairseq trained: from its configuration and its tensors' shapes."""

from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.reference_options import (
    Reference,
    Settings,
    Shapes,
    read_ema,
    read_loss,
    read_target,
    require,
)
from d2v_scale.interop.reference_row import ReferenceRow
from d2v_scale.interop.reference_table import recognised
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.teacher_parts import TeacherParts


def from_fairseq(
    settings: Settings, shapes: Shapes, tokens: Settings | None = None, rows_per_micro_batch: int = 1
) -> Reference:
    """From fairseq's model configuration (`cfg.model`). `tokens`: ids of special words (bos, pad, eos, unk, mask).
    `rows_per_micro_batch`: samples times clones on one device, which the weight of its CLS term depends on.

    Raises `CheckpointError` for an option that no published model used and this package does not have.
    """
    row, second = recognised(shapes)
    if second:
        return _second(row, settings, shapes, tokens, rows_per_micro_batch)
    return row.read_first(settings, shapes, tokens)


def _second(row: ReferenceRow, settings: Settings, shapes: Shapes, tokens: Settings | None, rows: int) -> Reference:
    stem = (settings.get("modalities") or {}).get(row.word) or {}
    require(settings, "layer_norm_first", False, None)
    require(settings, "recon_loss", 0, None)
    require(settings, "norm_affine", True, default=True)
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
            input_dropout=stem.get(row.dropout_key, 0.0) or 0.0,
            drop_path=settings.get("end_drop_path_rate", 0.0),
            layer_drop=settings.get("layerdrop", 0.0),
        ),
        predictor=Predictor(
            kind=row.decoder_kind,
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
    row.read_stem(model, stem, shapes, tokens)
    _read_extra_tokens(model, stem)
    objective = ObjectiveConfig(
        masking=_masking(row, stem, clones),
        target=read_target(settings, default_k=12),
        loss=read_loss(settings, width, rows),
        ema=read_ema(settings),
    )
    return Reference(row.kind, model, objective, _parts(row, settings, stem))


def _read_extra_tokens(model: ModelConfig, stem: Settings) -> None:
    [ours] = model.stems.values()
    count = stem.get("num_extra_tokens", ours.usual_extra_tokens)
    if type(count) is not int or count < 0:
        raise CheckpointError(f"the checkpoint was trained with num_extra_tokens={count!r}, which is no count.")
    ours.extra_tokens = None if count == ours.usual_extra_tokens else count


def _masking(row: ReferenceRow, stem: Settings, clones: int) -> MaskingConfig:
    length = stem.get("mask_length", 1)
    return MaskingConfig(
        kind="random" if row.block_masks is None or length == 1 else row.block_masks,
        prob=stem.get("mask_prob", 0.5),
        length=length,
        adjust=stem.get("mask_prob_adjust", 0.0),
        inverse=bool(stem.get("inverse_mask", False)),
        clones=clones,
    )


def _parts(row: ReferenceRow, settings: Settings, stem: Settings) -> TeacherParts:
    features = f"stems.{row.kind}.features"
    if settings.get("ema_encoder_only", True):
        if not row.may_average_blocks_only or stem.get("prenet_depth", 0) or stem.get("num_extra_tokens", 0):
            raise CheckpointError(
                f"a {row.kind} teacher of the main blocks only (ema_encoder_only=True) is not supported where other "
                "layers than the features come before them.",
                "Published speech and vision models average the whole encoder.",
            )
        return TeacherParts(shared=[features])
    if stem.get("ema_local_encoder", row.averages_features):
        return TeacherParts()
    return TeacherParts(shared=[features])
