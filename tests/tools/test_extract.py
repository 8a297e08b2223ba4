"""d2v extract"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_shards import image_samples, sound_samples
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.commands import extract as extract_command
from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import EXIT_PARTIAL
from d2v_scale.evaluation import extracted, extracting
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.modalities.speech.decoder import decode, normalize
from d2v_scale.modalities.speech.decoder import measure as measure_speech
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, VisionStem
from d2v_scale.recipe import Recipe
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_set, write_shard


class Colours:
    """An encoder whose features are the patches' mean colours, in layer 1 negated."""

    device = torch.device("cpu")
    source, step, weights = Path("checkpoint"), 7, "teacher"
    recipe = Recipe(model=ModelConfig(vision=VisionStem(image_size=8, patch_size=4)))

    def hidden_states(self, batch: Batch, layers: list[int]) -> list[Tensor]:
        patches_btd = torch.nn.functional.avg_pool2d(batch.inputs, 4).flatten(2).transpose(1, 2)
        return [[patches_btd, -patches_btd][layer] for layer in layers]

    def valid_positions(self, batch: Batch) -> None:
        return None


@pytest.fixture
def extract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    samples = image_samples(25)
    samples[3]["png"] = b"no image"
    del samples[5]["cls"]
    write_set(tmp_path / "shards", "test", "image", samples, per_shard=10)
    monkeypatch.setattr(FrozenEncoder, "load", lambda *_: Colours())

    def call(*arguments: object, shards: Path = tmp_path / "shards" / "test-*.tar") -> int:
        return extract_command.main(["checkpoint", str(shards), *map(str, arguments)])

    return call


