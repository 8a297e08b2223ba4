"""Vectors of recordings of mixed length: `d2v extract` against the obvious loop on the exported Hugging Face encoder.

The loop reads a file after the other, pads so many of them to the longest and takes the mean of the last layer over the
real frames. Both sides have the same weights, recordings, batch size and threads; they take turns, and each reads,
decodes, computes and writes. Loading the encoders does not count. The ratio is of processor time, which other work on
the machine hardly changes, and beside it of wall time. First it is checked that vectors of single recordings are alike.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from d2v_scale import modalities
from d2v_scale.benchmarks.samples import recordings
from d2v_scale.checkpoint import open_any, write_single
from d2v_scale.command_line import parse
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.evaluation.extracted import write_parquet
from d2v_scale.evaluation.extracting import BATCHES_BY_LENGTH, features_of
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop.exporting import export_huggingface
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.shards.writing import write_set

_AGREE = 1e-3
_CHECKED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py extract`."""
    parser.add_argument("--recipe", default="tiny2_speech", help="whose speech encoder, with random weights")
    parser.add_argument("--recordings", type=int, default=128, help="of one shard")
    parser.add_argument("--seconds", type=float, nargs=2, default=(1.0, 16.0), help="shortest and longest, uniform")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(options: argparse.Namespace) -> int:
    """Print one row."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(options.threads)
    shortest, longest = options.seconds
    recipe, _ = parse(["--recipe", options.recipe, f"--data.speech.max_seconds={longest}"])
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), recipe, options.recordings, shortest, longest)
        difference = sides.difference()
        assert difference < _AGREE, f"vectors of single recordings differ by {difference:g}"
        print(row(options.recipe, sides, options.batch_size, options.rounds, f"{shortest:g}-{longest:g} s"), flush=True)
    return 0


class Sides:
    """An encoder with random weights, its export, and recordings as a shard and as files."""

    def __init__(self, folder: Path, recipe: Recipe, count: int, shortest: float, longest: float) -> None:
        from transformers import AutoFeatureExtractor, AutoModel

        self.folder = folder
        samples = list(recordings(count, shortest, longest))
        kind = modalities.of(recipe.model, "speech")
        from d2v_scale.modalities.speech.decoder import measure

        write_set(folder / "shards", "test", "recording", samples, per_shard=count, measure=measure)
        self.files = [folder / f"{sample['__key__']}.flac" for sample in samples]
        for file, sample in zip(self.files, samples, strict=True):
            file.write_bytes(sample["flac"])
        with undivided():
            student = Student(recipe.model)
        initialize(student, recipe.seed)
        weights = dict(student.named_parameters())
        parts = recipe.parts()
        teacher = {name: x for name, x in weights.items() if parts.role(name) != "absent"}
        checkpoint = write_single(folder / "checkpoints", weights, teacher, {"recipe": to_dict(recipe)})
        export_huggingface(open_any(checkpoint), recipe, "speech", folder / "export", "teacher", None)
        self.encoder = FrozenEncoder.load(checkpoint)
        self.frames_of: Callable[[int], int] = lambda n: int(kind.positions_of(np.array([n]), recipe.data)[0])
        self.processor: Any = AutoFeatureExtractor.from_pretrained(folder / "export", trust_remote_code=True)
        model: Any = AutoModel.from_pretrained(folder / "export", trust_remote_code=True)
        self.model = model.eval().to(self.encoder.device)

    def ours(self, batch_size: int, limit: int | None = None) -> np.ndarray:
        """float32 (N, D), written to a file."""
        recipe = self.encoder.recipe
        pattern = str(self.folder / "shards" / "test-*.tar")
        samples = LabelledSet(
            pattern,
            "speech",
            recipe.data,
            recipe.model,
            batch_size=batch_size,
            limit=limit,
            require_labels=False,
            by_length=BATCHES_BY_LENGTH,
        )
        rows = list(features_of(self.encoder, samples, [-1], "mean", []))
        write_parquet(self.folder / "ours.parquet", iter(rows))
        return np.stack([one.features for one in rows])

    @torch.no_grad()
    def loop(self, batch_size: int, files: list[Path] | None = None) -> np.ndarray:
        """Likewise, the obvious way."""
        vectors = []
        files = self.files if files is None else files
        for first in range(0, len(files), batch_size):
            waves = [soundfile.read(file, dtype="float32")[0] for file in files[first : first + batch_size]]
            given = self.processor(
                waves, sampling_rate=SAMPLE_RATE, padding=True, return_attention_mask=True, return_tensors="pt"
            )
            states_btd = self.model(**given.to(self.encoder.device)).last_hidden_state
            frames = [self.frames_of(len(wave)) for wave in waves]
            vectors += [states[:n].mean(dim=0).cpu().numpy() for states, n in zip(states_btd, frames, strict=True)]
        np.save(self.folder / "loop.npy", vectors)
        return np.stack(vectors)

    def difference(self) -> float:
        """The largest relative difference of a vector of one recording alone."""
        chosen = np.linspace(0, len(self.files) - 1, _CHECKED).astype(int)
        ours, loop = self.ours(1, _CHECKED), self.loop(1, [self.files[k] for k in chosen])
        return relative(ours, loop)


def relative(ours: np.ndarray, others: np.ndarray) -> float:
    """The largest norm of a difference of two vectors, in the norm of ours."""
    return float((np.linalg.norm(ours - others, axis=1) / np.linalg.norm(ours, axis=1)).max())


def row(name: str, sides: Sides, batch_size: int, rounds: int, lengths: str) -> str:
    """One line: both sides in turns, after one round that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "loop": []}
    found: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        order = ("ours", "loop") if number % 2 == 0 else ("loop", "ours")
        for side in order:
            wall, cpu = time.perf_counter(), time.process_time()
            found[side] = sides.ours(batch_size) if side == "ours" else sides.loop(batch_size)
            if number:
                seconds[side].append((time.process_time() - cpu, time.perf_counter() - wall))
    ratios = [sorted(b[k] / a[k] for a, b in zip(seconds["ours"], seconds["loop"], strict=True)) for k in (0, 1)]
    cpu_ours, cpu_loop = (statistics.median(one[0] for one in seconds[side]) for side in ("ours", "loop"))
    return (
        f"{name}, {len(sides.files)} recordings of {lengths}, batches of {batch_size}, {rounds} rounds: processor time "
        f"{cpu_ours:.2f} s, loop {cpu_loop:.2f} s   rounds {ratios[0][0]:.2f}-{ratios[0][-1]:.2f}   wall "
        f"{statistics.median(ratios[1]):.2f}x   vectors differ by {relative(found['ours'], found['loop']):.1e}   "
        f"{statistics.median(ratios[0]):.2f}x"
    )
