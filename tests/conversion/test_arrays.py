"""Folders of arrays to shards, as a user makes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2v_scale.commands.make_shards import main
from d2v_scale.conversion.array_members import ArrayReading, Layout
from d2v_scale.conversion.arrays import usual_layout
from d2v_scale.data.config import SourceConfig
from d2v_scale.shards.array_files import npy_of, open_npy
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards


@pytest.fixture
def make(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `d2v shards arrays` in this process; returns what it printed."""

    def call(*arguments: object, status: int = 0) -> str:
        code = main(["arrays", *map(str, arguments), "--processes", "1"])
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.out + printed.err

    return call


def series_folder(root: Path, count: int = 6) -> Path:
    """Two folders of series of 3 channels and different lengths, in a file of each kind by turns."""
    rng = np.random.default_rng(0)
    for k in range(count):
        folder = root / ("walk", "run")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = rng.standard_normal((3, 10 + k)).astype(np.float32)
        match k % 3:
            case 0:
                np.save(folder / f"{k}.npy", values)
            case 1:
                np.savez_compressed(folder / f"{k}.npz", values=values)
            case 2:
                np.savetxt(folder / f"{k}.csv", values.T, delimiter=",", header="x,y,z", comments="")
    return root


def stored(out: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Values and labels by the name of their files."""
    found = find_shards(SourceConfig(shards=str(out)))
    assert found.index is not None
    store, classes, held = SampleStore(found), found.index.classes, {}
    for shard in range(len(found.paths)):
        for number in range(found.entries[shard].samples):
            sample = store.read(shard, number)
            members = sample.members()
            values = npy_of(members["npy"]).whole()
            held[sample.key.split("-", 1)[1]] = values, classes[int(members["cls"])] if "cls" in members else ""
    return held


def test_files_of_each_kind_become_one_set(make: Callable[..., str], tmp_path: Path) -> None:
    source = series_folder(tmp_path / "in")
    told = make(source, tmp_path / "out", "--per_shard", 4)
    assert "arrays of 3 channels and 1 axis" in told
    assert "2 shards, 6 samples" in told
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.content, index.classes, sum(shard.length for shard in index.shards)) == (
        "array",
        ["run", "walk"],
        sum(range(10, 16)),
    )
    held = stored(tmp_path / "out")
    assert {name: label for name, (_, label) in held.items()} == {str(k): ("walk", "run")[k % 2] for k in range(6)}
    np.testing.assert_array_equal(held["0"][0], np.load(source / "walk" / "0.npy"))
    np.testing.assert_array_equal(held["1"][0], np.load(source / "run" / "1.npz")["values"])
    np.testing.assert_allclose(held["2"][0], np.loadtxt(source / "walk" / "2.csv", delimiter=",", skiprows=1).T, 1e-6)
    # A run that was interrupted goes on: the shard that is there stays, and the other is the same again.
    first, second = (tmp_path / "out" / f"train-{k:06d}.tar" for k in range(2))
    before, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    make(source, tmp_path / "out", "--per_shard", 4)
    assert (first.stat().st_mtime_ns, second.read_bytes()) == (before, content)


def test_labels_are_of_a_pattern_and_columns_of_a_choice(make: Callable[..., str], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for k in range(4):
        (source / f"s{k % 2}_take{k}.csv").write_text(f"t;ecg;emg\n0;{k};7\n1;;8\n")
    make(source, tmp_path / "out", "--label", r"s(\d)_", "--columns", "emg,ecg", "--delimiter", ";")
    held = stored(tmp_path / "out")
    np.testing.assert_array_equal(held["s1_take3"][0], np.array([[7, 8], [3, np.nan]], dtype=np.float32))
    assert {label for _, label in held.values()} == {"0", "1"}
    # Another choice is another set: what was written of the first is written again.
    make(source, tmp_path / "out", "--columns", "2", "--header", "yes")
    assert stored(tmp_path / "out")["s1_take3"][0].shape == (1, 2)


def test_every_bad_file_is_named_with_its_reason_and_counted(make: Callable[..., str], tmp_path: Path) -> None:
    """Also the first of all by name, which decides nothing."""
    source = series_folder(tmp_path / "in", 12)
    bad = {
        "a.npy": (np.zeros((5, 9)), "has 5 channels and 1 axis; its set has 3 channels and 1 axis"),
        "b.npy": (np.zeros((3, 9, 9)), "has 3 channels and 2 axes; its set"),
        "c.npy": (np.array([[{}]], dtype=object), "pickled objects, which are never loaded"),
        "d.npy": (np.zeros((3, 9), dtype=complex), "no real numbers"),
        "e.npy": (np.array(1.0), "has the shape ()"),
        "f.npy": (np.zeros((3, 0)), "in which there is nothing"),
        "g.npy": (np.full((3, 9), np.nan), "holds nothing but NaN"),
        "h.npy": (np.full((3, 9), np.inf), "infinite"),
        "i.npy": (None, "is empty"),
        "j.csv": (None, "is empty"),
    }
    for name, (values, _) in bad.items():
        path = source / "run" / name
        path.write_bytes(b"") if values is None else np.save(path, values)
    told = make(source, tmp_path / "out", "--max_bad", 0.5)
    for name, (_, reason) in bad.items():
        assert f"{name}: " in told
        assert reason in told.split(f"{name}: ")[1].splitlines()[0]
    assert "12 samples" in told
    assert "10 skipped" in told
    assert len(SetIndex.load(tmp_path / "out" / "train.index.json").skipped) == 10
    told = make(source, tmp_path / "other", status=2)
    assert "10 of 22 files or documents could not be read, more than --max_bad 0.01; no index was written" in told
    assert not (tmp_path / "other" / "train.index.json").exists()


def test_a_crop_of_a_long_member_reads_its_slice_alone(make: Callable[..., str], tmp_path: Path) -> None:
    """Whatever the file that it was made of: compressed, of the other order, big endian."""
    values = np.asfortranarray(np.arange(200_000, dtype=">f8").reshape(2, -1))
    (tmp_path / "in").mkdir()
    np.savez_compressed(tmp_path / "in" / "a.npz", values)
    make(tmp_path / "in", tmp_path / "out")
    _, read_at, size = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out")))).member(0, 0, ("npy",))
    read = []

    def counted(start: int, count: int) -> bytes:
        read.append(count)
        return read_at(start, count)

    np.testing.assert_array_equal(open_npy(counted, size).slice(1, 70_000, 70_100), values[:, 70_000:70_100])
    assert sum(read) < size / 500


def test_what_most_files_have_is_the_layout(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k:03d}.npy" for k in range(300)]
    for k, path in enumerate(paths):
        np.save(path, np.zeros((2, 3) if k % 3 else (2, 3, 4)))
    assert usual_layout(paths, ArrayReading()) == Layout(2, 1)
    paths[0].write_bytes(b"nothing")
    assert usual_layout(paths[:1], ArrayReading()) is None


def test_splits_in_one_folder_have_one_layout(make: Callable[..., str], tmp_path: Path) -> None:
    make(series_folder(tmp_path / "in"), tmp_path / "out")
    make(series_folder(tmp_path / "test"), tmp_path / "out", "--prefix", "test")
    (tmp_path / "more" / "run").mkdir(parents=True)
    np.save(tmp_path / "more" / "run" / "a.npy", np.zeros((2, 9)))
    told = make(tmp_path / "more", tmp_path / "out", "--prefix", "more", status=2)
    assert "SRC have 2 channels and 1 axis, those of" in told
    assert "test.index.json have 3 channels and 1 axis. Give another OUT." in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--columns", "a,,b"], "names an empty column"),
        (["--delimiter", ",,"], "is not one character"),
        (["--label", "x"], "has no group"),
    ],
)
def test_options_that_mean_nothing_end_in_a_sentence(
    make: Callable[..., str], tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in make(series_folder(tmp_path / "in"), tmp_path / "out", *options, status=2)
