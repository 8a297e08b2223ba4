"""d2v_scale.data.streaming and what reads for it, d2v_scale.shards.stream: shards without an index."""

import io
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_shards import image_samples, sound_samples

from d2v_scale.data.config import DataConfig, LeaveOut, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError, DataStarved
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.parallel import groups
from d2v_scale.running.totals import RunTotals
from d2v_scale.shards import stream as reader
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.shard_index import TarContents, index_tar
from d2v_scale.shards.stream import StreamStore
from d2v_scale.shards.writing import Sample, write_set

MODEL = ModelConfig(
    vision=VisionStem(image_size=8, patch_size=4),
    speech=SpeechStem(),
    text=TextStem(vocab_size=331, mask_id=330, max_positions=32),
)


def bare(source: Path, target: Path) -> Path:
    """The shards alone."""
    target.mkdir()
    for tar in source.glob("*.tar"):
        shutil.copy(tar, target)
    return target


def stream(
    shards: Path,
    modality: str = "vision",
    tokenizer: Path | None = None,
    min_seconds: float = 0.1,
    bad: float = 0.5,
    rank: int = 0,
    ranks: int = 1,
) -> StepLoader:
    data = DataConfig(sources=[SourceConfig(shards=str(shards), modality=modality)], workers=0, max_bad_ratio=bad)
    data.text.tokenizer = str(tokenizer) if tokenizer else None
    data.speech.min_seconds = min_seconds
    masking = MaskingConfig(kind="random", prob=0.5)
    return StepLoader(data, MODEL, masking, seed=1, global_batch_size=6 * ranks, dp_rank=rank, dp_size=ranks)


@pytest.mark.parametrize("streams", [1, 2, 5, 7])
def test_all_streams_together_read_every_sample_once_an_epoch(images: Path, tmp_path: Path, streams: int) -> None:
    paths = [str(path) for path in sorted(images.glob("*.tar"))]
    for epoch in range(2):
        keys: list[str] = []
        for number in range(streams):
            store = StreamStore(paths, ShardCache(str(tmp_path), 1e9, 1.0, 0), 1, number, streams)
            keys += [sample.key for shard in store._shards(epoch) for sample in store._samples_of(shard, epoch)]
        assert sorted(keys) == [f"image-{k:04d}" for k in range(90)]


