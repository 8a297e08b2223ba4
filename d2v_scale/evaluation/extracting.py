"""Features of an encoder over shards, a file for each shard that is read: `d2v extract`."""

import argparse
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.data.config import SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import EXIT_PARTIAL, DataError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.files import atomic_file, write_whole
from d2v_scale.interop.exporting import pick_modality
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.parallel import launchers
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.shard_index import SetIndex, ShardEntry, index_shard
from d2v_scale.shards.shard_set import INDEX_SUFFIX, ShardSet, find_shards
from d2v_scale.shards.writing import is_written, members_file, write_shard

_RECORD = "extract.json"
_ROW_GROUP_BYTES = 64 << 20


@dataclass
class Extracted:
    """Features of one sample."""

    key: str
    label: int
    features: NDArray[np.floating]


def features_of(
    encoder: FrozenEncoder, samples: LabelledSet, layers: list[int], pool: str, lost: list[int]
) -> Iterator[Extracted]:
    """Features sample by sample; the number of unreadable samples is appended to `lost`."""
    for batch, labels_b in samples:
        lost.append(batch.lost)
        moved = batch.to(encoder.device)
        with torch.no_grad():
            states = encoder.hidden_states(moved)
            mean_btd = torch.stack([states[layer].float() for layer in layers]).mean(dim=0)
            valid_bt = encoder.valid_positions(moved)
        if pool == "mean":
            rows = list(mean_over_positions(mean_btd, valid_bt).cpu().numpy())
        else:
            kept = [slice(None)] * len(mean_btd) if valid_bt is None else list(valid_bt)
            rows = [row[keep].half().cpu().numpy() for row, keep in zip(mean_btd, kept, strict=True)]
        for key, label, row in zip(batch.keys, labels_b.tolist(), rows, strict=True):
            yield Extracted(key, label, row)


def write_parquet(path: Path, samples: Iterator[Extracted]) -> int:
    """Write one Parquet file, atomically, holding one row group in memory; returns the number of rows."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    groups = _row_groups(samples)
    rows = next(groups)
    written = len(rows)
    table = _table(rows)
    with atomic_file(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, table.schema) as writer:
        writer.write_table(table)
        for rows in groups:
            writer.write_table(_table(rows))
            written += len(rows)
    return written


def _row_groups(samples: Iterator[Extracted]) -> Iterator[list[Extracted]]:
    """The samples in lists of so many bytes; a first list always."""
    rows: list[Extracted] = []
    size = 0
    for row in samples:
        if size >= _ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += row.features.nbytes
    yield rows


def _table(rows: list[Extracted]) -> Any:
    import pyarrow  # type: ignore[import-untyped]

    width = rows[0].features.shape[-1] if rows else 1
    values = np.concatenate([row.features.ravel() for row in rows] or [np.zeros(0)]).astype(np.float32)
    vectors = np.arange(0, len(values) + 1, width, dtype=np.int32)
    features = pyarrow.ListArray.from_arrays(vectors, pyarrow.array(values))
    if rows and rows[0].features.ndim == 2:
        ends = np.cumsum([0, *(len(row.features) for row in rows)], dtype=np.int32)
        features = pyarrow.ListArray.from_arrays(ends, features)
    labels = pyarrow.array([row.label for row in rows], type=pyarrow.int64())
    keys = pyarrow.array([row.key for row in rows], type=pyarrow.string())
    return pyarrow.table({"key": keys, "label": labels, "features": features})


def write_tar(path: Path, samples: Iterator[Extracted]) -> int:
    """Write one shard and its binary index; returns the number of samples."""
    made = (
        {"__key__": row.key, "npy": row.features} | ({"cls": row.label} if row.label >= 0 else {}) for row in samples
    )
    return write_shard(path, made).samples


def extract(arguments: argparse.Namespace) -> int:
    """Make this process's files; returns the exit code. Raises DataError and CheckpointError."""
    rank, world_size = process_number()
    encoder = FrozenEncoder.load(arguments.checkpoint, arguments.weights)
    modality = pick_modality(encoder.recipe, arguments.modality)
    source = SourceConfig(shards=arguments.shards, modality=modality)
    found = reading(find_shards(source), modalities.of(encoder.recipe.model, modality).content)
    arguments.out.mkdir(parents=True, exist_ok=True)
    suffix = ".parquet" if arguments.format == "parquet" else ".tar"
    targets = [arguments.out / (target_name(path) + suffix) for path in found.paths]
    first: dict[Path, str] = {}
    for target, path in zip(targets, found.paths, strict=True):
        if first.setdefault(target, path) != path:
            raise DataError(f"{first[target]} and {path} have the same file name.", "Extract them into other folders.")
    record_making(arguments, encoder, modality, found, targets)
    mine = range(rank, len(targets), world_size)
    made = [target.is_file() and (suffix == ".parquet" or is_written(target)) for target in targets]
    without: dict[str, str] = {}
    for number in mine:
        if made[number]:
            continue
        try:
            _extract_one(arguments, encoder, modality, found, number, targets[number])
        except DataError as error:
            without[targets[number].name] = f"{found.paths[number]}: {error}"
            print(f"not extracted: {found.paths[number]}: {error}", file=sys.stderr, flush=True)
    if kept := sum(made[number] for number in mine):
        print(f"{kept} of {len(mine)} files were there already", flush=True)
    failed = _note_without(arguments.out, [targets[number].name for number in mine], without)
    there = [target for target in targets if target.name not in failed]
    if suffix == ".tar" and found.index is not None and there and all(is_written(target) for target in there):
        entries: list[ShardEntry] = [index_shard(t, members_file(t), t.parent) for t in there]
        index = SetIndex(content=found.index.content, shards=entries, classes=found.index.classes)
        index.save(arguments.out / f"features{INDEX_SUFFIX}")
    if len(without) == len(targets):
        raise DataError(f"No shard of {arguments.shards!r} could be extracted.", "They are named above.")
    if without:
        print(f"{len(without)} of {len(mine)} shards have no file", file=sys.stderr)
    return EXIT_PARTIAL if without else 0


