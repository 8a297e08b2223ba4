"""Features of an encoder over shards, a file for each shard that is read: `d2v extract`."""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.config import SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import EXIT_PARTIAL, DataError
from d2v_scale.evaluation.extract_record import RECORD, ExtractRecord
from d2v_scale.evaluation.extracted import Extracted, write_parquet, write_tar
from d2v_scale.evaluation.frozen import FrozenEncoder, Weights
from d2v_scale.interop.exporting import pick_sequence
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.parallel import launchers
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.reading import Fault
from d2v_scale.shards.shard_index import SetIndex, ShardEntry, index_shard
from d2v_scale.shards.shard_set import INDEX_SUFFIX, ShardSet, find_shards
from d2v_scale.shards.writing import is_written, members_file

BATCHES_BY_LENGTH = 16
"""Samples of so many batches are sorted by length together, and their features kept until all of them are there."""
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What is extracted, of what, and into what."""

    shards: str
    out: Path
    form: Literal["parquet", "shards"] = "parquet"
    pool: Literal["mean", "none"] = "mean"
    layers: list[int] = field(default_factory=lambda: [-1])
    """Main blocks that are averaged."""
    modality: str | None = None
    """Of the stem, or of a source of paired samples; None: there is one."""
    batch_size: int = 32

    @property
    def suffix(self) -> str:
        """Of the files."""
        return ".parquet" if self.form == "parquet" else ".tar"


def features_of(
    encoder: FrozenEncoder, samples: LabelledSet, layers: list[int], pool: str, faults: list[Fault]
) -> Iterator[Extracted]:
    """Features sample by sample, in the stored order; what cannot be read is appended to `faults`."""
    reads = samples.reads(0, 1)
    while window := list(itertools.islice(reads, samples.by_length)):
        found: list[tuple[int, Extracted]] = []
        for read in window:
            faults += read.faults
            if read.batch is not None:
                rows = _features(encoder, read.batch, read.labels.tolist(), layers, pool)
                found += zip(read.batch.sample_ids.tolist(), rows, strict=True)
        yield from (row for _, row in sorted(found, key=lambda numbered: numbered[0]))


def _features(encoder: FrozenEncoder, batch: Batch, labels: list[int], layers: list[int], pool: str) -> list[Extracted]:
    moved = batch.to(encoder.device)
    with torch.no_grad():
        mean_btd = torch.stack([state.float() for state in encoder.hidden_states(moved, layers)]).mean(dim=0)
        valid_bt = encoder.valid_positions(moved)
    if pool == "mean":
        rows = list(mean_over_positions(mean_btd, valid_bt).cpu().numpy())
    else:
        kept = [slice(None)] * len(mean_btd) if valid_bt is None else list(valid_bt)
        rows = [row[keep].half().cpu().numpy() for row, keep in zip(mean_btd, kept, strict=True)]
    return [Extracted(*one) for one in zip(batch.keys, labels, rows, strict=True)]


def extract(checkpoint: str | Path, weights: Weights, wanted: Extraction) -> int:
    """Make this process's files; returns the exit code. Raises DataError and CheckpointError."""
    rank, world_size = process_number()
    encoder = FrozenEncoder.load(checkpoint, weights)
    depth = encoder.recipe.model.backbone.depth
    if unknown := [layer for layer in wanted.layers if not -depth <= layer < depth]:
        raise DataError(f"The encoder has no main block {unknown[0]}.", f"It has {depth}: give 0 to {depth - 1}.")
    modality = pick_sequence(encoder.recipe, wanted.modality)
    source = SourceConfig(shards=wanted.shards, modality=modality)
    found = find_shards(source)
    targets = targets_of(found, wanted)
    wanted.out.mkdir(parents=True, exist_ok=True)
    record = ExtractRecord(wanted.out)
    making = {
        "checkpoint": str(encoder.source.resolve()),
        "step": encoder.step,
        "weights": encoder.weights,
        "modality": modality,
        "layers": wanted.layers,
        "pool": wanted.pool,
    }
    record.begin(making, {target: found.one(number).entries[0].sha256 for number, target in enumerate(targets)})
    mine = range(rank, len(targets), world_size)
    made = [target.is_file() and (wanted.form == "parquet" or is_written(target)) for target in targets]
    without: dict[str, str] = {}
    for number in mine:
        if made[number]:
            continue
        try:
            _extract_one(encoder, modality, wanted, found, number, targets[number], record)
        except DataError as error:
            without[targets[number].name] = f"{found.paths[number]}: {error}"
            print(f"not extracted: {found.paths[number]}: {error}", file=sys.stderr, flush=True)
    if kept := sum(made[number] for number in mine):
        print(f"{kept} of {len(mine)} files were there already", flush=True)
    failed = record.note("without", [targets[number].name for number in mine], without)
    there = [target for target in targets if target.name not in failed]
    if wanted.form == "shards" and found.index is not None and there and all(is_written(target) for target in there):
        entries: list[ShardEntry] = [index_shard(t, members_file(t), t.parent) for t in there]
        content = modalities.of(encoder.recipe.model, modality).content
        index = SetIndex(content=content, shards=entries, classes=found.index.classes)
        index.save(wanted.out / f"features{INDEX_SUFFIX}")
    if len(without) == len(targets):
        raise DataError(f"No shard of {wanted.shards!r} could be extracted.", "They are named above.")
    if without:
        print(f"{len(without)} of {len(mine)} shards have no file", file=sys.stderr)
    return EXIT_PARTIAL if without else 0


