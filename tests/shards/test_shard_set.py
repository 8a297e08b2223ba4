"""d2v_scale.shards.shard_set: which shards a source names."""

import os
from pathlib import Path

import pytest
from small_shards import image_samples

from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.source import open_store
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.shards.shard_index import Members, SetIndex, index_shard
from d2v_scale.shards.shard_set import check_before_start, find_shards
from d2v_scale.shards.writing import write_set


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four shards in `shards`, which is in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_set(Path("shards"), "train", "image", image_samples(8), per_shard=2)
    return tmp_path / "shards"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SourceConfig, list[str]]:
    """100 shards, and the member files that are read from now on."""
    write_set(tmp_path, "train", "image", image_samples(100, side=4), per_shard=1)
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
    assert check_before_start(shards, source, "image", 0.0) == []
    assert len(names) <= 32
    os.truncate(shards.paths[40], os.path.getsize(shards.paths[40]) - 1500)
    names.clear()
    check_before_start(shards, source, "image", 1.0)
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
    write_set(shards, "dev", "image", image_samples(2), per_shard=2)
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


def test_brackets_in_a_folder_are_a_name_and_braces_go_with_globs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("[v1]", "x", "y", "{z}"):
        write_set(Path(folder), folder.strip("[{}]"), "image", image_samples(4), per_shard=2)

    def names(pattern: str, index: str | None = None) -> list[str]:
        found = find_shards(SourceConfig(shards=pattern, index=index))
        assert found.indexed
        return [os.path.relpath(path, tmp_path) for path in found.paths]

    bracketed = ["[v1]/v1-000000.tar", "[v1]/v1-000001.tar"]
    for pattern in ("[v1]", "[v1]/*.tar", "[v1]/v1-00000[01].tar", "[v1]/v1-{000000..000001}.tar", f"{tmp_path}/[v1]"):
        assert names(pattern) == bracketed, pattern
        assert names(pattern, "[v1]/v1.index.json") == bracketed, pattern
    assert names("[v1]/v1.index.json") == bracketed
    both = ["x/x-000000.tar", "x/x-000001.tar", "y/y-000000.tar", "y/y-000001.tar"]
    for pattern in (
        "{x,y}/*.tar",
        "[xy]/*.tar",
        "./{x,y}/?-00000*.tar",
        f"{tmp_path}/{{x,y}}/*-{{000000..000001}}.tar",
    ):
        assert names(pattern) == both, pattern
    assert names("{x,[x],./x}/*.tar") == both[:2]
    assert names("{z}") == ["{z}/z-000000.tar", "{z}/z-000001.tar"]
    with pytest.raises(DataError, match=r"names .*x/x-000000\.tar twice"):
        find_shards(SourceConfig(shards="{x,x}/x-000000.tar"))
    with pytest.raises(DataError, match="has a brace too many"):
        find_shards(SourceConfig(shards="x/{0.tar"))
    for pattern in ("[v1]", "[v1]/*.tar", "{[v1],x}/*.tar"):
        (tmp_path / "[v1]" / "v1-000001.tar").rename(tmp_path / "away")
        with pytest.raises(DataError, match="1 shards are in the index but do not exist"):
            find_shards(SourceConfig(shards=pattern))
        (tmp_path / "away").rename(tmp_path / "[v1]" / "v1-000001.tar")


def test_an_index_behind_a_symbolic_link_finds_its_shards(tmp_path: Path) -> None:
    """`..` led to the folder above the link, not above what it leads to."""
    write_set(tmp_path / "real" / "deep" / "shards", "a", "image", image_samples(4), per_shard=2)
    (tmp_path / "elsewhere" / "indexes").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "indexes")
    (tmp_path / "data").symlink_to(tmp_path / "real" / "deep")
    tars = sorted((tmp_path / "data" / "shards").glob("*.tar"))
    entries = [index_shard(tar, tmp_path / "out" / f"{tar.stem}.index", tmp_path / "out") for tar in tars]
    SetIndex(content="image", shards=entries).save(tmp_path / "out" / "a.index.json")
    for index in (tmp_path / "out", tmp_path / "elsewhere" / "indexes"):
        found = find_shards(SourceConfig(shards=str(index / "a.index.json")))
        assert [len(open_store(found, DataConfig()).members(k)) for k in range(2)] == [2, 2]
        open_store(found, DataConfig()).read(1, 1)
        for folder in (tmp_path / "data" / "shards", tmp_path / "real" / "deep" / "shards"):
            source = SourceConfig(shards=f"{folder}/*1.tar", index=str(index / "a.index.json"))
            assert len(find_shards(source).paths) == 1
    assert len(find_shards(SourceConfig(shards=f"{tmp_path}/data/shards/*.tar")).paths) == 2


def test_an_index_of_an_earlier_version_is_said_to_be_one(tmp_path: Path) -> None:
    write_set(tmp_path, "a", "image", image_samples(4), per_shard=2)
    path = tmp_path / "a.index.json"
    source = SourceConfig(shards=str(path))
    assert check_before_start(find_shards(source), source, "image", 0.0) == []
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    [warning] = check_before_start(find_shards(source), source, "image", 0.0)
    assert "was made by an earlier version (index format 1)" in warning
    index = SetIndex.load(path)
    index.save(path)
    assert SetIndex.load(path).format == 1


def test_a_set_of_lost_samples_alone_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "a", "image", image_samples(4), per_shard=2, measure=lambda members: -1)
    source = SourceConfig(shards=str(tmp_path))
    with pytest.raises(DataError, match=r"None of the 4 samples .* could be read"):
        check_before_start(find_shards(source), source, "image", 1.0)


def test_a_glob_of_indexes_is_the_one_that_it_finds_or_refused_with_all(shards: Path) -> None:
    """`--data 'shards/*.index.json'` was looked for under that very name."""
    assert len(find_shards(SourceConfig(shards="shards/*.index.json")).paths) == 4
    with pytest.raises(DataError, match=r"No index matches 'nowhere/\*\.index\.json'\. Check the path"):
        find_shards(SourceConfig(shards="nowhere/*.index.json"))
    write_set(shards, "val", "image", image_samples(2), per_shard=2)
    with pytest.raises(DataError, match=r"matches 2 indexes, .*train\.index\.json and .*val\.index\.json\. A source"):
        find_shards(SourceConfig(shards=f"{shards}/*.index.json"))


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("shards/train-000000.tar,shards/train-000001.tar", "'{shards/train-000000.tar,shards/train-000001.tar}'"),
        ("shards/train-00000[01].tar,shards/train-000002.tar", "'{shards/train-00000"),
        ("shards/train.index.json,shards/train.index.json", "name each set in data.sources"),
        ("shards,shards/", "name each set in data.sources"),
    ],
)
def test_paths_separated_by_commas_are_answered_with_how_to_write_them(shards: Path, pattern: str, remedy: str) -> None:
    """They were looked for as one file of that name."""
    with pytest.raises(DataError, match="names 2 paths, separated by commas") as caught:
        find_shards(SourceConfig(shards=pattern))
    assert remedy in str(caught.value)


def test_a_comma_in_a_name_or_in_braces_is_no_list(shards: Path) -> None:
    assert find_shards(SourceConfig(shards="shards/train-00000{1,2}.tar")).paths[0].endswith("1.tar")
    assert len(find_shards(SourceConfig(shards="{shards/train-000001.tar,shards/train-000002.tar}")).paths) == 2
    (shards / "train-000000.tar").rename(shards.parent / "a,b.tar")
    assert find_shards(SourceConfig(shards="a,b.tar")).paths == ["a,b.tar"]
