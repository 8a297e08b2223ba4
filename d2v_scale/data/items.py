"""What of a set of shards a plan deals with: whole samples, or blocks and chunks of them, and how long each is."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data.config import SAMPLE_RATE, DataConfig
from d2v_scale.shards.one_content import part_lengths
from d2v_scale.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from d2v_scale.modalities.base import Modality

Lengths = Callable[[int], NDArray[np.int64]]
"""Of the samples of a shard, as the index counts them."""


class Items:
    """Every sample is an item, and all are of one size."""

    counted = True
    """Whether `per_epoch` is exact."""

    def __init__(self, shards: ShardSet, data: DataConfig, lengths: Lengths) -> None:
        self.shards, self.data, self.lengths = shards, data, lengths

    def per_epoch(self) -> int:
        """Rows of an epoch; at least as many where they are not counted."""
        return int(self.shards.samples_s.sum())

    def total_length(self) -> int:
        """Of an epoch, as an index counts it."""
        return int(self.shards.length_s.sum())

    def of_shard(self, shard: int) -> int:
        """Items of a shard."""
        return self.shards.entries[shard].samples

    def options(self) -> list[int | str]:
        """Settings that a plan depends on, for its fingerprint."""
        return []

    def cropped_shares(self, shards: Sequence[int]) -> dict[str, float]:
        """By part of these shards' samples, how much of its length is never read, since they are longer than a row."""
        del shards
        return {}

    def plan(self, batch_size: int, unit: str) -> tuple[float, dict[str, Any]]:
        """Size of a batch and further arguments of `SourcePlan`, for batches of so many samples, seconds or tokens."""
        del unit
        return batch_size, {}


class Recordings(Items):
    """Whole recordings, cut to the shortest of their batch."""

    def options(self) -> list[int | str]:
        """Shortest and longest."""
        speech = self.data.speech
        return [int(speech.min_seconds * 1000), int(speech.max_seconds * 1000)]

    def plan(self, batch_size: int, unit: str) -> tuple[float, dict[str, Any]]:
        """Seconds are counted after the cut."""
        arguments = {"length_of": self.usable, "crop_to_shortest": True, "cost_is_length": unit == "seconds"}
        return batch_size * SAMPLE_RATE if unit == "seconds" else batch_size, arguments

    def usable(self, shard: int) -> NDArray[np.int64]:
        """Samples at 16 kHz that an item contributes at most; 0: too short; -1: it could not be read."""
        speech = self.data.speech
        length_n = np.asarray(self.lengths(shard))
        shortest, longest = (round(seconds * SAMPLE_RATE) for seconds in (speech.min_seconds, speech.max_seconds))
        return np.where(length_n < 0, -1, np.where(length_n < shortest, 0, length_n.clip(max=longest)))


class TextBlocks(Items):
    """Blocks that run across documents."""

    def __init__(self, shards: ShardSet, data: DataConfig, lengths: Lengths, block: int) -> None:
        """`block`: tokens of a row, <s> included."""
        super().__init__(shards, data, lengths)
        self.block = block

    def per_epoch(self) -> int:
        """Blocks of every shard."""
        return int((-(-self.shards.length_s // (self.block - 1))).sum())

    def of_shard(self, shard: int) -> int:
        """Its blocks, the last one short."""
        return -(-self.shards.entries[shard].length // (self.block - 1))

    def options(self) -> list[int | str]:
        """Block and packing."""
        return [self.block, self.data.text.packing]

    def plan(self, batch_size: int, unit: str) -> tuple[float, dict[str, Any]]:
        """Every block counts as a whole one."""
        return max(1, batch_size // self.block) if unit == "tokens" else batch_size, {}


class TextChunks(TextBlocks):
    """Chunks that hold tokens of one document."""

    counted = False

    def per_epoch(self) -> int:
        """Documents, of which a long one makes several chunks."""
        return int(self.shards.samples_s.sum())

    def of_shard(self, shard: int) -> int:
        """Its chunks."""
        return len(self.chunk_lengths(shard))

    def plan(self, batch_size: int, unit: str) -> tuple[float, dict[str, Any]]:
        """By the chunks' own lengths."""
        return batch_size, {"length_of": self.chunk_lengths, "cost_is_length": unit == "tokens"}

    def chunk_lengths(self, shard: int) -> NDArray[np.int64]:
        """Tokens of each chunk of each document, <s> included."""
        from d2v_scale.modalities.text.decoder import chunks_of_documents

        _, start_n, stop_n = chunks_of_documents(np.asarray(self.lengths(shard)), self.block - 1)
        return stop_n - start_n + 1


class Pairs(Items):
    """Samples of several parts; each is as long as what is read of all of them."""

    def __init__(self, shards: ShardSet, data: DataConfig, lengths: Lengths, parts: "Sequence[Modality]") -> None:
        """`parts`: the stems that read them, in the order in which the shards' contents are read together."""
        super().__init__(shards, data, lengths)
        self.parts = parts

    def options(self) -> list[int | str]:
        """The stems, and how much of the longest is read."""
        return [part.name for part in self.parts] + [
            extent for part in self.parts for extent in part.extent(self.data)[1]
        ]

    def plan(self, batch_size: int, unit: str) -> tuple[float, dict[str, Any]]:
        """By the positions of all parts."""
        arguments = {"length_of": self.positions, "parts_of": self.parts_read, "cost_is_length": unit == "tokens"}
        return batch_size, arguments

    def total_length(self) -> int:
        """Positions of an epoch."""
        return sum(int(self.positions(shard).clip(min=0).sum()) for shard in range(len(self.shards.paths)))

    def positions(self, shard: int) -> NDArray[np.int64]:
        """Of each sample; -1 for one that cannot be read, or has no part for any of these stems."""
        length_np = part_lengths(self.shards, shard)
        total_n = np.zeros(len(length_np), dtype=np.int64)
        for part, length_n in zip(self.parts, length_np.T, strict=True):
            total_n += np.where(length_n < 0, 0, part.positions_of(length_n.clip(min=0), self.data))
        return np.where((length_np >= 0).any(axis=1), total_n, -1)

    def parts_read(self, shard: int) -> NDArray[np.int64]:
        """(N, P): what is read of each part of each sample, as the index counts it; 0 where there is none."""
        length_np = part_lengths(self.shards, shard).clip(min=0)
        extensions = self.shards.all_members(shard).extensions
        columns = [
            part.read_of(length_n, self.data, extensions)
            for part, length_n in zip(self.parts, length_np.T, strict=True)
        ]
        return np.stack(columns, axis=1)

    def cropped_shares(self, shards: Sequence[int]) -> dict[str, float]:
        """Of parts that have a longest row."""
        length_np = np.concatenate([part_lengths(self.shards, shard) for shard in shards]).clip(min=0)
        found = {}
        for part, length_n in zip(self.parts, length_np.T, strict=True):
            if (longest := part.longest_read(self.data)) is not None:
                found[part.name] = float((length_n - longest).clip(min=0).sum() / max(1, length_n.sum()))
        return found
