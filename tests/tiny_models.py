"""One small model of every kind, and batches for it."""

import dataclasses
import math

import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch, Layout
from d2v_scale.data.paired import joined, with_queries
from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.modalities.costs import Lengths
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.init import InitRule
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem, OwnPredictor, SpeechStem, TextStem, VisionStem

CONVS = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
WAVE = 6400
GRID = 4

POST = {"width": 32, "heads": 4, "ffn": 64, "depth": 3}
PRE = {**POST, "norm_first": True, "norm_eps": 1e-6, "key_bias": False, "layer_scale": 0.1, "final_norm": True}

JITTER = InitRule("normal", 0.1)

TAPS = TargetConfig(tap="ffn", top_k_layers=2, layer_norm="instance")


def speech(**options: object) -> SpeechStem:
    return SpeechStem(conv_layers=CONVS, pos_conv_groups=4, **options)  # type: ignore[arg-type]


def text() -> TextStem:
    return TextStem(vocab_size=40, max_positions=24, mask_id=39)


def vision(positions: str) -> VisionStem:
    return VisionStem(image_size=4 * GRID, patch_size=4, positions=positions)  # type: ignore[arg-type]


def arrays(name: str) -> ArrayStem:
    """Of one axis, two, or three."""
    line = ArrayAxis(patch=4, extent=80)
    match name:
        case "series":
            return ArrayStem(channels=2, axes={"time": line}, positions="learned")
        case "maps":
            return ArrayStem(channels=2, axes={"band": ArrayAxis(patch=2, extent=8), "time": line}, extra_tokens=2)
        case "cubes":
            side = ArrayAxis(patch=2, extent=6)
            return ArrayStem(channels=1, axes={"time": ArrayAxis(patch=3, extent=9), "height": side, "width": side})
    raise KeyError(name)


def decoder(kind: str, **options: object) -> Predictor:
    return Predictor(kind=kind, width=32, kernel=3, groups=4, layers=2, **options)  # type: ignore[arg-type]


def model(name: str, **backbone: object) -> ModelConfig:
    """`v1_vision` ... `v2_text`, or one of `WIDE`; `+2` behind it: with so many extra tokens. Keyword arguments go to
    the backbone."""
    if "+" in name:
        name, _, tokens = name.partition("+")
        config = model(name, **backbone)
        [stem] = config.stems.values()
        stem.extra_tokens = int(tokens)
        return config
    if name in WIDE:
        config = model(name.removesuffix("_wide"), **backbone)
        assert config.vision is not None
        config.vision.image_size = (4 * GRID, 4 * (GRID + 2))
        return config
    post = Backbone(**{**POST, **backbone})  # type: ignore[arg-type]
    pre = Backbone(**{**PRE, **backbone})  # type: ignore[arg-type]
    match name:
        case "v1_pair" | "v2_pair":
            return paired(name.removesuffix("_pair"), **backbone)
        case "v1_vision":
            return ModelConfig(vision=vision("relative"), backbone=pre, init="beit")
        case "v1_speech":
            return ModelConfig(speech=speech(), backbone=post)
        case "v1_text":
            return ModelConfig(text=text(), backbone=post, predictor=Predictor(kind="mlp"))
        case "v2_vision":
            post.prenet_depth = 1
            return ModelConfig(visible_only=True, vision=vision("sincos"), backbone=post, predictor=decoder("conv2d"))
        case "v2_speech":
            return ModelConfig(visible_only=True, speech=speech(alibi=True), backbone=post, predictor=decoder("conv1d"))
        case "v2_text":
            predictor = decoder("conv1d", proj_layers=2, residual=False)
            return ModelConfig(visible_only=True, text=text(), backbone=post, predictor=predictor)
        case "v1_series":
            return ModelConfig(arrays={"series": arrays("series")}, backbone=pre, init="beit")
        case "v2_maps" | "v2_cubes":
            stems = {name.removeprefix("v2_"): arrays(name.removeprefix("v2_"))}
            return ModelConfig(visible_only=True, arrays=stems, backbone=post, predictor=decoder("conv"))
    raise KeyError(name)


