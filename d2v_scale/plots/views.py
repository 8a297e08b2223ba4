"""Looking inside: what of a sample its representation rests on, and how far modalities lie apart, layer by layer. Each
beside an encoder of the same shape that was not trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from d2v_scale.alignment import models
from d2v_scale.alignment.concepts import read_set
from d2v_scale.alignment.features import StemSamples, averaged, encoded, kind_of
from d2v_scale.alignment.measures import modality_gap, own_neighbours
from d2v_scale.batch import Batch
from d2v_scale.errors import UserError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.evaluation.occlusion import importance, require_subsets
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.plots.drawing import Sample
from d2v_scale.plots.samples import grid_figure, log_spectrogram, save, show, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 6
"""Samples of a stem that are looked into."""
_SEED_OF_RANDOM = 1


@dataclass
class _Stem:
    samples: StemSamples
    piece: Callable[[int], str] | None
    """The text of a token."""


def draw_views(run: Path, data: str | None, samples: int, modality: str | None = None) -> tuple[list[Path], list[str]]:
    """Draw into the run's plots folder; returns the files, and what could not be drawn and why. Raises UserError where
    that is everything.

    `data`: shards, of several members a sample where the run has several stems; None: the recipe's evaluation.test or
    held_out. `samples`: of each stem, for the separation of modalities. `modality`: this stem alone.
    """
    source = open_encoder(run)
    recipe = source.recipe
    stems = recipe.model.modalities if modality is None else [modality]
    if unknown := [stem for stem in stems if stem not in recipe.model.modalities]:
        raise UserError(f"{run} has no stem {unknown[0]!r}.", f"Give one of {', '.join(recipe.model.modalities)}.")
    own = {stem: recipe.evaluation.of(stem) for stem in stems}
    shards = {stem: named for stem, one in own.items() if (named := data or one.test or one.held_out)}
    if not shards:
        raise UserError("The recipe names no held-out shards.", "Give some with --data.")
    other = replace(source, recipe=replace(recipe, seed=recipe.seed + _SEED_OF_RANDOM))
    encoders = {"trained": models.built(source, "teacher"), "random": models.built(other, "random")}
    read = _read(source, encoders["trained"], shards, samples)
    paths: list[Path] = []
    without = [f"{shards[stem]} holds no sample for the stem {stem!r}." for stem in shards if stem not in read]
    without += [f"The recipe names no held-out shards for the stem {stem!r}." for stem in stems if stem not in shards]
    try:
        require_subsets(encoders["trained"])
        for stem, found in read.items():
            paths.append(_draw_occlusion(run / "plots" / f"occlusion_{stem}.png", encoders, found))
    except UserError as error:
        without.append(str(error))
    if len(read) > 1:
        paths.append(_draw_separation(run / "plots" / "separation.png", encoders, read))
    elif len(stems) > 1:
        without.append("How far modalities lie apart cannot be told of one: give shards with several members.")
    if not paths:
        raise UserError(" ".join(without))
    return paths, without


def _read(source: EncoderSource, encoder: FrozenEncoder, shards: Mapping[str, str], most: int) -> dict[str, _Stem]:
    """Of every stem that its shards have samples for, at most so many, evenly spaced."""
    kinds = {stem: kind_of(encoder, stem) for stem in shards}
    # Shards of several stems are read once.
    contents = {one: [kinds[stem].content for stem in shards if shards[stem] == one] for one in shards.values()}
    sets = {one: read_set(one, held, "key", None) for one, held in contents.items()}
    found = {}
    for stem, kind in kinds.items():
        whole = sets[shards[stem]]
        there = [place for place in whole.places if kind.content in place.digests]
        chosen = np.unique(np.linspace(0, len(there) - 1, min(most, len(there))).round().astype(int)).tolist()
        if there:
            some = replace(whole, places=[there[number] for number in chosen])
            tokenizer = models.tokenizer_of(source, kind, some, None)
            decoder = kind.build_decoder(source.recipe.data, tokenizer)
            piece = None if tokenizer is None else open_tokenizer(tokenizer).piece
            found[stem] = _Stem(StemSamples(some, kind, decoder, None, 32), piece)
    return found


def _draw_occlusion(path: Path, encoders: Mapping[str, FrozenEncoder], stem: _Stem) -> Path:
    """A row a sample: the sample, then what both encoders' representations rest on, the brighter the more."""
    kind = stem.samples.kind
    batch = stem.samples.first(SAMPLES)
    if batch is None:
        raise UserError(f"No sample of the stem {kind.name!r} can be read.")
    heats = [importance(encoder, batch).numpy() for encoder in encoders.values()]
    rows, flat = len(batch.keys), len(batch.extents) > 1
    figure = grid_figure(rows, 1 + len(heats), side=1.7) if flat else grid_figure(2 * rows, 1, side=0.8, width=11)
    drawing = kind.build_drawing()
    for row in range(rows):
        sample = drawing.sample(batch, row, None)
        scaled = [_scaled(each[row]) for each in heats]
        if flat:
            for column, image in enumerate([_image(sample), *(_plane(each, batch.extents) for each in scaled)]):
                axes = figure.add_subplot(rows, 1 + len(heats), row * (1 + len(heats)) + column + 1)
                show(axes, image) if column == 0 else _heat(axes, image)
                if row == 0 and column:
                    axes.set_title(list(encoders)[column - 1], fontsize=8)
        else:
            if not isinstance(sample, str):
                _draw_line(figure.add_subplot(2 * rows, 1, 2 * row + 1), sample)
            real_t = ~np.isnan(heats[0][row])
            axes = figure.add_subplot(2 * rows, 1, 2 * row + 2)
            _heat(axes, np.stack(scaled)[:, real_t], list(encoders))
            if isinstance(sample, str):
                _name_tokens(axes, batch, row, real_t, stem.piece)
    return save(figure, path, f"{kind.name}: how much is missed when a part is left out")


