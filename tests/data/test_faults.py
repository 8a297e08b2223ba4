"""Damaged shards: every damage is named, the run goes on, and what is planned is delivered or named."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from damaged_shards import DamagedSet
from small_shards import image_samples, sound_samples

from d2v_scale.batch import Batch
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import DataError, DataStarved
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, VisionStem
from d2v_scale.shards.plan import Cursor
from d2v_scale.shards.shard_index import Members, SetIndex, index_shard
from d2v_scale.shards.writing import members_file, write_shard

MODEL = ModelConfig(vision=VisionStem(image_size=8, patch_size=4), speech=SpeechStem())
MASKING = MaskingConfig(kind="random", prob=0.5)
SAMPLES = 10


@pytest.fixture(scope="module", params=["vision", "speech"])
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DamagedSet:
    samples = image_samples(200) if request.param == "vision" else sound_samples(200)
    return DamagedSet(tmp_path_factory.mktemp("damaged"), request.param, samples, SAMPLES)


def test_twelve_damages_and_more_are_survived_named_and_counted(
    damaged: DamagedSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = SourceConfig(shards=str(damaged.build()), modality=damaged.modality)
    data = DataConfig(
        sources=[source],
        workers=1,
        max_bad_ratio=0.9,
        read_timeout_s=3.0,
        read_retries=1,
        cache_dir=str(tmp_path / "cache"),
        window_shards=4,
    )
    with caplog.at_level(logging.WARNING):
        loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=8)
        for path in damaged.disappearing:
            path.unlink()
        batches = []
        while loader.counters()[f"{damaged.modality}/epoch"] == 0:
            batches += next(loader)
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
    assert sum(lost > 0 for lost in damaged.expected_lost.values()) >= 12
    assert loader.alarm() is None


def test_shards_behind_urls_and_commands_are_delivered_like_local_ones(tmp_path: Path) -> None:
    first, second = two_shards(tmp_path)
    local = open_loader(tmp_path)
    index = SetIndex.load(tmp_path / "a.index.json")
    index.shards[0].path, index.shards[1].path = f"file://{first}", f"pipe:cat {second}"
    index.save(tmp_path / "remote" / "a.index.json")
    for entry in index.shards:
        (tmp_path / "remote" / entry.members).write_bytes((tmp_path / entry.members).read_bytes())
    data = DataConfig(
        sources=[SourceConfig(shards=str(tmp_path / "remote" / "a.index.json"))],
        workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    remote = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=4)
    for _ in range(5):
        assert [batch.keys for batch in next(remote)] == [batch.keys for batch in next(local)]
    assert remote.counters()["lost"] == 0


def test_an_index_that_vanishes_and_is_needed_for_the_plan_ends_the_run_by_name(tmp_path: Path) -> None:
    made = DamagedSet(tmp_path, "speech", sound_samples(20), SAMPLES)
    tars = [made.shard("a"), made.shard("b")]
    SetIndex(content="recording", shards=made.entries).save(tmp_path / "s.index.json")
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path), modality="speech")], workers=0, window_shards=1)
    loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=SAMPLES)
    for tar in tars:
        members_file(tar).unlink()
    with pytest.raises(DataStarved, match=r"cannot be planned.*\.index cannot be read"):
        next(loader)


def test_an_alarm_is_raised_above_the_ratio(tmp_path: Path) -> None:
    samples = image_samples(200)
    for sample in samples[::10]:
        sample["png"] = b"no image"
    SetIndex(content="image", shards=[write_shard(tmp_path / "a-0.tar", samples)]).save(tmp_path / "a.index.json")
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
    SetIndex(content="image", shards=entries).save(tmp_path / "a.index.json")
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
    SetIndex(content="image", shards=entries).save(directory / "a.index.json")
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


def test_what_was_damaged_when_it_was_indexed_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = two_shards(tmp_path)
    index = SetIndex.load(tmp_path / "a.index.json")
    assert caplog.text == ""
    os.truncate(first, first.stat().st_size // 2)
    index.shards[0] = index_shard(first, members_file(first), tmp_path)
    index.save(tmp_path / "a.index.json")
    open_loader(tmp_path, ratio=0.5)
    assert f"1 of 2 shards were damaged when they were indexed, the first: {first}: " in caplog.text


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recording_that_goes_bad_after_the_indexing_crops_no_other(tmp_path: Path, ranks: int) -> None:
    """Its neighbours were cropped to its length, which nobody could hear."""
    samples = sound_samples(8, seconds=(1.0, 1.2))
    short = sound_samples(1, seconds=(0.2, 0.21))[0] | {"__key__": "short"}
    entry = write_shard(tmp_path / "a-0.tar", [short, *samples], speech.measure)
    SetIndex(content="recording", shards=[entry]).save(tmp_path / "a.index.json")
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path), modality="speech")], workers=0, max_bad_ratio=0.5)

    def batches() -> list[Batch]:
        return [
            next(StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=9, dp_rank=rank, dp_size=ranks))[0]
            for rank in range(ranks)
        ]

    length = {batch.inputs.shape[1] for batch in batches()}
    assert length == {int(Members.load(tmp_path / "a-0.index").length_n[0])}
    content = bytearray((tmp_path / "a-0.tar").read_bytes())
    content[600] ^= 1
    (tmp_path / "a-0.tar").write_bytes(content)
    damaged = batches()
    assert sum(len(batch.keys) for batch in damaged) == 8
    assert sum(batch.lost for batch in damaged) == 1
    # The other rank cannot know: it goes by what was planned.
    assert min(batch.inputs.shape[1] for batch in damaged if batch.lost) >= 16000