def joint(**predictor: object) -> ModelConfig:
    """Three stems that differ in prenet, dropout and decoder."""
    images, recordings = vision("sincos"), speech(alibi=True)
    if not predictor.get("shared"):
        images.predictor = OwnPredictor(kind="conv2d", width=16, kernel=3, final_norm=True)
    images.prenet_depth, recordings.input_dropout = 2, 0.1
    return ModelConfig(
        visible_only=True,
        vision=images,
        speech=recordings,
        text=text(),
        backbone=Backbone(**{**POST, "prenet_depth": 1}),  # type: ignore[arg-type]
        predictor=dataclasses.replace(decoder("conv1d"), **predictor),  # type: ignore[arg-type]
    )


def paired(version: str, **backbone: object) -> ModelConfig:
    """Stems of images, recordings and texts whose samples may be parts of paired ones, of 1.0 (`v1`) or 2.0 (`v2`)."""
    images, recordings, texts = vision("relative" if version == "v1" else "sincos"), speech(), text()
    for stem in (images, recordings, texts):
        stem.paired = True
    if version == "v2":
        recordings.alibi = True
        images.predictor = OwnPredictor(kind="conv2d")
    return ModelConfig(
        visible_only=version == "v2",
        vision=images,
        speech=recordings,
        text=texts,
        backbone=Backbone(**{**POST, "prenet_depth": 1, **backbone}),  # type: ignore[arg-type]
        predictor=decoder("conv1d") if version == "v2" else Predictor(),
    )


NAMES = ("v1_vision", "v1_speech", "v1_text", "v2_vision", "v2_speech", "v2_text")
WIDE = ("v1_vision_wide", "v2_vision_wide")
"""Of images that are no squares."""
PAIRS = ("v1_pair", "v2_pair")
"""Of samples of three parts."""
ARRAYS = ("v1_series", "v2_maps", "v2_cubes")
"""Of arrays along one axis, two and three."""


def modality_of(name: str) -> str:
    return "vision+speech+text" if name in PAIRS else name.partition("+")[0].split("_")[1]


def target_of(name: str) -> TargetConfig:
    if name.startswith("v1_vision"):
        return TargetConfig(tap="block", top_k_layers=2, layer_norm="layer", final_norm="layer")
    return TAPS


