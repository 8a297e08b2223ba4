"""d2v_scale.conversion.demo.moving_digits"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from d2v_scale.commands.make_shards import main
from d2v_scale.conversion.demo.moving_digits import DIRECTIONS, FRAMES, SIDE, moving
from d2v_scale.modalities.array.members import array_of
from d2v_scale.shards.shard_index import SetIndex

OPPOSITE = {
    name: next(other for other, back in DIRECTIONS.items() if back == (-step[0], -step[1]))
    for name, step in DIRECTIONS.items()
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--modality", "video", str(root)]) == 0
    return root / "video"


def digit() -> np.ndarray:
    return np.random.default_rng(5).integers(1, 255, (8, 8)).astype(np.uint8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_neither_a_frame_nor_their_mean_tells_a_direction_from_its_opposite(direction: str) -> None:
    there, back = (moving(digit(), (3, 14), one)[0] for one in (direction, OPPOSITE[direction]))
    assert there.shape == (FRAMES, SIDE, SIDE)
    assert not np.array_equal(there, back)
    assert {frame.tobytes() for frame in there} == {frame.tobytes() for frame in back}
    assert np.array_equal(there[0], back[0])
    assert np.array_equal(there.mean(axis=0), back.mean(axis=0))


def test_a_video_comes_round_once_and_shows_the_whole_digit_in_every_frame() -> None:
    video = moving(digit(), (0, 0), "down")[0]
    assert all(int((frame > 0).sum()) == 64 for frame in video)
    assert len({frame.tobytes() for frame in video}) == FRAMES
    shift = np.argmax([np.array_equal(np.roll(video[-1], k, axis=0), video[0]) for k in range(SIDE)])
    assert shift == SIDE // FRAMES


def test_samples_move_as_they_are_labelled_and_say_which_digit_they_show(shards: Path) -> None:
    keys = {}
    for split, count in (("train", 1438), ("test", 359)):
        index = SetIndex.load(shards / f"{split}.index.json")
        assert (index.content, index.samples, index.classes) == ("array", count, list(DIRECTIONS))
        found = []
        for shard in sorted(shards.glob(f"{split}-*.tar")):
            with tarfile.open(shard) as tar:
                contents = {one.name: tar.extractfile(one).read() for one in tar.getmembers()}  # type: ignore[union-attr]
            for key in sorted({name.split(".")[0] for name in contents}):
                about = json.loads(contents[f"{key}.json"])
                video = array_of("npy", contents[f"{key}.npy"]).whole()
                step = tuple(SIDE // FRAMES * one for one in DIRECTIONS[about["direction"]])
                assert video.dtype == np.uint8
                assert np.array_equal(np.roll(video[0, :-1], step, axis=(1, 2)), video[0, 1:])
                label = int(contents[f"{key}.cls"])
                assert list(DIRECTIONS)[label] == about["direction"]
                found.append((key, label, about["digit"]))
        keys[split] = {key for key, _, _ in found}
        assert len(keys[split]) == count
        # Directions and digits are equally frequent, and tell nothing of each other.
        pairs = np.zeros((len(DIRECTIONS), 10))
        for _, label, shown in found:
            pairs[label, shown] += 1
        assert (np.abs(pairs.sum(axis=1) / count - 1 / 8) < 0.05).all()
        assert split == "test" or (pairs > 0).all()
    assert not keys["train"] & keys["test"]