def test_processes_share_the_shards_and_finished_ones_are_not_made_again(
    extract: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert extract(tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["test-000001.parquet"]
    capsys.readouterr()
    assert extract(tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "test-000000.parquet: 9 samples, 1 lost" in printed
    assert "test-000001" not in printed
    assert "1 of 3 files were there already" in printed
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


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_shards_that_hold_nothing_or_are_cut_off_end_no_extraction(
    extract: Callable[..., int], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them ended it for all others, with exit code 2."""
    folder, out = tmp_path / "shards", tmp_path / "out"
    bad = [{"__key__": f"bad-{k}", "png": b"no image"} for k in range(3)]
    entries = [write_shard(folder / "test-empty.tar", []), write_shard(folder / "test-nothing.tar", bad)]
    index = SetIndex.load(folder / "test.index.json")
    index.shards = [entries[0], *index.shards, entries[1]]
    index.save(folder / "test.index.json")
    whole = (folder / "test-000001.tar").read_bytes()
    (folder / "test-000001.tar").write_bytes(whole[: len(whole) // 2])
    for times in range(2):
        assert extract(out, "--format", form, shards=folder / "test.index.json") == EXIT_PARTIAL
        printed = capsys.readouterr()
        for name in ("test-empty", "test-000001", "test-nothing"):
            assert f"not extracted: {folder}/{name}.tar: " in printed.err
        assert "3 of 5 shards have no file" in printed.err
        suffix = ".tar" if form == "shards" else ".parquet"
        assert sorted(path.stem for path in out.glob(f"*{suffix}")) == ["test-000000", "test-000002"]
        assert ("2 of 5 files were there already" in printed.out) == bool(times)
    if form == "shards":
        assert find_shards(SourceConfig(shards=str(out))).samples_s.tolist() == [9, 5]
    assert len(json.loads((out / "_extract.json").read_text())["without"]) == 3
    # What is restored is extracted by a later call.
    (folder / "test-000001.tar").write_bytes(whole)
    assert extract(out, "--format", form, shards=folder / "test.index.json") == EXIT_PARTIAL
    assert (out / f"test-000001{suffix}").exists()
    assert len(json.loads((out / "_extract.json").read_text())["without"]) == 2


def test_nothing_to_extract_is_bad_input(extract: Callable[..., int], tmp_path: Path) -> None:
    write_set(tmp_path / "empty", "e", "image", [{"__key__": "a", "png": b"no image"}], per_shard=1)
    assert extract(tmp_path / "out", shards=tmp_path / "empty") == 2


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


def test_features_of_another_encoder_or_shard_are_refused_not_kept(
    extract: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever lay there was kept without a word."""
    out = tmp_path / "out"
    assert extract(out, shards=tmp_path / "shards" / "test-000000.tar") == 0
    assert extract(out) == 0  # more shards of the same set

    def refused(*options: object) -> str:
        capsys.readouterr()
        assert extract(out, *options) == 2
        return capsys.readouterr().err

    assert "layers [-1], not [0]" in refused("--layers", 0)
    assert "pool mean, not none" in refused("--pool", "none")
    for name, value in (("step", 8), ("weights", "student"), ("source", Path("other"))):
        with monkeypatch.context() as changed:
            changed.setattr(Colours, name, value)
            assert f"not {Path('other').resolve() if name == 'source' else value}" in refused()
    assert extract(out) == 0
    write_set(tmp_path / "shards", "test", "image", image_samples(25, side=16), per_shard=10)
    assert "test-000000.parquet is of another shard" in refused()
    (out / "_extract.json").unlink()
    assert "does not say what it is of" in refused()


class Places:
    """An encoder whose features are at each sample of the wave its number, and how long the batch's rows are."""

    device = torch.device("cpu")
    source, step, weights = Path("checkpoint"), 7, "teacher"
    recipe = Recipe(model=ModelConfig(speech=SpeechStem()))
    lengths: ClassVar[list[list[int]]] = []

    def hidden_states(self, batch: Batch, layers: list[int]) -> list[Tensor]:
        del layers
        self.lengths.append([len(wave) if valid is None else int(valid.sum()) for wave, valid in self.rows(batch)])
        return [batch.inputs[:, ::1000, None]]

    def valid_positions(self, batch: Batch) -> Tensor | None:
        return None if batch.valid is None else batch.valid[:, ::1000]

    def rows(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
        return zip(batch.inputs, [None] * len(batch.inputs) if batch.valid is None else batch.valid, strict=True)


def test_recordings_are_computed_by_length_and_written_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = sound_samples(21, seconds=(0.2, 2.0))
    samples[4]["flac"] = b"no sound"
    index = write_set(tmp_path, "test", "recording", samples, per_shard=21, measure=measure_speech)
    monkeypatch.setattr(FrozenEncoder, "load", lambda *_: Places())
    monkeypatch.setattr(extracting, "BATCHES_BY_LENGTH", 2)
    monkeypatch.setattr(Places.recipe.data.speech, "max_seconds", 1.9)
    arguments = ["checkpoint", str(tmp_path / "test-*.tar"), str(tmp_path / "out"), "--pool", "none"]
    assert extract_command.main([*arguments, "--batch_size", "5"]) == 0
    for first in range(0, len(Places.lengths), 2):
        window = [length for batch in Places.lengths[first : first + 2] for length in batch]
        assert window == sorted(window, reverse=True)
    assert max(map(max, Places.lengths)) == 1.9 * 16000
    table = pyarrow.parquet.read_table(tmp_path / "out")
    assert table["key"].to_pylist() == [sample["__key__"] for k, sample in enumerate(samples) if k != 4]
    assert index.shards[0].samples == 21
    for k, states in zip([k for k in range(21) if k != 4], table["features"].to_pylist(), strict=True):
        wave = normalize(decode(samples[k]["flac"]))[: round(1.9 * 16000) : 1000]
        np.testing.assert_allclose(np.array(states)[:, 0], wave.astype(np.float16))
    printed = capsys.readouterr()
    assert "20 samples, 1 lost, of" in printed.out
    assert "the beginning alone" in printed.out
    assert f"{samples[4]['__key__']}: " in printed.err
    lost = json.loads((tmp_path / "out" / "_extract.json").read_text())["lost"]
    assert [line.split(":")[0] for line in lost["test-000000.parquet"]] == [samples[4]["__key__"]]


def test_blocks_that_there_are_none_of_are_refused(
    extract: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with an IndexError."""
    assert extract(tmp_path / "out", "--layers", 99) == 2
    assert "no main block 99" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lengths", [[5, 0, 3, 4], None])
def test_parquet_is_written_in_row_groups(
    extract: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None
) -> None:
    """A whole shard of (T, D) features was held as Python numbers."""
    monkeypatch.setattr(extracted, "_ROW_GROUP_BYTES", 24)
    rng = np.random.default_rng(0)
    made = [rng.random((n, 3)).astype(np.float16) for n in lengths] if lengths else list(rng.random((4, 3), np.float32))
    rows = (extracted.Extracted(f"k{k}", k, features) for k, features in enumerate(made))
    assert extracted.write_parquet(tmp_path / "a.parquet", rows) == 4
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 2
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table["features"].to_pylist() == [features.tolist() for features in made]
    assert table["label"].to_pylist() == [0, 1, 2, 3]


def test_tasks_of_slurm_take_the_gpus_of_their_node_in_turn(
    extract: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_PROCID", "13"), ("SLURM_NTASKS", "16"), ("SLURM_LOCALID", "5"), ("SLURM_STEP_ID", "0")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for gpus, expected in ((8, "5"), (1, "0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert extracting.process_number() == (13, 16)
        assert os.environ.pop("LOCAL_RANK") == expected