def batch(name: str, samples: int = 3, clones: int = 1, padded: bool = False, seed: int = 0) -> Batch:
    """Random inputs; every row of a 2.0 batch masks the same number of positions, rows of a 1.0 batch do not."""
    if name in PAIRS:
        return paired_batch(name.removesuffix("_pair"), samples, clones, seed)
    generator = torch.Generator().manual_seed(seed)
    modality = modality_of(name)
    valid: Tensor | None = None
    student_inputs: Tensor | None = None
    stem = modalities.of(model(name), modality)
    if modality == "vision":
        assert stem.fixed_grid is not None
        height, width = stem.fixed_grid
        length = height * width
        inputs = torch.randn(samples, 3, 4 * height, 4 * width, generator=generator)
    elif stem.fixed_grid is not None:
        length = math.prod(stem.fixed_grid)
        inputs = stem.noise(samples, 0, generator)
        if padded:
            valid = torch.arange(length)[None] < torch.tensor([length - 4 * (i % 4) for i in range(samples)])[:, None]
    elif modality == "speech":
        length = 19
        inputs = torch.randn(samples, WAVE, generator=generator)
        if padded:
            valid = torch.arange(WAVE)[None] < torch.tensor([WAVE - 900 * (i % 4) for i in range(samples)])[:, None]
            inputs = inputs * valid
    else:
        length = 20
        inputs = torch.randint(4, 39, (samples, length), generator=generator)
        if padded:
            valid = torch.arange(length)[None] < torch.tensor([length - 4 * (i % 4) for i in range(samples)])[:, None]
            inputs = torch.where(valid, inputs, 1)
    rows = samples * clones
    ragged = name.startswith("v1")
    masked = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        count = 5 + row % 3 if ragged else 8
        masked[row, torch.randperm(length if valid is None else length // 2, generator=generator)[:count]] = True
        if name in ARRAYS and valid is not None and not ragged:  # of padding, too, which nobody predicts
            masked[row, -1] = True
            masked[row, masked[row].nonzero()[0]] = False
    if name.startswith("v1_text"):
        student_inputs = torch.where(masked[::clones], 39, inputs)
    return Batch(
        modality=modality,
        inputs=inputs,
        valid=valid,
        masked_rt=masked,
        student_inputs=student_inputs,
        sample_ids=torch.arange(samples) + 100,
        grid=stem.fixed_grid if stem.fixed_grid is not None and stem.axes > 1 else (),
        extra_tokens=stem.extra_tokens,
        real_bt=valid if name in ARRAYS else None,
    )


def paired_batch(version: str, samples: int, clones: int, seed: int) -> Batch:
    """Of every four samples the second has no recording and the third no image; the text of the first's first row is
    hidden, and the image of the fourth's last."""
    parts = []
    for number, stem in enumerate(("vision", "speech", "text")):
        part = batch(f"{version}_{stem}", samples, clones, padded=stem != "vision", seed=seed + number)
        present_b = torch.arange(samples) % 4 != {"vision": 2, "speech": 1}.get(stem, -1)
        hidden_r = torch.zeros(samples * clones, dtype=torch.bool)
        hidden_r[{"text": 0, "vision": 4 * clones - 1}.get(stem, 0) :: 4 * clones] = stem != "speech"
        parts.append(part_of_pairs(part, present_b, hidden_r))
    return joined(tuple(parts), "vision+speech+text", source="pairs")


def whole_batch(name: str, samples: int, clones: int) -> Batch:
    """Of samples that have all their parts, of which none is hidden or padded."""
    if name not in PAIRS:
        return batch(name, samples, clones)
    parts = [batch(f"{name[:2]}_{stem}", samples, clones) for stem in ("vision", "speech", "text")]
    return joined(tuple(parts), "vision+speech+text", source="pairs")


def lengths_of(model: ModelConfig, batch: Batch) -> Lengths:
    """Of the samples of a batch, on which costs are counted."""
    if batch.parts:
        return Lengths.together({part.modality: lengths_of(model, part) for part in batch.parts})
    rows, length = batch.masked_rt.shape
    masked = float(batch.masked_rt.sum()) / rows
    return Lengths(
        inputs=batch.inputs.shape[-1],
        grid=batch.extents,
        kept=length - round(masked) if model.visible_only else length,
        masked=masked,
        extra=batch.extra_tokens,
        clones=batch.clones,
    )


def part_of_pairs(part: Batch, present_b: Tensor, hidden_r: Tensor) -> Batch:
    """A batch of one stem as a part that these samples have, hidden in these rows."""
    stem = modalities.of(paired("v2"), part.modality)
    real_bt = present_b[:, None].expand(-1, part.masked_rt.shape[1]).clone()
    if part.valid is not None:
        lengths_b = part.valid.sum(dim=1)
        frames_b = lengths_b if part.modality == "text" else stem.stem.frames_of(lengths_b)  # type: ignore[attr-defined]
        real_bt &= torch.arange(real_bt.shape[1]) < frames_b[:, None]
    real_rt = real_bt.repeat_interleave(part.clones, dim=0)
    hidden_r = hidden_r & present_b.repeat_interleave(part.clones)
    if part.layout.visible_rs is None:
        masked_rt = (part.masked_rt | hidden_r[:, None]) & real_rt
        layout = Layout.of(masked_rt, real_bt)
    else:
        masked_rt = part.masked_rt | (hidden_r[:, None] & real_rt)
        layout = with_queries(part.masked_rt, hidden_r, real_bt)
    return dataclasses.replace(
        part,
        source=f"pairs/{part.modality}",
        masked_rt=masked_rt,
        real_bt=real_bt,
        present_b=present_b,
        absent=int((~present_b).sum()),
        hidden_r=hidden_r,
        layout=layout,
    )
