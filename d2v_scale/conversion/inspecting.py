"""What shards hold: statistics, integrity, and pictures of batches with the masks drawn on: `d2v inspect`."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.conversion import array_layouts, array_statistics
from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labels import class_number
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.source import open_store
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.files import file_sha256
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.plots.samples import plot_masks
from d2v_scale.shards.content import Content, length_of, plural, word_of
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.reading import Fault, SampleFault, SampleStore
from d2v_scale.shards.shard_index import Measure
from d2v_scale.shards.shard_set import ShardSet, find_shards

_BARS = 10
_WIDTH = 40
_NAMED = 20
_COUNTED = 1_000_000
_CUT_OFF = "cut off or undecodable when the index was made"
_DRAWN = 8
"""Arrays in a picture."""


def statistics(shards: ShardSet) -> None:
    """Print counts, sizes, lengths and labels."""
    assert shards.index is not None
    contents = shards.index.contents
    loaded = [shards.members(k) for k in range(len(shards.paths))]
    size_n = np.concatenate([members.size_n for members in loaded])
    words, megabytes = " with ".join(map(word_of, contents)), size_n.sum() / 1e6
    print(f"{words}: {len(shards.paths)} shards, {len(size_n)} samples, {megabytes:.1f} MB")
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
    lost = [_lengths(shards, content) for content in contents]
    if shards.index.classes:
        print(f"{len(shards.index.classes)} classes: {', '.join(shards.index.classes[:20])}")
        _samples_of_classes(shards)
    for content, count in zip(contents, lost, strict=True):
        if count:
            what = "samples" if len(contents) == 1 else plural(content)
            print(f"{count} {what} were {'absent, ' if len(contents) > 1 else ''}{_CUT_OFF}")
    for entry in shards.entries:
        for damage in entry.damage:
            print(f"damaged when indexed: {entry.path}: {damage}")


def _lengths(shards: ShardSet, content: Content) -> int:
    """Print how long the samples are, as far as `content` has lengths; returns how many have none."""
    read = reading(shards, content)
    length_n = np.concatenate([read.members(k).length_n for k in range(len(read.paths))])
    length = length_of(content).shown
    if length is not None:
        what, unit, of_one = length
        what = what if read is shards else f"{what} of {plural(content)}"
        _histogram(what, length_n[length_n >= 0] / of_one, unit)
        print(f"  in all {_in_all(float(length_n[length_n >= 0].sum() / of_one), unit)}")
    return int((length_n < 0).sum())


def _in_all(total: float, unit: str) -> str:
    """A sum of lengths as people say it: hours of seconds."""
    return f"{total / 3600:,.2f} hours" if unit == "s" else f"{total:,.0f} {unit}"


def _samples_of_classes(shards: ShardSet) -> None:
    """Print how many samples there are of each class, the commonest first. Reads a small piece of each sample: not of
    more than a million, and not of shards elsewhere."""
    assert shards.index is not None
    if any(map(is_remote, shards.paths)) or int(shards.samples_s.sum()) > _COUNTED:
        return
    names = shards.index.classes
    store = open_store(shards, DataConfig())
    counts: Counter[int] = Counter()
    try:
        for shard in range(len(shards.paths)):
            for number in range(shards.entries[shard].samples):
                counts[_class_of(store, shard, number)] += 1
    finally:
        store.close()
    labelled = {number: count for number, count in counts.items() if 0 <= number < len(names)}
    for number, count in sorted(labelled.items(), key=lambda one: (-one[1], one[0]))[:_NAMED]:
        print(f"  {names[number]}: {count}")
    if len(labelled) > _NAMED:
        print(f"  {len(labelled) - _NAMED} more, of {min(labelled.values())} samples and more")
    if rest := sum(counts.values()) - sum(labelled.values()):
        print(f"  without a label of these: {rest}")


def _class_of(store: SampleStore, shard: int, number: int) -> int:
    """The number of a sample's class; -1: it has none that can be read."""
    try:
        _, read_at, size = store.member(shard, number, ("cls",))
        return class_number(read_at(0, size))
    except (SampleFault, ValueError):
        return -1


