"""What shards hold, apart from the stem that reads it."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from small_shards import image_samples

from d2v_scale.conversion.converters import Conversion, Item, Job
from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.shards.content import CONTENTS, WORDS, length_of, plural, word_of
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_set

IMAGES = ModelConfig(vision=VisionStem(image_size=16, patch_size=4))


def test_every_content_has_its_word_and_its_measure() -> None:
    assert [WORDS[word_of(content)] for content in CONTENTS] == list(CONTENTS)
    assert [plural(content) for content in CONTENTS] == ["images", "recordings", "texts", "arrays"]
    for content in CONTENTS:
        assert callable(measure_of(content))
        assert length_of(content).unit


def earlier(path: Path, word: str = "vision") -> None:
    """Make an index one of an earlier version, which named the stem and not the content."""
    values = json.loads(path.read_text())
    del values["content"]
    path.write_text(json.dumps(values | {"modality": word}))


def test_an_index_says_what_the_shards_hold(tmp_path: Path) -> None:
    made = write_set(tmp_path, "train", "image", image_samples(4), per_shard=2)
    values = json.loads((tmp_path / "train.index.json").read_text())
    assert values["content"] == "image"
    assert "modality" not in values
    assert SetIndex.load(tmp_path / "train.index.json") == made


@pytest.mark.parametrize("content", CONTENTS)
def test_an_index_that_names_the_stem_means_its_content(content: str, tmp_path: Path) -> None:
    index = tmp_path / "a.index.json"
    made = SetIndex(content=content, shards=[])  # type: ignore[arg-type]
    made.save(index)
    earlier(index, word_of(made.content))
    assert asdict(SetIndex.load(index)) == asdict(made)


def test_shards_with_an_earlier_index_train_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a warning, and without a change of the file; beside those of a new one, too."""
    for name in ("old", "new"):
        write_set(tmp_path, name, "image", image_samples(8), per_shard=4)
    earlier(tmp_path / "old.index.json")
    before = (tmp_path / "old.index.json").read_bytes()
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path / "*.tar"))], workers=0)
    with caplog.at_level(logging.WARNING):
        [batch] = next(StepLoader(data, IMAGES, MaskingConfig(kind="random"), seed=1, global_batch_size=16))
    assert len(batch.keys) == 16
    assert not caplog.records
    assert (tmp_path / "old.index.json").read_bytes() == before


@pytest.mark.parametrize("key", ["content", "modality"])
def test_an_index_of_something_else_is_refused_by_name(key: str, tmp_path: Path) -> None:
    write_set(tmp_path, "train", "image", image_samples(2), per_shard=2)
    index = tmp_path / "train.index.json"
    values = json.loads(index.read_text())
    del values["content"]
    index.write_text(json.dumps(values | {key: "smell"}))
    with pytest.raises(DataError, match="'smell', which is none of image, recording, text"):
        find_shards(SourceConfig(shards=str(index)))


def test_sets_of_two_contents_are_no_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path, name, "image", image_samples(2), per_shard=2)
    earlier(tmp_path / "b.index.json", "speech")
    with pytest.raises(DataError, match="another content or tokenizer"):
        find_shards(SourceConfig(shards=str(tmp_path / "*.tar")))


def test_what_an_earlier_version_converted_is_not_converted_again(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"image")
    item = Item("a", path=str(image))
    job = Job(tmp_path / "train-000000.tar", Conversion("image", resize=64), [item])
    inputs: dict[str, object] = {"modality": "vision", "resize": 64, "tokenizer": None, "tokenizer_sha256": None}
    inputs |= {"ids": False, "max_pixels": 100_000_000, "rules": 3}
    state = hashlib.sha256(repr(inputs).encode())
    state.update(repr((item, (5, image.stat().st_mtime_ns))).encode())
    assert job.digest() == state.hexdigest()
