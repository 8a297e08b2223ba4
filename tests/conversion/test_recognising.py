"""What the first sample of a tar says of all."""

from pathlib import Path

import numpy as np
import pytest
from small_shards import npy

from d2v_scale.conversion.recognising import recognised
from d2v_scale.errors import DataError
from d2v_scale.shards.writing import write_shard


@pytest.mark.parametrize(
    ("members", "contents"),
    [
        ({"jpg": b"x", "cls": 1, "txt": "a cat", "npy": npy(np.zeros((2, 3)))}, ["image"]),
        ({"flac": b"x", "txt": "hello"}, ["recording"]),
        ({"jpg": b"x", "wav": b"x"}, ["image", "recording"]),
        ({"txt": "words", "txt2": "more"}, ["text"]),
        ({"npy": npy(np.arange(5))}, ["text"]),
        ({"npy": npy(np.zeros((1, 5)))}, ["array"]),
        ({"npz": b"x", "cls": 0}, ["array"]),
    ],
)
def test_the_first_sample_tells_what_shards_hold(tmp_path: Path, members: dict, contents: list[str]) -> None:
    tar = tmp_path / "a.tar"
    write_shard(tar, [{"__key__": "a", **members}, {"__key__": "b", "mp4": b"x"}])
    assert recognised(str(tar)) == contents


def test_a_text_beside_others_is_one_of_them_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    write_shard(tar, [{"__key__": "a", "png": b"x", "flac": b"x", "txt": "a"}])
    assert recognised(str(tar), with_text=True) == ["image", "recording", "text"]
    write_shard(tar, [{"__key__": "a", "npz": b"x", "txt": "a"}])
    assert recognised(str(tar), with_text=True) == ["array", "text"]


@pytest.mark.parametrize("members", [{"cls": 1}, {"npz": b"x", "txt": "a"}, {"npy": b"x"}])
def test_what_nobody_could_tell_is_asked_for(tmp_path: Path, members: dict) -> None:
    tar = tmp_path / "a.tar"
    write_shard(tar, [{"__key__": "a", **members}])
    with pytest.raises(DataError, match=r"cannot be told from .*--modality"):
        recognised(str(tar))


@pytest.mark.parametrize("path", ["https://h/a.tar", "pipe:cat a.tar"])
def test_shards_that_are_not_local_are_not_fetched_to_tell(path: str) -> None:
    with pytest.raises(DataError, match="--modality"):
        recognised(path)
