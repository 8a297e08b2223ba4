"""Small sets of shards of every modality, written once per test session."""

from pathlib import Path

import pytest
from small_shards import documents, image_samples, sound_samples

from d2v_scale.data import speech
from d2v_scale.data.text import TokenCounter
from d2v_scale.data.tokenizer import train
from d2v_scale.data.writing import Sample, write_set


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 20 images, the last of 10."""
    out = tmp_path_factory.mktemp("images")
    write_set(out, "train", "image", image_samples(90), per_shard=20, classes=["a", "b", "c"])
    return out


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of recordings."""
    out = tmp_path_factory.mktemp("sounds")
    write_set(out, "train", "recording", sound_samples(75), per_shard=20, measure=speech.measure)
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
