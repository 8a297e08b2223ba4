"""Samples per CPU second of the data plane against plain webdataset, which decodes, crops and batches the same samples.

Both sides run in this process, one after the other in turns. The second table is ours alone with one and with two
worker processes, whose CPU time counts as well. Each row ends in a ratio: above 1 means better than the peer.
"""

import argparse
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset as wds

from d2v_scale.data import demo, speech, vision
from d2v_scale.data.config import DataConfig, SourceConfig, SpeechData, VisionData
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.shard_index import SetIndex
from d2v_scale.data.text import Tokenizer
from d2v_scale.data.writing import Sample, write_set
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.model.config import KINDS, ModelConfig, SpeechStem, TextStem, VisionStem

MASKING = MaskingConfig(kind="random", prob=0.5)
BATCH = 32
_SECONDS = 8.0


@dataclass
class Case:
    """A set of shards, its recipe, and what is counted."""

    modality: str
    shards: Path
    model: ModelConfig
    data: DataConfig
    items: int
    """Rows per epoch."""
    megabytes: float


def make_case(modality: str, root: Path) -> Case:
    """Write the shards of a modality. Photographs, 8 to 16 s of sound, the documents of the text demo."""
    out = root / modality
    data = DataConfig(workers=0, window_shards=4)
    if modality == "vision":
        index = write_set(out, "train", "image", list(photographs(400)), per_shard=100)
        model = ModelConfig(vision=VisionStem())
        items = 400
    elif modality == "speech":
        index = write_set(out, "train", "recording", list(recordings(160)), per_shard=40, measure=speech.measure)
        model, items = ModelConfig(speech=SpeechStem()), 160
        data.speech = SpeechData(min_seconds=_SECONDS, max_seconds=_SECONDS)
    else:
        out = demo.write("text", root)
        index = SetIndex.load(out / "train.index.json")
        size = Tokenizer(out / "tokenizer.model").size
        model = ModelConfig(text=TextStem(vocab_size=size + 1, mask_id=size))
        items = sum(-(-shard.length // 511) for shard in index.shards)
        # Every pass tokenises for itself, as the peer does.
        data.cache_dir = str(root / "cache")
    data.sources = [SourceConfig(shards=str(out / "train-*.tar"), modality=modality)]
    return Case(modality, out, model, data, items, sum(shard.bytes for shard in index.shards) / 1e6)


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


def ours(case: Case, workers: int = 0, rows: int | None = None) -> int:
    """One epoch through StepLoader; returns the rows delivered."""
    if case.data.cache_dir is not None:
        for path in Path(case.data.cache_dir).glob("*.tokens"):
            path.unlink()
    case.data.workers = workers
    loader = StepLoader(case.data, case.model, MASKING, seed=1, global_batch_size=BATCH)
    delivered = 0
    for _ in range((rows or case.items) // BATCH):
        delivered += sum(len(batch.inputs) for batch in next(loader))
    loader.close()
    return delivered


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


def theirs(case: Case) -> int:
    """One epoch through a plain webdataset pipeline with the same decoding functions; returns the rows delivered."""
    paths = [str(path) for path in sorted(case.shards.glob("train-*.tar"))]
    rng = np.random.default_rng(1)
    dataset = wds.WebDataset(paths, shardshuffle=False, empty_check=False).shuffle(100)
    delivered = 0
    if case.modality == "text":
        tokenizer = Tokenizer(case.shards / "tokenizer.model")
        stream = (tokenizer(sample["txt"].decode()) for sample in dataset)
        for batch in _batches(_blocks(stream)):
            inputs = torch.from_numpy(np.stack(batch))
            delivered += len(inputs)
        return delivered
    decoder: Any
    if case.modality == "vision":
        assert case.model.vision is not None
        decoder, length = vision.VisionDecoder(VisionData(), case.model.vision), 0
    else:
        assert case.model.speech is not None
        decoder, length = speech.SpeechDecoder(case.data.speech, case.model.speech), round(16000 * _SECONDS)

    def decode(sample: dict[str, Any]) -> tuple[str, Any]:
        row = decoder.training_row(_OneSample(sample), 0, 0, length, rng.random(decoder.draws))
        return row.key, row.values

    def collate(rows: list[tuple[str, Any]]) -> Any:
        return decoder.stack([values for _, values in rows])

    for stacked in dataset.map(decode).batched(BATCH, collation_fn=collate, partial=False):
        delivered += len(stacked.inputs)
    return delivered


def _blocks(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    left = np.zeros(0, dtype=np.int64)
    for tokens in documents:
        left = np.concatenate((left, tokens))
        while len(left) >= 511:
            yield np.concatenate(([0], left[:511]))
            left = left[511:]


def _batches(blocks: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch = []
    for block in blocks:
        batch.append(block)
        if len(batch) == BATCH:
            yield batch
            batch = []


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(function: Any, *arguments: Any) -> tuple[float, float]:
    """CPU and wall seconds per row of one pass."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    rows = function(*arguments)
    return (cpu_seconds() - cpu) / rows, (time.perf_counter() - wall) / rows


def compare(case: Case, pairs: int) -> None:
    """Print our rate, the peer's, and the median ratio of the pairs."""
    ours(case), theirs(case)
    mine: list[float] = []
    peer: list[float] = []
    for turn in range(pairs):
        for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            (mine if side is ours else peer).append(measure(side, case)[0])
    ratios = sorted(b / a for a, b in zip(mine, peer, strict=True))
    rate = 1 / statistics.median(mine)
    megabytes = rate * case.megabytes / case.items
    print(
        f"{case.modality:7s} {rate:9.1f} samples/CPU s {megabytes:7.1f} MB/CPU s   webdataset "
        f"{1 / statistics.median(peer):9.1f} samples/CPU s   pairs {ratios[0]:.2f}-{ratios[-1]:.2f}   "
        f"{statistics.median(ratios):.2f}x",
        flush=True,
    )


def scale(case: Case, pairs: int) -> None:
    """Print CPU and wall time per sample with two workers against one."""
    cpu, wall = [], []
    # Long enough that starting the processes does not count.
    rows = {"vision": 8, "speech": 16, "text": 60}[case.modality] * case.items
    for turn in range(pairs):
        times = {}
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            times[workers] = measure(ours, case, workers, rows)
        cpu.append(times[2][0] / times[1][0])
        wall.append(times[1][1] / times[2][1])
    print(
        f"{case.modality:7s} two workers: CPU per sample {statistics.median(cpu):.2f} of one worker's, "
        f"wall-clock rate {statistics.median(wall):.2f}x",
        flush=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py data`."""
    parser.add_argument("--modality", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=7)


def run(options: argparse.Namespace) -> int:
    """Print one row a modality against webdataset, then one with two workers against one."""
    torch.set_num_threads(1)
    wanted = KINDS if options.modality == "all" else (options.modality,)
    with tempfile.TemporaryDirectory() as root:
        cases = [make_case(modality, Path(root)) for modality in wanted]
        for case in cases:
            compare(case, options.pairs)
        for case in cases:
            scale(case, max(1, options.pairs // 2))
    return 0
