"""Features of samples as files: Parquet, or shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.files import atomic_file
from d2v_scale.shards.writing import write_shard

_ROW_GROUP_BYTES = 64 << 20


@dataclass
class Extracted:
    """Features of one sample."""

    key: str
    label: int
    features: NDArray[np.floating]


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
