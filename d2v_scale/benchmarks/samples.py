"""Shards that benchmarks read, and plain webdataset's way through them: a row of `SAMPLES` a modality."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
import webdataset as wds

from d2v_scale import modalities
from d2v_scale.conversion import demo
from d2v_scale.data.config import SAMPLE_RATE, DataConfig
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.text.tokenizer import PIECES, open_tokenizer
from d2v_scale.model.config import ModelConfig
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.writing import Sample, write_set

BATCH = 32
TRAIN_INDEX = "train.index.json"
_BLOCK = 511
"""Tokens of a row but <s>."""


class Samples(ABC):
    """What one modality's benchmarks read."""

    count: ClassVar[int] = 0
    per_shard: ClassVar[int] = 0
    """Of `bench.py data`."""
    per_shard_of_device: ClassVar[int] = 0
    """Of `bench.py device`."""
    size: ClassVar[int] = 0
    """Samples of audio of each row there."""
    epochs: ClassVar[int]
    """So many that starting worker processes does not count."""

    @abstractmethod
    def write(self, root: Path, count: int, per_shard: int, size: int) -> Path:
        """Write a training set below `root`; the folder of its shards. Rows are of `size`, where samples differ."""

    def settings(self, data: DataConfig, size: int) -> DataConfig:
        """`data` with rows of this size, where samples differ."""
        del size
        return data

    def rows(self, index: SetIndex) -> int:
        """Rows of an epoch."""
        return index.samples

    def tokenizer(self, folder: Path) -> Path | None:
        """The shards' one, where they have one."""
        del folder
        return None

    def read_plainly(self, paths: list[str], folder: Path, model: ModelConfig, data: DataConfig) -> int:
        """One epoch through a plain webdataset pipeline with the same decoding functions; the rows delivered."""
        rng = np.random.default_rng(1)
        [stem] = modalities.stems(model)
        decoder: Any = stem.build_decoder(data, None)

        def decode(sample: dict[str, Any]) -> tuple[str, Any]:
            row = decoder.training_row(_OneSample(sample), 0, 0, self.size, rng.random(decoder.draws))
            return row.key, row.values

        def collate(rows: list[tuple[str, Any]]) -> Any:
            return decoder.stack([values for _, values in rows])

        stacks = _plain(paths).map(decode).batched(BATCH, collation_fn=collate, partial=False)
        return sum(len(stacked.inputs) for stacked in stacks)


class Photographs(Samples):
    """JPEGs."""

    count, per_shard, per_shard_of_device, epochs = 400, 100, 64, 8

    def write(self, root: Path, count: int, per_shard: int, size: int) -> Path:
        write_set(root, "train", "image", list(photographs(count)), per_shard=per_shard)
        return root


class Recordings(Samples):
    """FLACs of 8 to 16 s, or of one to one and a half times the rows' length."""

    count, per_shard, per_shard_of_device, epochs = 160, 40, 16, 16
    size = 8 * SAMPLE_RATE

    def write(self, root: Path, count: int, per_shard: int, size: int) -> Path:
        seconds = size / SAMPLE_RATE
        longest = 2 * seconds if size == self.size else 1.5 * seconds
        made = list(recordings(count, seconds, longest))
        write_set(root, "train", "recording", made, per_shard=per_shard, measure=speech.measure)
        return root

    def settings(self, data: DataConfig, size: int) -> DataConfig:
        seconds = size / SAMPLE_RATE
        return replace(data, speech=replace(data.speech, min_seconds=seconds, max_seconds=seconds))


class Documents(Samples):
    """Those of the text demo."""

    epochs = 60

    def write(self, root: Path, count: int, per_shard: int, size: int) -> Path:
        return demo.write("text", root)

    def settings(self, data: DataConfig, size: int) -> DataConfig:
        # Every pass tokenises for itself, as the peer does.
        return replace(data, cache_dir=str(Path(data.sources[0].shards).parent.parent / "cache"))

    def rows(self, index: SetIndex) -> int:
        return sum(-(-shard.length // _BLOCK) for shard in index.shards)

    def tokenizer(self, folder: Path) -> Path | None:
        return folder / PIECES

    def read_plainly(self, paths: list[str], folder: Path, model: ModelConfig, data: DataConfig) -> int:
        tokenizer = open_tokenizer(folder / PIECES)
        stream = (tokenizer(sample["txt"].decode()) for sample in _plain(paths))
        return sum(len(torch.from_numpy(np.stack(batch))) for batch in _batches(_blocks(stream)))


# One set a kind of stem, for the kinds that the benchmarks compare.
SAMPLES: dict[str, Samples] = {"vision": Photographs(), "speech": Recordings(), "text": Documents()}


def _plain(paths: list[str]) -> Any:
    return wds.WebDataset(paths, shardshuffle=False, empty_check=False).shuffle(100)


def photographs(count: int) -> Iterator[Sample]:
    """JPEGs of 500 x 375 pixels cut out of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for k in range(count):
        left, top = int(rng.integers(0, 640 - 320)), int(rng.integers(0, 427 - 240))
        cut = originals[k % 2].resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + 320, top + 240))
        content = io.BytesIO()
        cut.save(content, "JPEG", quality=90)
        yield {"__key__": f"photograph-{k:05d}", "jpg": content.getvalue(), "cls": k % 10}


def recordings(count: int, shortest: float = 8, longest: float = 16) -> Iterator[Sample]:
    """FLACs of filtered noise at 16 kHz; lengths in seconds."""
    rng = np.random.default_rng(0)
    for k in range(count):
        noise = rng.standard_normal(int(16000 * rng.uniform(shortest, longest)))
        wave = np.convolve(noise, np.hanning(24) / 12, mode="same") * 0.1
        content = io.BytesIO()
        soundfile.write(content, wave.astype(np.float32), 16000, format="FLAC")
        yield {"__key__": f"recording-{k:05d}", "flac": content.getvalue()}


class _OneSample:
    """What a webdataset sample looks like to a decoder."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.key = sample["__key__"]
        self._sample = sample

    def read(self, _shard: int, _item: int) -> "_OneSample":
        return self

    def member(self, extensions: tuple[str, ...]) -> tuple[str, bytes]:
        extension = next(name for name in extensions if name in self._sample)
        return extension, self._sample[extension]


def _blocks(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    left = np.zeros(0, dtype=np.int64)
    for tokens in documents:
        left = np.concatenate((left, tokens))
        while len(left) >= _BLOCK:
            yield np.concatenate(([0], left[:_BLOCK]))
            left = left[_BLOCK:]


def _batches(blocks: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch = []
    for block in blocks:
        batch.append(block)
        if len(batch) == BATCH:
            yield batch
            batch = []
