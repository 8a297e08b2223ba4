"""Small models of several stems that share a backbone, 1.0 and 2.0, and micro-batches of their steps."""

import dataclasses

import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.own import OwnLoss, OwnMasking, OwnObjective, OwnTarget
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import OwnPredictor

STEMS: dict[str, tuple[str, ...]] = {
    "v1_pair": ("v1_speech", "v1_text"),
    "v1_triple": ("v1_vision", "v1_text", "v1_series"),
    "v2_pair": ("v2_vision", "v2_maps"),
    "v2_triple": ("v2_vision", "v2_speech", "v2_text"),
    "v2_shared": ("v2_speech", "v2_text", "v2_cubes"),
    "v2_states": ("v2_text", "v2_vision"),
}
"""By name of the mixture: names of `tiny_models` whose stems it has."""
NAMES = tuple(STEMS)
WEIGHTS = (1.0, 2.0, 0.5)
"""Of the sources, one a stem."""
FURTHER = [TargetConfig(kind="codes", weight=0.5, top_k_layers=2, options={"codes": 8})]


def model(name: str) -> ModelConfig:
    depth, drop = 4, 0.2
    post = Backbone(**{**tiny_models.POST, "depth": depth, "drop_path": drop})  # type: ignore[arg-type]
    pre = Backbone(**{**tiny_models.PRE, "depth": depth, "drop_path": drop})  # type: ignore[arg-type]
    match name:
        case "v1_pair":
            return ModelConfig(speech=tiny_models.speech(), text=tiny_models.text(), backbone=post)
        case "v1_triple":
            return ModelConfig(
                vision=tiny_models.vision("relative"),
                text=tiny_models.text(),
                arrays={"series": tiny_models.arrays("series")},
                backbone=pre,
                init="beit",
                predictor=Predictor(kind="mlp"),
            )
        case "v2_pair":
            images = tiny_models.vision("sincos")
            images.extra_tokens, images.prenet_depth = 1, 1
            images.predictor = OwnPredictor(kind="conv2d", width=16, kernel=3, layers=1)
            maps = tiny_models.arrays("maps")
            maps.extra_tokens = 0
            return ModelConfig(
                visible_only=True,
                vision=images,
                arrays={"maps": maps},
                backbone=post,
                predictor=tiny_models.decoder("conv"),
            )
        case "v2_triple":
            found = tiny_models.joint()
            assert found.speech is not None
            found.speech.input_dropout = 0.0  # which a rank draws for itself
        case "v2_shared":
            return ModelConfig(
                visible_only=True,
                speech=tiny_models.speech(alibi=True),
                text=tiny_models.text(),
                arrays={"cubes": tiny_models.arrays("cubes")},
                backbone=post,
                predictor=tiny_models.decoder("conv1d", shared=True),
            )
        case "v2_states":
            return ModelConfig(
                visible_only=True,
                vision=tiny_models.vision("sincos"),
                text=tiny_models.text(),
                backbone=post,
                predictor=tiny_models.decoder("conv1d"),
            )
        case _:
            raise KeyError(name)
    found.backbone = dataclasses.replace(found.backbone, depth=depth, drop_path=drop)
    return found


def objective(name: str) -> ObjectiveConfig:
    """Clones, masks, targets and losses differ between the stems of `v2_pair` and `v2_triple`; one of `v2_pair` has a
    CLS term, those of `v2_states` two targets, of which one has a state."""
    found = ObjectiveConfig(
        masking=MaskingConfig(kind="random", clones=2 if name.startswith("v2") else 1),
        target=dataclasses.replace(tiny_models.TAPS, top_k_layers=3),
    )
    if name == "v2_pair":
        found.vision = OwnObjective(masking=OwnMasking(clones=3), loss=OwnLoss(cls_weight=0.5))
        found.arrays = {"maps": OwnObjective(masking=OwnMasking(clones=1), target=OwnTarget(top_k_layers=1))}
    if name == "v2_triple":
        found.vision = OwnObjective(masking=OwnMasking(clones=4), target=OwnTarget(top_k_layers=1))
        found.text = OwnObjective(loss=OwnLoss(beta=1.0, weight=0.5))
    if name == "v2_states":
        found.further_targets = FURTHER
        found.loss = LossConfig(reduction="mean_channels")
    return found


def weights(name: str) -> dict[str, float]:
    """By source."""
    return {tiny_models.modality_of(stem): weight for stem, weight in zip(STEMS[name], WEIGHTS, strict=False)}


def parts(name: str, number: int, samples: int, shares: int, seed: int) -> list[Batch]:
    """`shares` micro-batches of the source `number`, which together have `samples`; the more masked, the greater
    `number`."""
    stem = STEMS[name][number]
    modality = tiny_models.modality_of(stem)
    clones = objective(name).of(modality).masking.clones
    whole = tiny_models.batch(stem, samples, clones, "vision" not in stem, seed)
    masked_rt = whole.masked_rt.clone()
    for row in masked_rt:
        row[row.nonzero().squeeze(1)[: 2 - number]] = False
    each = samples // shares
    made = model(name).stems[modality]
    found = []
    for part in range(shares):
        of_samples = slice(part * each, (part + 1) * each)
        cut = {
            field: None if value is None else value[of_samples]
            for field in ("inputs", "valid", "real_bt", "student_inputs", "sample_ids")
            if isinstance(value := getattr(whole, field), torch.Tensor | None)
        }
        found.append(
            dataclasses.replace(
                whole,
                **cut,  # type: ignore[arg-type]
                masked_rt=masked_rt[part * each * clones : (part + 1) * each * clones],
                extra_tokens=made.extra_token_count,
                source=modality,
                layout=None,  # type: ignore[arg-type]
            )
        )
    return found
