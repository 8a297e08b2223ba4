"""Indexes and statistics of shards of arrays, as a user has them; moments against NumPy's."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import image_samples, npy, npz, sound_samples

from d2v_scale.command_line import parse
from d2v_scale.commands import index_shards, inspect_shards
from d2v_scale.conversion.array_statistics import Moments
from d2v_scale.modalities.array.log_mel import Spectrum
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.writing import Sample, write_shard


def samples(arrays: list[np.ndarray]) -> list[Sample]:
    return [{"__key__": f"s{k:03d}", "npy": npy(array), "cls": k % 2} for k, array in enumerate(arrays)]


def foreign(folder: Path, *parts: list[Sample]) -> Path:
    """Tars without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(parts):
        write_shard(folder / f"a-{k:06d}.tar", part)
    for path in folder.glob("*.index"):
        path.unlink()
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a command in this process; returns what it printed, and what it said beside it."""

    def call(command: Callable[[list[str]], int], *arguments: object, status: int = 0) -> tuple[str, str]:
        code = command([*map(str, arguments)])
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.out, printed.err

    return call


def index(run: Callable[..., tuple[str, str]], folder: Path, *more: object, status: int = 0) -> str:
    return run(index_shards.main, folder, "--processes", 1, *more, status=status)[1]


SERIES = [np.random.default_rng(k).standard_normal((3, 10 + k)).astype("f4") for k in range(8)]


def test_tars_of_arrays_are_recognised_and_indexed(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    folder = foreign(tmp_path / "a", samples(SERIES[:5]), samples(SERIES[5:]))
    assert "the shards hold arrays (--modality array)" in index(run, folder)
    made = SetIndex.load(folder / "a.index.json")
    assert (made.content, made.samples, made.classes) == ("array", 8, ["0", "1"])
    assert sum(shard.length for shard in made.shards) == sum(array.shape[1] for array in SERIES)
    record = json.loads((folder / ".index_shards" / "a-000000.json").read_text())
    assert record["layouts"] == {"3 channels and 1 axis": 5}


def test_the_key_of_an_npz_is_part_of_what_was_indexed(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    held = [{"__key__": f"s{k}", "npz": npz(x=array, y=array[:, :4])} for k, array in enumerate(SERIES)]
    folder = foreign(tmp_path / "a", held)
    told = index(run, folder, status=2)
    assert "holds 2 arrays (x, y): name one" in told
    for key, length in (("y", 4 * 8), ("x", sum(array.shape[1] for array in SERIES))):
        index(run, folder, "--key", key)
        assert SetIndex.load(folder / "a.index.json").shards[0].length == length
    told, _ = run(inspect_shards.main, folder, "--check", "--key", "x")
    assert "axis 1: 10 to 17, median 13.5" in told
    assert "integrity: 0 of 8 samples lost" in told
    assert "name one with --key" in run(inspect_shards.main, folder)[0]


def test_samples_of_another_layout_are_told(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    odd = [*SERIES[:4], np.zeros((2, 9), dtype="f4"), np.zeros((3, 4, 4), dtype="i2")]
    folder = foreign(tmp_path / "a", samples(SERIES), samples(odd))
    said = index(run, folder)
    assert "1 samples have 2 channels and 1 axis, the first in a-000001.tar" in said
    assert "a model of the 12 that have 3 channels and 1 axis loses them" in said
    told, _ = run(inspect_shards.main, folder)
    assert "shapes: 3 channels and 1 axis in 12 samples" in told
    assert re.search(r"3 channels and 2 axes in 1 samples, .* the first: s005 of .*a-000001.tar", told)
    assert "types: float32 in 13 samples, int16 in 1 samples" in told
    told, said = run(inspect_shards.main, folder, "--moments")
    assert said.count("left out: s00") == 2
    assert "s004 of" in said


def test_bad_members_are_named_and_lost(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    bad = {
        "pickled objects": np.array([[{}]], dtype=object),
        "nothing but NaN": np.full((3, 5), np.nan),
        "in which there is nothing": np.zeros((3, 0)),
        "channels and 1 to 4 axes": np.zeros(7),
        "no real numbers": np.zeros((3, 5), dtype=complex),
    }
    folder = foreign(tmp_path / "a", samples([*SERIES, *bad.values()]))
    index(run, folder)
    [entry] = SetIndex.load(folder / "a.index.json").shards
    assert entry.lost == len(bad)
    for reason, line in zip(bad, entry.damage, strict=True):
        assert reason in line
    told, _ = run(inspect_shards.main, folder, "--check", status=2)
    assert "13 samples" in told
    assert "integrity: 5 of 13 samples lost" in told


def test_missing_values_are_counted_by_channel(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    arrays = [np.zeros((2, 10), dtype="f4") for _ in range(4)]
    arrays[1][1, :5] = np.nan
    folder = foreign(tmp_path / "a", samples(arrays))
    index(run, folder)
    told, _ = run(inspect_shards.main, folder)
    assert "missing values (NaN): 6.250%, in 1 of 4 samples that were read" in told
    assert "channels that lack most, from 1: 2: 12.500%, 1: 0.000%" in told


def test_moments_are_yaml_for_the_recipe(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    arrays = [array.astype("f8") * [[1], [1e-4], [0]] + [[1e6], [0], [3]] for array in SERIES]
    arrays[2][0, ::2] = np.nan
    folder = foreign(tmp_path / "a", samples(arrays))
    index(run, folder)
    told, said = run(inspect_shards.main, folder, "--moments")
    assert "channels 3 (from 1) do not vary" in said
    settings = yaml.safe_load(told[told.index("normalise:") :])
    joined = np.concatenate(arrays, axis=1)
    assert settings["normalise"] == "moments"
    np.testing.assert_allclose(settings["mean"], np.nanmean(joined, axis=1), rtol=1e-7)
    np.testing.assert_allclose(settings["std"], [*np.nanstd(joined, axis=1)[:2], 1.0], rtol=1e-6)
    assert all(isinstance(value, float) for value in settings["mean"] + settings["std"])


def test_moments_are_of_what_the_transform_makes(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    arrays = [np.exp(array) for array in SERIES]
    arrays[0][0, 0] = 0
    folder = foreign(tmp_path / "a", samples([*arrays, np.full((3, 5), -1.0)]))
    index(run, folder)
    told, said = run(inspect_shards.main, folder, "--moments", "--transform", "log", "--log_floor", "1e-3")
    assert "s008" in said
    assert "has no logarithm" in said
    settings = yaml.safe_load(told[told.index("transform:") :])
    joined = np.log(np.maximum(np.concatenate(arrays, axis=1).astype("f8"), 1e-3))
    assert (settings["transform"], settings["log_floor"]) == ("log", 1e-3)
    np.testing.assert_allclose(settings["mean"], joined.mean(axis=1), rtol=1e-7)
    np.testing.assert_allclose(settings["std"], joined.std(axis=1), rtol=1e-7)
    said = run(inspect_shards.main, folder, "--moments", "--transform", "log", "--log_floor", "0", status=2)[1]
    assert "--log_floor 0 has no logarithm" in said


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 99), st.sampled_from([0.0, 1e8]))
@settings(max_examples=60, deadline=None)
def test_merged_moments_are_those_of_all_values(lengths: list[int], seed: int, offset: float) -> None:
    """Also far from 0, where sums of squares leave nothing of a deviation."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, length)) + offset for length in lengths]
    for array in arrays:
        array[1, rng.random(array.shape[1]) < 0.3] = np.nan
    total = Moments.of(arrays[0])
    for array in arrays[1:]:
        total = total.merged(Moments.of(array))
    joined = np.concatenate(arrays, axis=1)
    for channel, values in enumerate(joined):
        there = values[~np.isnan(values)]
        assert total.count_c[channel] == len(there)
        if len(there):
            np.testing.assert_allclose(total.mean_c[channel], there.mean(), rtol=1e-14, atol=1e-12)
            np.testing.assert_allclose(total.std_c[channel], there.std(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 30), (3, 8, 9), (2, 8, 9), (1, 5, 8, 9), (3, 4, 5, 6, 7), (20, 5000)])
