"""d2v_scale.data.shard_set: which shards a source names."""

import os
from pathlib import Path

import pytest
from small_shards import image_samples

from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.shard_index import Members, SetIndex
from d2v_scale.data.shard_set import check_before_start, find_shards
from d2v_scale.data.source import open_store
from d2v_scale.data.writing import write_set
from d2v_scale.errors import ConfigError, DataError


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four shards in `shards`, which is in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_set(Path("shards"), "train", "vision", image_samples(8), per_shard=2)
    return tmp_path / "shards"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SourceConfig, list[str]]:
    """100 shards, and the member files that are read from now on."""
    write_set(tmp_path, "train", "vision", image_samples(100, side=4), per_shard=1)
    load, names = Members.load, []

    def counted(path: str | Path) -> Members:
        names.append(Path(path).name)
        return load(path)

    monkeypatch.setattr(Members, "load", counted)
    return SourceConfig(shards=str(tmp_path)), names


def test_the_check_before_the_start_does_not_read_the_index_of_every_shard(
    loaded: tuple[SourceConfig, list[str]],
) -> None:
    """Each rank read those of 2,000 shards: gigabytes."""
    source, names = loaded
    shards = find_shards(source)
    assert check_before_start(shards, source, 0.0) == []
    assert len(names) <= 32
    os.truncate(shards.paths[40], os.path.getsize(shards.paths[40]) - 1500)
    names.clear()
    check_before_start(shards, source, 1.0)
    assert any("000040" in name for name in names)


def test_a_window_of_more_than_64_shards_is_not_opened_again_for_every_sample(
    loaded: tuple[SourceConfig, list[str]],
) -> None:
    source, names = loaded
    data = DataConfig(sources=[source], window_shards=100)
    data.check(["vision"])
    store = open_store(find_shards(source), data)
    for _ in range(2):
        for shard in range(100):
            store.read(shard, 0)
    assert len(names) == 100
    with pytest.raises(ConfigError, match="window_shards"):
        DataConfig(sources=[source], window_shards=257).check(["vision"])


@pytest.mark.parametrize("pattern", ["./shards/*.tar", "shards/train-*.tar", "{}/*.tar", "shards"])
def test_a_deleted_shard_is_missed_however_the_pattern_is_written(shards: Path, pattern: str) -> None:
    pattern = pattern.format(shards)
    assert len(find_shards(SourceConfig(shards=pattern)).paths) == 4
    (shards / "train-000002.tar").unlink()
    with pytest.raises(DataError, match="1 shards are in the index but do not exist"):
        find_shards(SourceConfig(shards=pattern))


@pytest.mark.parametrize(
    "pattern", ["./shards/train-{000000..000003}.tar", "shards/*.tar", "{}/train-*.tar", "train-{000000..000003}.tar"]
)
def test_shards_that_are_not_in_a_given_index_do_not_vanish(shards: Path, pattern: str) -> None:
    pattern = pattern if ".." in pattern else pattern.format(shards)
    index_file = shards / "train.index.json"
    source = SourceConfig(shards=pattern, index=str(index_file))
    assert len(find_shards(source).paths) == 4
    index = SetIndex.load(index_file)
    del index.shards[1]
    index.save(index_file)
    with pytest.raises(DataError, match=r"does not list 1 of the shards .* the first is .*train-000001\.tar"):
        find_shards(source)


def test_a_directory_of_a_training_and_a_held_out_set_is_refused(shards: Path) -> None:
    write_set(shards, "dev", "vision", image_samples(2), per_shard=2)
    with pytest.raises(DataError, match=r"shards holds 2 sets of shards: dev\.index\.json, train\.index\.json"):
        find_shards(SourceConfig(shards="shards"))
    assert len(find_shards(SourceConfig(shards="shards/train.index.json")).paths) == 4
    assert len(find_shards(SourceConfig(shards="shards/*.tar")).paths) == 5


def test_a_given_index_may_lie_elsewhere_and_be_used_in_part(shards: Path) -> None:
    index = SetIndex.load(shards / "train.index.json")
    for entry in index.shards:
        entry.path, entry.members = f"../shards/{entry.path}", f"../shards/{entry.members}"
    index.save(shards.parent / "indexes" / "all.index.json")
    source = SourceConfig(shards="shards/train-00000[12].tar", index="indexes/all.index.json")
    found = find_shards(source)
    assert [os.path.basename(path) for path in found.paths] == ["train-000001.tar", "train-000002.tar"]
    assert found.one(1).members(0).keys_n[0] == b"image-0004"


@pytest.mark.parametrize("pattern", ["train-000000.index", "*.index"])
def test_the_index_of_a_single_shard_is_not_streamed_as_one(shards: Path, pattern: str) -> None:
    assert list(shards.glob(pattern))
    with pytest.raises(DataError, match=r"train-000000\.index is the index of a single shard.*\.index\.json"):
        find_shards(SourceConfig(shards=str(shards / pattern)))
