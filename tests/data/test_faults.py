"""Damaged shards: every damage is named, the run goes on, and what is planned is delivered or named."""

import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_shards import image_samples

from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.plan import Cursor
from d2v_scale.data.shard_index import Members, SetIndex, ShardEntry, index_shard
from d2v_scale.data.writing import Sample, members_file, write_shard
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.model.config import ModelConfig, VisionStem

MODEL = ModelConfig(vision=VisionStem(image_size=8, patch_size=4))
MASKING = MaskingConfig(kind="random", prob=0.5)
SAMPLES = 10


def member_offset(tar: Path, number: int) -> tarfile.TarInfo:
    with tarfile.open(tar) as opened:
        return opened.getmembers()[number]


def overwrite(tar: Path, offset: int, content: bytes) -> None:
    with tar.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def flip_bit(tar: Path, offset: int) -> None:
    overwrite(tar, offset, bytes([tar.read_bytes()[offset] ^ 4]))


def bomb() -> bytes:
    content = io.BytesIO()
    Image.new("1", (20000, 20000)).save(content, "PNG")
    return content.getvalue()


class DamagedSet:
    """A shard per damage and a sound one. `before`: damage that was there when the index was made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: list[ShardEntry] = []
        self.expected_lost: dict[str, int] = {}
        self.disappearing: list[Path] = []

    def shard(self, name: str, samples: list[Sample] | None = None) -> Path:
        tar = self.directory / f"{name}.tar"
        self.entries.append(write_shard(tar, samples or image_samples(SAMPLES)))
        return tar

    def pipe(self, name: str, command: str, lost: int) -> None:
        tar = self.shard(name)
        self.entries[-1].path = f"pipe:{command.format(tar=tar, size=tar.stat().st_size)}"
        self.expected_lost[self.entries[-1].path] = lost

    def write(self) -> str:
        index = self.directory / "damaged.index.json"
        SetIndex(modality="vision", shards=self.entries).save(index)
        return str(index)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DamagedSet:
    made = DamagedSet(tmp_path_factory.mktemp("damaged"))
    made.shard("sound")

    tar = made.shard("truncated")
    os.truncate(tar, member_offset(tar, 15).offset + 100)
    made.expected_lost[str(tar)] = 3

    tar = made.shard("header-bit")
    flip_bit(tar, member_offset(tar, 6).offset + 3)
    made.expected_lost[str(tar)] = 1

    tar = made.shard("content-bit")
    flip_bit(tar, member_offset(tar, 6).offset_data + 40)
    made.expected_lost[str(tar)] = 1

    tar = made.shard("lost-sector")
    overwrite(tar, member_offset(tar, 8).offset, bytes(1024))
    made.expected_lost[str(tar)] = 1

    samples = image_samples(SAMPLES)
    del samples[4]["png"]
    made.expected_lost[str(made.shard("missing-member", samples))] = 1

    samples = image_samples(SAMPLES)
    samples[2]["png"] = b""
    made.expected_lost[str(made.shard("zero-bytes", samples))] = 1

    samples = image_samples(SAMPLES)
    samples[2]["png"] = samples[3]["png"][:60]
    samples[5]["png"] = b"this is no image"
    made.expected_lost[str(made.shard("undecodable", samples))] = 2

    samples = image_samples(SAMPLES)
    samples[7]["png"] = bomb()
    made.expected_lost[str(made.shard("bomb", samples))] = 1

    tar = made.shard("cut-before-indexing")
    os.truncate(tar, member_offset(tar, 9).offset_data + 7)
    made.entries[-1] = index_shard(tar, members_file(tar), made.directory)
    # Of five samples, the label of the last is cut off.
    made.expected_lost[str(tar)] = 1

    tar = made.shard("disappears")
    made.disappearing.append(tar)
    made.expected_lost[str(tar)] = SAMPLES

    tar = made.shard("index-unreadable")
    made.disappearing.append(members_file(tar))
    made.expected_lost[str(tar)] = SAMPLES

    made.pipe("hanging-pipe", "sleep 1000; cat {tar}", SAMPLES)
    made.pipe("failing-pipe", "cat {tar}; exit 3", SAMPLES)
    made.pipe("short-pipe", "head -c 3000 {tar}", SAMPLES)
    made.pipe("slow-pipe", "sleep 0.2; cat {tar}", 0)
    return made


def test_twelve_damages_and_more_are_survived_named_and_counted(
    damaged: DamagedSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = SourceConfig(shards=damaged.write())
    data = DataConfig(
        sources=[source],
        workers=1,
        max_bad_ratio=0.9,
        read_timeout_s=0.7,
        read_retries=1,
        cache_dir=str(tmp_path / "cache"),
        window_shards=4,
    )
    with caplog.at_level(logging.WARNING):
        loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=8)
        for path in damaged.disappearing:
            path.unlink()
        planned = sum(entry.samples for entry in damaged.entries)
        batches = [batch for _ in range(planned // 8 + 1) for batch in next(loader)]
        loader.close()
    first_epoch = sum(int(batch.sample_ids.numel()) for batch in batches if batch.keys != ("",))
    counters = loader.counters()
    assert counters["delivered"] == first_epoch == counters["planned"] - counters["lost"]
    assert counters["lost"] == sum(batch.lost for batch in batches)
    # The last batch may run into the second epoch and lose samples there, too.
    for shard, lost in damaged.expected_lost.items():
        found = loader.faults().get(shard, 0)
        assert lost <= found <= lost + 8 if lost else found == 0, (shard, lost, found)
        assert not lost or any(f"lost a sample: {shard}" in message for message in caplog.messages), shard
    assert str(damaged.directory / "sound.tar") not in loader.faults()
    assert len(damaged.expected_lost) - 1 >= 12
    assert loader.alarm() is None


def test_an_alarm_is_raised_above_the_ratio(tmp_path: Path) -> None:
    samples = image_samples(200)
    for sample in samples[::10]:
        sample["png"] = b"no image"
    SetIndex(modality="vision", shards=[write_shard(tmp_path / "a-0.tar", samples)]).save(tmp_path / "a.index.json")
    for ratio, expected in ((0.2, False), (0.05, True)):
        data = DataConfig(sources=[SourceConfig(shards=str(tmp_path))], workers=0, max_bad_ratio=ratio)
        loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=50)
        for _ in range(4):
            next(loader)
        alarm = loader.alarm()
        assert (alarm is not None) == expected
        assert alarm is None or "20 of 200 samples could not be read" in alarm


def test_one_bad_shard_of_many_does_not_end_a_run_in_its_first_steps(tmp_path: Path) -> None:
    entries = [write_shard(tmp_path / f"a-{k:02d}.tar", image_samples(50)) for k in range(20)]
    SetIndex(modality="vision", shards=entries).save(tmp_path / "a.index.json")
    for bad, expected in ((1, False), (20, True)):
        data = DataConfig(sources=[SourceConfig(shards=str(tmp_path))], workers=0, max_bad_ratio=0.06, window_shards=4)
        loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=50)
        # Whichever shards come first are the ones that vanish.
        first = {int(shard) for shard in loader._plans[0].next_batch(Cursor())[0].shard_n}
        for shard in sorted(first)[:1] if bad == 1 else range(20):
            (tmp_path / f"a-{shard:02d}.tar").rename(tmp_path / f"gone-{shard:02d}")
        for _ in range(4):
            next(loader)
        assert loader.counters()["lost"] > 0
        assert (loader.alarm() is not None) == expected
        for path in tmp_path.glob("gone-*"):
            path.rename(tmp_path / f"{path.name.replace('gone', 'a')}.tar")


def open_loader(directory: Path, ratio: float = 0.01) -> StepLoader:
    data = DataConfig(sources=[SourceConfig(shards=str(directory))], workers=0, max_bad_ratio=ratio)
    return StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=4)


def two_shards(directory: Path) -> tuple[Path, Path]:
    first, second = directory / "a-0.tar", directory / "a-1.tar"
    samples = image_samples(20)
    entries = [write_shard(first, samples[:10]), write_shard(second, samples[10:])]
    SetIndex(modality="vision", shards=entries).save(directory / "a.index.json")
    return first, second


def test_another_tar_than_the_indexed_one_is_refused_before_the_start(tmp_path: Path) -> None:
    first, second = two_shards(tmp_path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"a-0.tar holds image-0010.* where its index says image-0000"):
        open_loader(tmp_path)


def test_a_longer_tar_than_the_indexed_one_is_refused_before_the_start(tmp_path: Path) -> None:
    first, _ = two_shards(tmp_path)
    first.write_bytes(first.read_bytes() + bytes(1024))
    with pytest.raises(DataError, match="its index says"):
        open_loader(tmp_path)


def test_a_deleted_shard_is_refused_before_the_start(tmp_path: Path) -> None:
    first, _ = two_shards(tmp_path)
    first.unlink()
    with pytest.raises(DataError, match=r"in the index but do not exist, the first is .*a-0.tar"):
        open_loader(tmp_path)


def test_a_truncated_shard_is_refused_or_survived_by_the_ratio(tmp_path: Path) -> None:
    first, _ = two_shards(tmp_path)
    os.truncate(first, first.stat().st_size // 2)
    with pytest.raises(DataError, match="samples are cut off"):
        open_loader(tmp_path)
    assert open_loader(tmp_path, ratio=0.5) is not None


def test_indexes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    two_shards(tmp_path)
    path = tmp_path / "a.index.json"
    path.write_text(path.read_text().replace('"samples": 10', '"samples": 11'))
    with pytest.raises(DataError, match="holds 10 samples"):
        open_loader(tmp_path)


def test_an_index_without_a_shard_is_refused(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_shard(tmp_path / "a-2.tar", image_samples(3))
    with pytest.raises(DataError, match="1 shards are in no index"):
        open_loader(tmp_path)


@pytest.mark.parametrize("offset", [*range(0, 1 << 14, 997), 1536, 2048, 2560, 3072, 3584, 4096])
def test_a_truncated_tar_never_gives_a_partial_sample(tmp_path: Path, offset: int) -> None:
    tar = tmp_path / "a-0.tar"
    write_shard(tar, image_samples(SAMPLES))
    if offset > tar.stat().st_size:
        pytest.skip("beyond the end")
    os.truncate(tar, offset)
    entry = index_shard(tar, members_file(tar), tmp_path)
    members = Members.load(members_file(tar))
    whole = members.length_n >= 0
    with_both = (members.member_size_ne[whole] >= 0).all(axis=1)
    assert with_both.all() or int(np.sum(whole)) == 1
    assert entry.samples == len(members)
    assert (members.start_n[whole] + members.size_n[whole] <= offset).all()
