"""Small sets of shards of every modality, written once per test session."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_scale.data import speech
from d2v_scale.data.text import TokenCounter
from d2v_scale.data.tokenizer import train
from d2v_scale.data.writing import Sample, write_set


def image_samples(count: int, side: int = 12) -> list[Sample]:
    """PNGs of noise with labels 0-2."""
    rng = np.random.default_rng(1)
    samples = []
    for k in range(count):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(content, "PNG")
        samples.append({"__key__": f"image-{k:04d}", "png": content.getvalue(), "cls": k % 3})
    return samples


def sound_samples(count: int, rate: int = 16000) -> list[Sample]:
    """FLACs of 0.2 to 0.8 seconds."""
    rng = np.random.default_rng(2)
    samples = []
    for k in range(count):
        content = io.BytesIO()
        wave = rng.standard_normal(int(rate * rng.uniform(0.2, 0.8))).astype(np.float32) * 0.1
        soundfile.write(content, wave, rate, format="FLAC")
        samples.append({"__key__": f"sound-{k:04d}", "flac": content.getvalue(), "cls": k % 3})
    return samples


def documents(count: int) -> list[str]:
    """Texts of 3 to 60 words."""
    rng = np.random.default_rng(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]
    return [" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 20 images, the last of 10."""
    out = tmp_path_factory.mktemp("images")
    write_set(out, "train", "vision", image_samples(90), per_shard=20, classes=["a", "b", "c"])
    return out


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of recordings."""
    out = tmp_path_factory.mktemp("sounds")
    write_set(out, "train", "speech", sound_samples(75), per_shard=20, measure=speech.measure)
    return out


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of documents and their tokenizer."""
    out = tmp_path_factory.mktemp("texts")
    tokenizer = out / "tokenizer.model"
    train(documents(200), tokenizer, vocab_size=330)
    samples: list[Sample] = [{"__key__": f"document-{k:04d}", "txt": text} for k, text in enumerate(documents(110))]
    write_set(out, "train", "text", samples, per_shard=40, measure=TokenCounter(tokenizer), tokenizer=tokenizer)
    return out
