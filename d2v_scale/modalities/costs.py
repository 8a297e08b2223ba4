"""The sizes that costs are counted from: how long a sample is, and how a micro-batch is computed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NORM_BYTES = 8
"""Bytes a norm keeps of each position beside its input: mean and reciprocal root, fp32."""
INDEX_BYTES = 8
"""Bytes of an index."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Sequence lengths of one sample, and how its positions lie."""

    inputs: int
    """Size of the raw input along its longest axis: samples of audio, tokens, or pixels along the longer side."""
    grid: tuple[int, ...]
    """Positions along each axis, row-major: (frames,), (tokens,), (rows of patches, patches in a row)."""
    kept: int
    """Positions that the student's blocks see in each row, extra tokens not included."""
    masked: float
    """Positions per row that the loss covers, mean."""
    extra: int
    """Extra tokens (CLS)."""
    clones: int
    """M: rows of the student per sample."""
    parts: tuple[tuple[str, "Lengths"], ...] = ()
    """Of paired samples: each part's, by its stem. All else is of the sequence that they make."""

    @classmethod
    def together(cls, parts: Mapping[str, "Lengths"]) -> "Lengths":
        """Of the sequence that these parts make, in their order."""
        each = list(parts.values())
        return cls(
            inputs=sum(one.positions for one in each),
            grid=(sum(one.positions for one in each),),
            kept=sum(one.kept for one in each),
            masked=sum(one.masked for one in each),
            extra=sum(one.extra for one in each),
            clones=each[0].clones,
            parts=tuple(parts.items()),
        )

    def of(self, stem: str) -> "Lengths":
        """Of one stem's part; of samples of one stem the same."""
        return dict(self.parts).get(stem, self)

    @property
    def positions(self) -> int:
        """T: patches, frames or tokens of the full sample."""
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a micro-batch is computed."""

    samples: float
    """Samples of the micro-batch on each data-parallel rank."""
    itemsize: int
    """Bytes of a value in the forward pass: 2 in bf16, 4 in fp32."""
    tensor: int = 1
    """Tensor-parallel size."""
    kernels: Literal["cuda", "cpu"] = "cuda"
    """`cpu`: torch keeps attention weights where the attention bias trains, and dropout masks as values."""
