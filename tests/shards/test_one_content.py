"""Samples that hold several contents: one index, and each content read as if it were alone."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_shards import npy

from d2v_scale.commands import index_shards, inspect_shards
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.source import open_source, open_store
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.reading import SampleFault
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_shard


def png(value: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


def flac(samples: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.linspace(-0.5, 0.5, samples, dtype=np.float32), 16_000, format="FLAC")
    return content.getvalue()


WORDS = ["a dog", "a cat on a mat", "house", "the sun above the sea", "tree", "wind"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples; the second has no recording, the third's picture is none."""
    folder = tmp_path_factory.mktemp("several")
    train(WORDS * 20, folder / "t.model", vocab_size=300, fewer=True)
    samples = [
        {"__key__": f"s{k}", "png": png(k), "flac": flac(3200 + k), "txt": word, "cls": k, "json": b"{}"}
        for k, word in enumerate(WORDS)
    ]
    del samples[1]["flac"]
    samples[2]["png"] = b"no picture"
    write_shard(folder / "a-000000.tar", samples)
    arguments = [str(folder / "a-*.tar"), "--tokenizer", str(folder / "t.model"), "--processes", "1"]
    assert index_shards.main(arguments) == 0
    return folder


def test_an_index_counts_the_lengths_and_losses_of_each_content(folder: Path) -> None:
    index = SetIndex.load(folder / "a.index.json")
    assert index.contents == ["image", "recording", "text"]
    assert (index.shards[0].lost, index.shards[0].lost_beside) == (1, [1, 0])
    assert any("s1: recording: has no" in line for line in index.shards[0].damage)
    shards = find_shards(SourceConfig(shards=str(folder)))
    assert reading(shards, "recording").members(0).length_n.tolist() == [3200, -1, 3202, 3203, 3204, 3205]
    assert reading(shards, "image").members(0).length_n.tolist() == [0, 0, -1, 0, 0, 0]
    assert (reading(shards, "text").members(0).length_n > 1).all()
    assert reading(shards, "recording").length_s.tolist() == [3200 + 3202 + 3203 + 3204 + 3205]
    assert reading(shards, "array") is shards
    assert len({reading(shards, content).fingerprint() for content in index.contents}) == 1
    store = open_store(reading(shards, "recording"), DataConfig())
    assert store.read(0, 2).has("flac")  # its picture is lost, its recording is not
    with pytest.raises(SampleFault, match="s1"):
        store.read(0, 1)


def test_one_set_of_shards_is_a_source_of_every_stem(folder: Path) -> None:
    model = ModelConfig(vision=VisionStem(image_size=8, patch_size=4), speech=SpeechStem(), text=TextStem())
    pattern = str(folder / "a.index.json")
    names = ("vision", "speech", "text")
    data = DataConfig(sources=[SourceConfig(shards=pattern, modality=name) for name in names], max_bad_ratio=0.5)
    assert [open_source(data, k, model, 1, 0, 1).items_per_epoch for k in range(2)] == [6, 6]
    assert open_source(data, 2, model, 1, 0, 1).shards.index.content == "text"
    read = LabelledSet(pattern, "vision", data, model).read()
    assert read[0][1].tolist() == [0, 1, 3, 4, 5]
    read = LabelledSet(pattern, "speech", data, model).read()
    assert sorted(label for _, labels in read for label in labels.tolist()) == [0, 2, 3, 4, 5]


def test_several_contents_are_inspected_each(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out = folder / "pictures"
    assert inspect_shards.main([str(folder), "--check", "--out", str(out), "--steps", "1"]) == 2
    told = capsys.readouterr().out
    assert "vision with speech with text: 1 shards, 6 samples" in told
    assert "integrity of images: 1 of 6" in told
    assert "integrity of recordings: 1 of 6" in told
    assert "integrity of texts: 0 of 6" in told
    assert "duration of recordings" in told
    assert sorted(path.name for path in out.glob("*.png")) == [
        "speech-step-0.png",
        "text-step-0.png",
        "vision-step-0.png",
    ]


def test_a_caption_beside_an_array_is_no_line_of_ids(folder: Path, tmp_path: Path) -> None:
    samples = [{"__key__": f"s{k}", "npy": npy(np.ones((2, 9 + k))), "txt": word} for k, word in enumerate(WORDS)]
    write_shard(tmp_path / "a-000000.tar", samples)
    arguments = [str(tmp_path), "--modality", "array,text", "--tokenizer", str(folder / "t.model"), "--processes", "1"]
    assert index_shards.main(arguments) == 0
    shards = find_shards(SourceConfig(shards=str(tmp_path)))
    assert reading(shards, "array").members(0).length_n.tolist() == [9, 10, 11, 12, 13, 14]
    texts = reading(shards, "text")
    assert open_store(texts, DataConfig()).read(0, 1).member(("npy", "txt"))[0] == "txt"
    assert (texts.members(0).length_n > 1).all()
    assert inspect_shards.main([str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize("words", ["vision,vision", "vision,picture", "vision,"])
def test_modalities_are_named_once_and_known(folder: Path, words: str, capsys: pytest.CaptureFixture) -> None:
    assert index_shards.main([str(folder), "--modality", words, "--out", str(folder / "other")]) == 2
    assert "Give one or several of vision, speech, text, array" in capsys.readouterr().err


def test_a_content_that_no_sample_has_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(folder), "--modality", "vision,array", "--out", str(folder / "other"), "--processes", "1"]
    assert index_shards.main(arguments) == 2
    assert "hold no array of a sample that can be read" in capsys.readouterr().err