def _extract_one(
    arguments: argparse.Namespace,
    encoder: FrozenEncoder,
    modality: str,
    found: ShardSet,
    number: int,
    target: Path,
) -> None:
    """Make the file of a shard. Raises DataError where nothing of it can be read, or too much is cut off."""
    lost: list[int] = []
    samples = LabelledSet(
        found.paths[number],
        modality,
        encoder.recipe.data,
        encoder.recipe.model,
        batch_size=arguments.batch_size,
        require_labels=False,
        found=found.one(number),
    )
    rows = features_of(encoder, samples, arguments.layers, arguments.pool, lost)
    first = next(rows, None)
    if first is None:
        raise samples.nothing_readable()
    written = (write_parquet if target.suffix == ".parquet" else write_tar)(target, itertools.chain([first], rows))
    print(f"{target}: {written} samples, {len(samples) - written} lost", flush=True)


def _note_without(out: Path, mine: list[str], without: dict[str, str]) -> dict[str, str]:
    """Write into extract.json which of this process's files could not be made; returns those of all processes."""
    with (out / f".{_RECORD}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads((out / _RECORD).read_text())
        noted = {name: why for name, why in record.get("without", {}).items() if name not in mine} | without
        if noted != record.get("without", {}):
            write_whole(out / _RECORD, json.dumps(record | {"without": noted}, indent=1) + "\n")
    return noted


def record_making(
    arguments: argparse.Namespace, encoder: FrozenEncoder, modality: str, found: ShardSet, targets: list[Path]
) -> None:
    """Write into the folder of what encoder and shards its files are; those of earlier calls stay in it.

    Raises DataError where there are features of others, or of unknown ones. One process at a time.
    """
    with (arguments.out / f".{_RECORD}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _record_making(arguments, encoder, modality, found, targets)


def _record_making(
    arguments: argparse.Namespace, encoder: FrozenEncoder, modality: str, found: ShardSet, targets: list[Path]
) -> None:
    path = arguments.out / _RECORD
    making: dict[str, Any] = {
        "checkpoint": str(encoder.source.resolve()),
        "step": encoder.step,
        "weights": encoder.weights,
        "modality": modality,
        "layers": arguments.layers,
        "pool": arguments.pool,
    }
    shards = {target.name: found.one(number).entries[0].sha256 for number, target in enumerate(targets)}
    remedy = "Extract into another folder, or remove the files."
    known: dict[str, str] = {}
    without: dict[str, str] = {}
    if path.is_file():
        try:
            before = json.loads(path.read_text())
            without = before.get("without", {})
            # A shard that could not be extracted may have been restored since.
            known = {name: sha256 for name, sha256 in before["shards"].items() if name not in without}
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path} cannot be read: {error!r}.", remedy) from error
        for name, value in making.items():
            if before.get(name) != value:
                raise DataError(f"{path}: the features there are of {name} {before.get(name)}, not {value}.", remedy)
    for target in targets:
        if known.get(target.name, shards[target.name]) != shards[target.name]:
            raise DataError(f"{path}: {target.name} is of another shard of that name.", remedy)
        if target.name not in known and target.exists():
            raise DataError(f"{target} is there, and {path} does not say what it is of.", remedy)
    if shards.items() - known.items():
        write_whole(path, json.dumps(making | {"shards": known | shards, "without": without}, indent=1) + "\n")


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
