"""Samples for small sets of shards."""

import io
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from d2v_scale.shards.writing import Sample


def image_samples(count: int, side: int = 12) -> list[Sample]:
    """PNGs of noise with labels 0-2."""
    rng = np.random.default_rng(1)
    samples = []
    for k in range(count):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(content, "PNG")
        samples.append({"__key__": f"image-{k:04d}", "png": content.getvalue(), "cls": k % 3})
    return samples


def sound_samples(count: int, rate: int = 16000, seconds: tuple[float, float] = (0.2, 0.8)) -> list[Sample]:
    """FLACs of noise, their lengths between `seconds`."""
    rng = np.random.default_rng(2)
    samples = []
    for k in range(count):
        content = io.BytesIO()
        wave = rng.standard_normal(int(rate * rng.uniform(*seconds))).astype(np.float32) * 0.1
        soundfile.write(content, wave, rate, format="FLAC")
        samples.append({"__key__": f"sound-{k:04d}", "flac": content.getvalue(), "cls": k % 3})
    return samples


def npy(array: np.ndarray) -> bytes:
    """A `.npy` file."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    """A compressed `.npz` file."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def documents(count: int) -> list[str]:
    """Texts of 3 to 60 words."""
    rng = np.random.default_rng(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]
    return [" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(count)]


def images_folder(root: Path) -> Path:
    """Two folders of six PNGs of noise."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for k in range(6):
            path = root / label / f"{k}.v1.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(path)
    return root