def _histogram(what: str, values: NDArray[np.floating], unit: str) -> None:
    if len(values) == 0:
        return
    if values.min() == values.max():
        print(f"{what}, {unit}: {values[0]:.4g} of each")
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
    what = f" of {plural(shards.index.content)}" if shards.index.beside else ""
    print(f"integrity{what}: {lost} of {int(shards.samples_s.sum())} samples lost")
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
    """Write a PNG per step of what training would see of one content."""
    assert shards.index is not None
    content = shards.index.content
    if recipe_name is not None:
        from d2v_scale.command_line import parse

        of_one = [] if shards.index.beside else ["--data", pattern]
        recipe, _ = parse(["--recipe", recipe_name, *of_one])
        if shards.index.beside:
            names = [name for name in recipe.model.modalities if modalities.of(recipe.model, name).content == content]
            if not names:
                print(f"{recipe_name} has no stem that reads {plural(content)}")
                return
            recipe.data.sources = [SourceConfig(shards=pattern, modality=names[0])]
        data, model, masking = recipe.data, recipe.model, recipe.masking()
        compat, seed = recipe.objective.compat, recipe.seed
    else:
        reader = next(one for kind in modalities.KINDS if (one := modalities.class_of(kind)).content == content)
        model = reader.plain_model(shards.tokenizer)
        data, compat, seed = DataConfig(), CompatConfig(), 1
        [name] = model.modalities
        masking = {name: MaskingConfig(kind="random", prob=0.5)}
        data.sources = [SourceConfig(shards=pattern, modality=name)]
    data.workers = 0
    loader = StepLoader(data, model, masking, compat, seed=seed, global_batch_size=8)

    decode = open_tokenizer(shards.tokenizer).piece if shards.tokenizer is not None else None
    for step in range(steps):
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


def _stem_of_spectra(contents: list[Content], recipe_name: str | None) -> ArrayStem:
    """The stem of a recipe that makes arrays of recordings. Raises DataError."""
    if "recording" not in contents:
        held = " with ".join(map(plural, contents))
        raise DataError(f"The shards hold {held}.", "--moments are of arrays, and of recordings as log-mel.")
    stems: list[ArrayStem] = []
    if recipe_name is not None:
        from d2v_scale.command_line import parse

        recipe, _ = parse(["--recipe", recipe_name])
        recipe.model.check()
        stems = [stem for stem in recipe.model.arrays.values() if stem.reads_recordings]
    if len(stems) != 1:
        remedy = "Give --recipe with one stem whose transform is log_mel: moments are of what it makes of them."
        raise DataError(f"The shards hold recordings, and {len(stems)} stems are known that read them.", remedy)
    return stems[0]


def inspect(arguments: argparse.Namespace) -> int:
    """Print statistics, and check and draw where that is asked for; the number of lost samples. Raises DataError."""
    shards = find_shards(SourceConfig(shards=arguments.shards, index=arguments.index))
    if shards.index is None:
        raise DataError(f"The shards of {arguments.shards!r} have no index.", "Run `d2v index` first.")
    contents, key = shards.index.contents, arguments.key
    parts = {content: reading(shards, content) for content in contents}
    spectra = _stem_of_spectra(contents, arguments.recipe) if arguments.moments and "array" not in parts else None
    statistics(shards)
    if "array" in parts:
        array_statistics.tell(parts["array"], key)
    lost = sum(check(part, arguments.max_pixels, key) for part in parts.values()) if arguments.check else 0
    if spectra is not None:
        array_statistics.print_moments_of_spectra(parts["recording"], spectra)
    elif arguments.moments:
        array_statistics.print_moments(parts["array"], arguments.transform, arguments.log_floor, key)
    for content, part in parts.items() if arguments.out is not None else ():
        if content == "array" and arguments.recipe is None:
            array_pictures(part, arguments.out, arguments.steps, key)
        else:
            pictures(part, arguments.shards, arguments.recipe, arguments.out, arguments.steps)
    return lost
