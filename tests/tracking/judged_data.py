"""Data for `judged_runs`: the demos' with labels shuffled, members cut short or pictures as large as photographs,
silent recordings, and waves as series."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from small_shards import npy

from d2v_scale.conversion import demo
from d2v_scale.modalities.array.members import measure as measure_array
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.shards.writing import Sample, write_set

SERIES = """
name: series
global_batch_size: 16
model:
  visible_only: true
  arrays:
    wave:
      channels: 2
      axes: {time: {patch: 8, extent: 256}}
      normalise: sample
  backbone: {width: 64, heads: 4, ffn: 256, depth: 3, init_std: 0.05}
  predictor: {kind: conv, width: 48, kernel: 5, groups: 4, layers: 2, residual: true}
objective:
  masking: {kind: blocks, prob: 0.5, size: 3, clones: 4}
  target: {tap: ffn, top_k_layers: 3, layer_norm: instance, final_norm: across_batch+layer}
  ema: {start: 0.98, end: 0.9995, anneal_steps: 200}
data:
  sources: [{shards: series/train.index.json, modality: wave}]
optim: {lr: 1.0e-3, schedule: cosine, warmup_steps: 10, max_steps: 60, weight_decay: 0.05, clip: 4.0}
evaluation: {train: series/train.index.json, test: series/test.index.json}
"""


def write(folder: Path) -> None:
    """All of it, once."""
    if (folder / "series.yaml").exists():
        return
    for name in ("vision", "speech", "text", "video", "joint"):
        demo.write(name, folder / demo.ROOT)
    digits, words = folder / demo.ROOT / "vision", folder / demo.ROOT / "speech"
    write_set(folder / "shuffled", "train", "image", list(_shuffled(digits)), per_shard=500)
    write_set(
        folder / "shuffled_speech", "train", "recording", list(_shuffled(words)), per_shard=500, measure=speech.measure
    )
    write_set(folder / "damaged", "train", "image", list(_damaged(digits)), per_shard=500)
    write_set(folder / "large", "train", "image", list(_large(digits)), per_shard=64)
    silent: list[Sample] = [
        {"__key__": f"silent-{k:03d}", "flac": _flac(np.zeros(12_000)), "cls": 0} for k in range(200)
    ]
    write_set(folder / "silent", "train", "recording", silent, per_shard=200, measure=speech.measure)
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 100)):
        waves = [_wave(k % 4, k, rng) for k in range(count)]
        write_set(folder / "series", split, "array", waves, per_shard=300, measure=measure_array)
    (folder / "series.yaml").write_text(SERIES)


def _samples(folder: Path) -> Iterator[Sample]:
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            sample: Sample = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if sample.get("__key__", key) != key:
                    yield sample
                    sample = {}
                file = tar.extractfile(member)
                assert file is not None
                sample |= {"__key__": key, extension: file.read()}
            yield sample


def _shuffled(folder: Path) -> Iterator[Sample]:
    samples = list(_samples(folder))
    order = np.random.default_rng(0).permutation(len(samples))
    for sample, other in zip(samples, order, strict=True):
        yield sample | {"cls": samples[other]["cls"]}


def _damaged(folder: Path) -> Iterator[Sample]:
    """Of ten pictures one is cut short."""
    for k, sample in enumerate(_samples(folder)):
        yield sample | ({"png": sample["png"][:60]} if k % 10 == 0 else {})


def _large(folder: Path) -> Iterator[Sample]:
    for k, sample in enumerate(_samples(folder)):
        if k == 128:
            return
        content = io.BytesIO()
        Image.open(io.BytesIO(sample["png"])).resize((1200, 1200)).save(content, "PNG")
        yield {"__key__": sample["__key__"], "png": content.getvalue(), "cls": sample["cls"]}


def _wave(label: int, number: int, rng: np.random.Generator) -> Sample:
    """Two channels; the label is the frequency."""
    time = np.arange(256) / 256
    phase = rng.uniform(0, 2 * np.pi, (2, 1))
    values = np.sin(2 * np.pi * (3 + 4 * label) * time + phase) + 0.3 * rng.standard_normal((2, 256))
    return {"__key__": f"wave-{number:04d}", "npy": npy(values.astype(np.float32)), "cls": label}


def _flac(wave_t: np.ndarray) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, wave_t, 16_000, format="FLAC")
    return content.getvalue()
