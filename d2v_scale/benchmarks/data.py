"""Samples per CPU second of the data plane against plain webdataset, which decodes, crops and batches the same samples.

Both sides run in this process, one after the other in turns. The second table is ours alone with one and with two
worker processes, whose CPU time counts as well. Each row ends in a ratio: above 1 means better than the peer.
"""

import argparse
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2v_scale import modalities
from d2v_scale.benchmarks.samples import BATCH, SAMPLES, TRAIN_INDEX
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import KINDS, Kind
from d2v_scale.shards.shard_index import SetIndex

MASKING = MaskingConfig(kind="random", prob=0.5)


@dataclass
class Case:
    """A set of shards, its recipe, and what is counted."""

    modality: Kind
    shards: Path
    model: ModelConfig
    data: DataConfig
    items: int
    """Rows per epoch."""
    megabytes: float


def make_case(modality: Kind, root: Path) -> Case:
    """Write the shards of a modality. Photographs, 8 to 16 s of sound, the documents of the text demo."""
    samples = SAMPLES[modality]
    folder = samples.write(root / modality, samples.count, samples.per_shard, samples.size)
    index = SetIndex.load(folder / TRAIN_INDEX)
    model = modalities.class_of(modality).plain_model(samples.tokenizer(folder))
    data = DataConfig(workers=0, window_shards=4)
    data.sources = [SourceConfig(shards=str(folder / "train-*.tar"), modality=modality)]
    data = samples.settings(data, samples.size)
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6
    return Case(modality, folder, model, data, samples.rows(index), megabytes)


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


def theirs(case: Case) -> int:
    """One epoch through a plain webdataset pipeline with the same decoding functions; returns the rows delivered."""
    paths = [str(path) for path in sorted(case.shards.glob("train-*.tar"))]
    return SAMPLES[case.modality].read_plainly(paths, case.shards, case.model, case.data)


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
    rows = SAMPLES[case.modality].epochs * case.items
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
    parser.add_argument("--modality", choices=[*SAMPLES, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=7)


def run(options: argparse.Namespace) -> int:
    """Print one row a modality against webdataset, then one with two workers against one."""
    torch.set_num_threads(1)
    wanted = [kind for kind in KINDS if kind in SAMPLES and options.modality in (kind, "all")]
    with tempfile.TemporaryDirectory() as root:
        cases = [make_case(modality, Path(root)) for modality in wanted]
        for case in cases:
            compare(case, options.pairs)
        for case in cases:
            scale(case, max(1, options.pairs // 2))
    return 0