def targets_of(found: ShardSet, wanted: Extraction) -> list[Path]:
    """The file of each shard. Raises DataError where two have the same."""
    targets = [wanted.out / (target_name(path) + wanted.suffix) for path in found.paths]
    first: dict[Path, str] = {}
    for target, path in zip(targets, found.paths, strict=True):
        if first.setdefault(target, path) != path:
            raise DataError(f"{first[target]} and {path} have the same file name.", "Extract them into other folders.")
    return targets


def _extract_one(
    encoder: FrozenEncoder,
    modality: str,
    wanted: Extraction,
    found: ShardSet,
    number: int,
    target: Path,
    record: ExtractRecord,
) -> None:
    """Make the file of a shard. Raises DataError where nothing of it can be read, or too much is cut off."""
    faults: list[Fault] = []
    samples = LabelledSet(
        found.paths[number],
        modality,
        encoder.recipe.data,
        encoder.recipe.model,
        batch_size=wanted.batch_size,
        require_labels=False,
        by_length=BATCHES_BY_LENGTH,
        found=found.one(number),
    )
    rows = features_of(encoder, samples, wanted.layers, wanted.pool, faults)
    first = next(rows, None)
    if first is None:
        raise samples.nothing_readable(faults)
    write = write_parquet if wanted.form == "parquet" else write_tar
    written = write(target, itertools.chain([first], rows))
    for fault in faults[:_NAMED]:
        print(f"lost: {fault}", file=sys.stderr)
    if len(faults) > _NAMED:
        print(f"lost: {len(faults) - _NAMED} more of this shard; all are in {RECORD}", file=sys.stderr)
    lost = {target.name: [f"{fault.key}: {fault.reason}" for fault in faults]} if faults else {}
    record.note("lost", [target.name], lost)
    cut = f", of {samples.cut} the beginning alone" if samples.cut else ""
    print(f"{target}: {written} samples, {len(samples) - written} lost{cut}", flush=True)


def target_name(path: str) -> str:
    """`test-000000` of `/a/test-000000.tar`."""
    if is_remote(path):
        raise DataError(f"{path} is not local.", "Copy the shards first.")
    return Path(path).stem


def process_number() -> tuple[int, int]:
    """This process among those that were started together. Raises ConfigError where that cannot be said."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # The encoder runs in a world of one.
        return int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    place = launchers.started_as()
    if place.world_size > 1 and "LOCAL_RANK" not in os.environ:
        # Slurm may show a task its own GPU only.
        os.environ["LOCAL_RANK"] = str(place.local_rank % max(1, torch.cuda.device_count()))
    return place.rank, place.world_size