def _scaled(values_t: np.ndarray) -> np.ndarray:
    """0 ... 1, NaN as it is."""
    return np.asarray(values_t / max(float(np.nanmax(values_t, initial=0.0)), 1e-12))


def _plane(values_t: np.ndarray, extents: tuple[int, ...]) -> np.ndarray:
    """The last two axes, the mean over others."""
    values = values_t.reshape(extents)
    return np.asarray(values.mean(axis=tuple(range(values.ndim - 2))) if values.ndim > 2 else values)


def _image(sample: Sample) -> np.ndarray:
    assert isinstance(sample, Tensor)
    return to_image(sample)


def _heat(axes: "Axes", values: np.ndarray, names: Sequence[str] = ()) -> None:
    axes.imshow(values, cmap="inferno", vmin=0, vmax=1, aspect="auto" if names else "equal", interpolation="nearest")
    axes.set_xticks([], [])
    axes.set_yticks(range(len(names)), names, fontsize=7)


def _draw_line(axes: "Axes", sample: Tensor) -> None:
    """A recording as its spectrogram, anything else as an image."""
    if sample.dim() == 1:
        axes.imshow(log_spectrogram(sample), origin="lower", aspect="auto", cmap="magma")
    else:
        axes.imshow(to_image(sample), aspect="auto", interpolation="nearest")
    axes.set_axis_off()


def _name_tokens(axes: "Axes", batch: Batch, row: int, real_t: np.ndarray, piece: Callable[[int], str] | None) -> None:
    ids = batch.inputs[row].numpy()[real_t].tolist()
    words = [piece(token) if piece else str(token) for token in ids]
    axes.set_xticks(range(len(words)), words, fontsize=7, rotation=30, ha="right", parse_math=False)


def _draw_separation(path: Path, encoders: Mapping[str, FrozenEncoder], read: Mapping[str, _Stem]) -> Path:
    """For each pair of stems and layer: the gap between their means, and how many of a sample's nearest neighbours are
    of its own modality."""
    from matplotlib.figure import Figure

    layers: dict[str, dict[str, Tensor]] = {name: {} for name in encoders}
    for stem, found in read.items():
        made = averaged(found.samples, [encoded(encoder) for encoder in encoders.values()])
        for name, means in zip(encoders, made, strict=True):
            layers[name][stem] = means.layers_lnd[:, means.present_n]
    pairs = list(combinations(read, 2))
    figure = Figure(figsize=(8, 2.6 * len(pairs)), layout="constrained")
    for row, (x, y) in enumerate(pairs):
        panels: dict[str, Callable[[Tensor, Tensor], float]] = {
            "distance of the means on the sphere": modality_gap,
            "neighbours of the own modality": own_neighbours,
        }
        for column, (title, measure) in enumerate(panels.items()):
            axes = figure.add_subplot(len(pairs), 2, 2 * row + column + 1)
            for name, each in layers.items():
                values = [measure(a_nd, b_nd) for a_nd, b_nd in zip(each[x], each[y], strict=True)]
                style = "o-" if name == "trained" else "o:"
                axes.plot(range(1, len(values) + 1), values, style, markersize=3, label=name, color="#2b6cb0")
            axes.set_ylim(0, 2 if column == 0 else 1.05)
            axes.set_xticks(range(1, len(values) + 1, -(-len(values) // 12)))
            axes.set_title(f"{x} - {y}: {title}", fontsize=8)
            axes.set_xlabel("layer", fontsize=7)
            axes.tick_params(labelsize=7)
            axes.legend(fontsize=7)
    return save(figure, path, "how far modalities lie apart")
