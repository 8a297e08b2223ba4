"""tools/extract.py"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_shards import image_samples
from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.data.config import SourceConfig
from d2v_scale.data.reading import SampleStore
from d2v_scale.data.shard_index import SetIndex
from d2v_scale.data.shard_set import find_shards
from d2v_scale.data.writing import write_set
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.model.config import ModelConfig, SpeechStem, VisionStem
from d2v_scale.recipe import Recipe


class Colours:
    """An encoder whose features are the patches' mean colours, in layer 1 negated."""

    device = torch.device("cpu")
    recipe = Recipe(model=ModelConfig(vision=VisionStem(image_size=8, patch_size=4)))

    def hidden_states(self, batch: Batch) -> list[Tensor]:
        patches_btd = torch.nn.functional.avg_pool2d(batch.inputs, 4).flatten(2).transpose(1, 2)
        return [patches_btd, -patches_btd]

    def valid_positions(self, batch: Batch) -> None:
        return None


@pytest.fixture
def extract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    samples = image_samples(25)
    samples[3]["png"] = b"no image"
    del samples[5]["cls"]
    write_set(tmp_path / "shards", "test", "vision", samples, per_shard=10)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    monkeypatch.setattr(FrozenEncoder, "load", lambda *_: Colours())

    def call(*arguments: object, shards: Path = tmp_path / "shards" / "test-*.tar") -> int:
        monkeypatch.setattr(sys, "argv", ["extract", "checkpoint", str(shards), *map(str, arguments)])
        return importlib.import_module("extract").main()

    return call


def test_processes_share_the_shards_and_finished_ones_are_not_made_again(
    extract: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert extract(tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test-000001.parquet"]
    capsys.readouterr()
    assert extract(tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "test-000000.parquet: 9 samples, 1 lost" in printed
    assert "test-000001" not in printed
    table = pyarrow.parquet.read_table(tmp_path / "out" / "test-000000.parquet")
    assert table["key"].to_pylist() == [f"image-{k:04d}" for k in range(10) if k != 3]
    assert table["label"].to_pylist() == [-1 if k == 5 else k % 3 for k in range(10) if k != 3]
    assert len(table["features"][0]) == 3


def test_features_of_every_position_become_shards_that_can_be_read(extract: Callable[..., int], tmp_path: Path) -> None:
    assert extract(tmp_path / "out", "--format", "shards", "--pool", "none", "--layers", 0) == 0
    found = find_shards(SourceConfig(shards=str(tmp_path / "out")))
    assert found.samples_s.tolist() == [9, 10, 5]
    sample = SampleStore(found).read(2, 4)
    import io

    assert np.load(io.BytesIO(sample.member(("npy",))[1])).shape == (4, 3)
    assert sample.key == "image-0024"


def test_the_index_of_the_shards_may_lie_elsewhere(extract: Callable[..., int], tmp_path: Path) -> None:
    index = SetIndex.load(tmp_path / "shards" / "test.index.json")
    for entry in index.shards:
        entry.path = f"../shards/{entry.path}"
        (tmp_path / "indexes").mkdir(exist_ok=True)
        (tmp_path / "shards" / entry.members).rename(tmp_path / "indexes" / entry.members)
    (tmp_path / "shards" / "test.index.json").unlink()
    index.save(tmp_path / "indexes" / "test.index.json")
    assert extract(tmp_path / "out", shards=tmp_path / "indexes" / "test.index.json") == 0
    assert pyarrow.parquet.read_table(tmp_path / "out" / "test-000002.parquet").num_rows == 5


def test_a_stem_is_chosen_where_there_are_several_and_must_be_there(
    extract: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(tmp_path / "out", "--modality", "text") == 2
    assert "stems for vision" in capsys.readouterr().err
    both = ModelConfig(vision=Colours.recipe.model.vision, speech=SpeechStem())
    monkeypatch.setattr(Colours, "recipe", Recipe(model=both))
    assert extract(tmp_path / "out") == 2
    assert "Choose one with --modality" in capsys.readouterr().err
    assert extract(tmp_path / "out", "--modality", "vision") == 0