def test_the_log_says_what_an_index_would_give(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stream(bare(images, tmp_path / "bare"))
    assert "has no index" in caplog.text
    assert "d2v index" in caplog.text


def test_a_resumed_stream_continues_behind_what_was_read(images: Path, tmp_path: Path) -> None:
    shards = bare(images, tmp_path / "bare")
    first = stream(shards)
    for _ in range(7):
        next(first)
    second = stream(shards)
    second.load_state_dict(first.state_dict())
    for _ in range(12):
        assert next(second)[0].keys == next(first)[0].keys


def test_a_range_of_a_stream_to_leave_out_is_refused(images: Path, tmp_path: Path) -> None:
    """It left out nothing, and was counted as left out."""
    left_out = [LeaveOut(source="vision", end=[0, 1, 0])]
    data = DataConfig(sources=[SourceConfig(shards=str(bare(images, tmp_path / "bare")))], leave_out=left_out)
    with pytest.raises(ConfigError, match=r"data\.leave_out: names vision, which has no index"):
        StepLoader(data, MODEL, MaskingConfig(), seed=1, global_batch_size=6)


def test_damage_is_named_and_the_stream_goes_on(images: Path, tmp_path: Path) -> None:
    shards = bare(images, tmp_path / "bare")
    os.truncate(shards / "train-000001.tar", 5000)
    (shards / "train-000002.tar").write_bytes(b"")
    loader = stream(shards)
    keys = {key for _ in range(20) for key in next(loader)[0].keys}
    assert 50 < len(keys) < 90
    assert {Path(shard).name for shard in loader.faults()} == {"train-000001.tar", "train-000002.tar"}


def test_a_shard_that_breaks_the_indexing_does_not_end_the_stream(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator was dead after it: every sample of the run was lost."""

    def index(path: Path) -> TarContents:
        if path.name == "train-000001.tar":
            raise UnicodeError("surrogates not allowed")
        return index_tar(path)

    monkeypatch.setattr(reader, "index_tar", index)
    loader = stream(bare(images, tmp_path / "bare"))
    keys = {key for _ in range(20) for key in next(loader)[0].keys}
    assert 50 < len(keys) < 90
    assert {Path(shard).name for shard in loader.faults()} == {"train-000001.tar"}


def test_samples_that_went_bad_after_the_indexing_are_each_lost_and_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were handed out cut off, empty or changed; one error in mid-shard counted as one sample."""
    shards = bare(images, tmp_path / "bare")

    def index(path: Path) -> TarContents:
        found = index_tar(path)
        members = found.members
        if path.name == "train-000001.tar":
            os.truncate(path, int(members.start_n[8] + 600))
        if path.name == "train-000002.tar":
            content = bytearray(path.read_bytes())
            content[members.start_n[3] + 600] ^= 1
            path.write_bytes(content)
        if path.name == "train-000003.tar":
            members.start_n[5:] -= 1 << 40  # seeking there is an OSError, as reading from a broken disk
        return found

    monkeypatch.setattr(reader, "index_tar", index)
    store = StreamStore([str(path) for path in sorted(shards.iterdir())], ShardCache(None, 1e9, 1.0, 0), 1, 0, 1)
    keys = [sample.key for shard in store._shards(0) for sample in store._samples_of(shard, 0)]
    damage = store.take_damage()
    lost = {f"image-{k:04d}" for k in (*range(28, 40), 43, *range(65, 80))}
    assert {fault.key for fault in damage} == lost
    assert sorted(keys) == sorted({f"image-{k:04d}" for k in range(90)} - lost)
    assert [store._counts[shard] for shard in range(5)] == [20, 8, 19, 5, 10]
    assert any("cut off: 600 of" in fault.reason for fault in damage)
    assert any("checksum" in fault.reason for fault in damage)


def test_a_stream_without_a_sample_is_starved(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").write_bytes(bytes(1024))
    with pytest.raises(DataStarved, match="No sample could be read"):
        next(stream(tmp_path))


def test_recordings_that_are_all_too_short_starve_a_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They were passed over for ever; where only some are too short, it was not said how many."""
    write_set(tmp_path / "made", "a", "recording", sound_samples(20, seconds=(0.1, 0.2)), per_shard=10)
    shards = bare(tmp_path / "made", tmp_path / "bare")
    with pytest.raises(DataStarved, match=r"shorter than data\.speech\.min_seconds=0\.3"):
        next(stream(shards, "speech", min_seconds=0.3))
    some = stream(shards, "speech", min_seconds=0.15)
    for _ in range(6):
        next(some)
    assert re.search(r"\d+ of 20 samples left out: shorter than data.speech.min_seconds=0.15", caplog.text)
    assert some.faults() == {}


def test_documents_without_tokens_are_lost_to_a_stream(texts: Path, tmp_path: Path) -> None:
    """An epoch of empty .npy was read for ever."""
    content = io.BytesIO()
    np.save(content, np.zeros(0, dtype=np.int32))
    samples: list[Sample] = [{"__key__": f"empty-{k}", "npy": content.getvalue()} for k in range(5)]
    write_set(tmp_path / "made", "a", "text", samples, per_shard=10)
    shards = bare(tmp_path / "made", tmp_path / "bare")
    streamed = stream(shards, "text", tokenizer=texts / "tokenizer.model")
    for _ in range(40):
        assert all(batch.lost == 6 for batch in next(streamed))
    assert "no line of token ids" in (streamed.alarm() or "")


def test_speech_and_text_stream_too(sounds: Path, texts: Path, tmp_path: Path) -> None:
    [batch] = next(stream(bare(sounds, tmp_path / "sounds"), "speech"))
    assert batch.valid is not None
    assert batch.inputs.shape[0] == 6
    loader = stream(bare(texts, tmp_path / "texts"), "text", tokenizer=texts / "tokenizer.model")
    [batch] = next(loader)
    assert tuple(batch.inputs.shape) == (6, 32)
    assert batch.valid is None
    with pytest.raises(ConfigError, match=r"data.text.tokenizer"):
        stream(tmp_path / "texts", "text")


@pytest.mark.parametrize("content", [bytes(1024), b"", b"<html>404</html>" * 100])
def test_a_share_of_a_stream_that_holds_nothing_stays_blank(
    images: Path, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the whole run as starved."""
    shards = bare(images, tmp_path / "bare")
    (shards / "train-000004.tar").unlink()
    (shards / "train-000001.tar").write_bytes(content)
    keys: set[str] = set()
    blank = []
    for rank in range(4):
        loader = stream(shards, rank=rank, ranks=4, bad=0.01)
        batches = [next(loader)[0] for _ in range(3)]
        blank.append([batch.is_blank for batch in batches])
        keys |= {key for batch in batches for key in batch.keys} - {""}
        assert loader.alarm() is None
        assert loader.counters()["lost"] == sum(batch.lost for batch in batches) <= 2
    assert sorted(blank) == [[False] * 3] * 3 + [[True] * 3]
    assert len(keys) == 54
    assert caplog.text.count("has no sample: its rows stay blank (none can be read)") == 1


def test_every_sample_comes_once_an_epoch_beside_a_share_that_holds_nothing(images: Path, tmp_path: Path) -> None:
    shards = bare(images, tmp_path / "bare")
    (shards / "train-000004.tar").unlink()
    (shards / "train-000001.tar").write_bytes(bytes(1024))
    loaders = [stream(shards, rank=rank, ranks=4) for rank in range(4)]
    rows = [key for loader in loaders for _ in range(10) for key in next(loader)[0].keys if key]
    # Three epochs: the blank one takes as long as the others, so that all change shards together.
    assert {rows.count(f"image-{k:04d}") for k in range(80) if k // 20 != 1} == {3}


def test_fewer_samples_than_streams_leave_some_blank(tmp_path: Path) -> None:
    write_set(tmp_path / "made", "a", "image", image_samples(3), per_shard=3)
    shards = bare(tmp_path / "made", tmp_path / "bare")
    blank = [next(stream(shards, rank=rank, ranks=8))[0].is_blank for rank in range(8)]
    assert sum(blank) == 5


def test_a_set_is_starved_when_all_its_shares_are(tmp_path: Path) -> None:
    for k in range(4):
        (tmp_path / f"a-{k}.tar").write_bytes(b"<html>404</html>" * 100 if k % 2 else bytes(1024))
    for rank in range(4):
        with pytest.raises(DataStarved, match="No sample could be read in an epoch of the stream"):
            next(stream(tmp_path, rank=rank, ranks=4))


def test_a_set_of_which_no_rank_can_use_anything_is_starved_at_a_log_point(tmp_path: Path) -> None:
    """Whether another rank's recordings are long enough is known when the ranks' totals are added up."""
    write_set(tmp_path / "made", "a", "recording", sound_samples(20, seconds=(0.1, 0.2)), per_shard=10)
    shards = bare(tmp_path / "made", tmp_path / "bare")
    loaders = [stream(shards, "speech", min_seconds=0.3, rank=rank, ranks=2) for rank in range(2)]
    totals = RunTotals(loaders[0].sources)
    for step in range(60):
        assert totals.starved() is None or step * 12 >= 500
        assert [next(loader)[0].is_blank for loader in loaders] == [True, True]
        totals.collect(loaders[0].take_counts(), groups.single_process())
        assert all(loader.alarm() is None for loader in loaders)
    assert "No sample of speech could be used by any rank" in str(totals.starved())


def test_a_bad_shard_of_a_long_stream_ends_no_run(tmp_path: Path) -> None:
    """It was judged as if it were the whole set, being all that was read of late."""
    samples = [{"__key__": f"bad-{k}", "png": b"no image"} for k in range(600)]
    write_set(tmp_path / "made", "b", "image", samples, per_shard=600)
    for k in range(60):
        write_set(tmp_path / "made", f"a{k}", "image", image_samples(2), per_shard=2)
    loader = stream(bare(tmp_path / "made", tmp_path / "bare"), bad=0.02)
    while loader.counters()["lost"] < 600:
        next(loader)
        assert loader.alarm() is None
