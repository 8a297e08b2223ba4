"""What shards hold: statistics, integrity, and pictures of batches with the masks drawn on: `d2v inspect`."""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.conversion import array_layouts, array_statistics
from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.source import open_store
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.files import file_sha256
from d2v_scale.modalities.text.decoder import Tokenizer
from d2v_scale.plots.samples import plot_masks
from d2v_scale.shards.content import length_of, plural, word_of
from d2v_scale.shards.reading import Fault, SampleFault, SampleStore
from d2v_scale.shards.shard_index import Measure
from d2v_scale.shards.shard_set import ShardSet, find_shards, is_remote

_BARS = 10
_WIDTH = 40
_NAMED = 20
_DRAWN = 8
"""Arrays in a picture."""


def statistics(shards: ShardSet) -> None:
    """Print counts, sizes, lengths and labels."""
    assert shards.index is not None
    loaded = [shards.members(k) for k in range(len(shards.paths))]
    size_n = np.concatenate([members.size_n for members in loaded])
    length_n = np.concatenate([members.length_n for members in loaded])
    content, megabytes = word_of(shards.index.content), size_n.sum() / 1e6
    print(f"{content}: {len(shards.paths)} shards, {len(size_n)} samples, {megabytes:.1f} MB")
    counts = shards.samples_s
    print(f"samples per shard: {counts.min()} to {counts.max()}")
    extensions = sorted({extension for members in loaded for extension in members.extensions})
    for extension in extensions:
        held = sum(
            int((members.member_size_ne[:, members.extensions.index(extension)] >= 0).sum())
            for members in loaded
            if extension in members.extensions
        )
        print(f"  .{extension}: in {held} samples")
    _histogram("size of a sample", size_n / 1000, "kB")
    length = length_of(shards.index.content).shown
    if length is not None:
        what, unit, of_one = length
        _histogram(what, length_n[length_n >= 0] / of_one, unit)
    if shards.index.classes:
        print(f"{len(shards.index.classes)} classes: {', '.join(shards.index.classes[:20])}")
    if (length_n < 0).any():
        print(f"{int((length_n < 0).sum())} samples were cut off or undecodable when the index was made")
    for entry in shards.entries:
        for damage in entry.damage:
            print(f"damaged when indexed: {entry.path}: {damage}")


def _histogram(what: str, values: NDArray[np.floating], unit: str) -> None:
    if len(values) == 0:
        return
    quantiles = np.quantile(values, [0, 0.01, 0.5, 0.99, 1])
    names = ("smallest", "1 %", "median", "99 %", "largest")
    print(f"{what}, {unit}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, quantiles, strict=True)))
    counts, edges = np.histogram(values, bins=_BARS)
    for count, low in zip(counts, edges, strict=False):
        print(f"  {low:10.4g} {'#' * round(_WIDTH * count / counts.max())} {count}")


def check(shards: ShardSet, max_pixels: int, key: str | None = None) -> int:
    """Decode every sample as training does; print what is wrong and return how many samples are lost."""
    assert shards.index is not None
    store = open_store(shards, DataConfig())
    measure = measure_of(shards.index.content, shards.tokenizer, max_pixels, key)
    lost = 0
    for shard, path in enumerate(shards.paths):
        found = 0
        for number in range(shards.entries[shard].samples):
            fault = _fault(store, shard, number, measure)
            found += fault is not None
            if fault is not None and lost + found <= _NAMED:
                print(f"lost: {fault}")
        lost += found
        if not is_remote(path) and found == 0 and file_sha256(Path(path)) != shards.entries[shard].sha256:
            print(f"changed outside its samples: {path}")
    print(f"integrity: {lost} of {int(shards.samples_s.sum())} samples lost")
    return lost


def _fault(store: SampleStore, shard: int, number: int, measure: Measure) -> Fault | None:
    """Why training would lose a sample; None: it would not."""
    try:
        sample = store.read(shard, number)
        length, indexed = measure(sample.members()), int(store.members(shard).length_n[number])
        if length != indexed:
            return store.describe(shard, number, f"has the length {length}, its index says {indexed}")
    except SampleFault as error:
        return error.fault
    except Exception as error:  # a decoder raises anything for damaged content
        return store.describe(shard, number, f"cannot be decoded: {type(error).__name__}: {error}")
    return None


def pictures(shards: ShardSet, pattern: str, recipe_name: str | None, out: Path, steps: int) -> None:
    """Write a PNG per step of what training would see."""
    assert shards.index is not None
    tokenizer = Tokenizer(shards.tokenizer) if shards.tokenizer is not None else None
    if recipe_name is not None:
        from d2v_scale.command_line import parse

        recipe, _ = parse(["--recipe", recipe_name, "--data", pattern])
        data, model, masking = recipe.data, recipe.model, recipe.masking()
        compat, seed = recipe.objective.compat, recipe.seed
    else:
        reader = next(
            one for kind in modalities.KINDS if (one := modalities.class_of(kind)).content == shards.index.content
        )
        model = reader.plain_model(None if tokenizer is None else tokenizer.size)
        data, compat, seed = DataConfig(), CompatConfig(), 1
        [name] = model.modalities
        masking = {name: MaskingConfig(kind="random", prob=0.5)}
        data.sources = [SourceConfig(shards=pattern, modality=name)]
    data.workers = 0
    loader = StepLoader(data, model, masking, compat, seed=seed, global_batch_size=8)

    for step in range(steps):
        decode = tokenizer.piece if tokenizer is not None else None
        [batch] = next(loader)
        path = out / f"{batch.modality}-step-{step}.png"
        print(plot_masks(batch, model.kind(batch.modality), path, decode=decode))


def array_pictures(shards: ShardSet, out: Path, count: int, key: str | None) -> None:
    """Write PNGs of eight arrays each, as they are stored."""
    from d2v_scale.plots.arrays import plot_arrays

    held = array_layouts.places(shards)
    places = [held[k] for k in np.random.default_rng(0).permutation(len(held))[: count * _DRAWN]]
    for number in range(count):
        drawn = list(array_statistics.arrays(shards, places[number * _DRAWN : (number + 1) * _DRAWN], key))
        if drawn:
            names = [shards.members(place.shard).key(place.number) for place, _ in drawn]
            print(plot_arrays([array for _, array in drawn], names, out / f"array-{number}.png"))


def inspect(arguments: argparse.Namespace) -> int:
    """Print statistics, and check and draw where that is asked for; the number of lost samples. Raises DataError."""
    shards = find_shards(SourceConfig(shards=arguments.shards, index=arguments.index))
    if shards.index is None:
        raise DataError(f"The shards of {arguments.shards!r} have no index.", "Run `d2v index` first.")
    holds_arrays, key = shards.index.content == "array", arguments.key
    if arguments.moments and not holds_arrays:
        raise DataError(f"The shards hold {plural(shards.index.content)}.", "--moments are of arrays.")
    statistics(shards)
    if holds_arrays:
        array_statistics.tell(shards, key)
    lost = check(shards, arguments.max_pixels, key) if arguments.check else 0
    if arguments.moments:
        array_statistics.print_moments(shards, arguments.transform, arguments.log_floor, key)
    if arguments.out is not None and holds_arrays and arguments.recipe is None:
        array_pictures(shards, arguments.out, arguments.steps, key)
    elif arguments.out is not None:
        pictures(shards, arguments.shards, arguments.recipe, arguments.out, arguments.steps)
    return lost