def test_arrays_of_any_axes_are_drawn(run: Callable[..., tuple[str, str]], tmp_path: Path, shape: tuple) -> None:
    arrays = [np.random.default_rng(k).standard_normal(shape).astype("f4") for k in range(3)]
    arrays[0][0, 0] = np.nan
    arrays.append(np.ones((2, 9), dtype="f4"))  # one of another layout among them
    folder = foreign(tmp_path / "a", samples(arrays))
    index(run, folder)
    run(inspect_shards.main, folder, "--out", tmp_path / "out", "--steps", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["array-0.png"]
    assert (tmp_path / "out" / "array-0.png").stat().st_size > 5000


def test_moments_of_no_arrays_are_refused(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    folder = foreign(tmp_path / "a", image_samples(2))
    index(run, folder)
    assert "--moments are of arrays" in run(inspect_shards.main, folder, "--moments", status=2)[1]


def test_moments_of_recordings_are_those_of_the_log_mel_that_a_recipe_makes(
    run: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    """With them values have mean 0 and deviation 1."""
    held = sound_samples(5)
    folder = foreign(tmp_path / "a", held)
    index(run, folder)
    told, _ = run(inspect_shards.main, folder, "--moments", "--recipe", "tiny2_mel")
    said = yaml.safe_load(told[told.index("transform: ") :])
    [stem] = parse(["--recipe", "tiny2_mel"])[0].model.arrays.values()
    waves = [speech.decode(one["flac"]) for one in held]
    values = np.concatenate([Spectrum(wave, stem.log_mel, stem.extents[0]).whole().ravel() for wave in waves])
    assert said["transform"] == "log_mel"
    assert (said["mean"], said["std"]) == (pytest.approx([values.mean()], rel=1e-5), pytest.approx([values.std()]))
    told = run(inspect_shards.main, folder, "--moments", status=2)[1]
    assert "The shards hold recordings, and 0 stems are known that read them. Give --recipe" in told
    told = run(inspect_shards.main, folder, "--moments", "--recipe", "tiny2_speech", status=2)[1]
    assert "and 0 stems are known that read them" in told
