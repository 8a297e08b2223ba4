"""d2v_scale.data.loader: what a step holds at any world size, worker count and after any stop."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_scale.batch import Batch
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import CheckpointError, ConfigError, DataError, DataStarved
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem

MODEL = ModelConfig(
    vision=VisionStem(image_size=8, patch_size=4),
    speech=SpeechStem(),
    text=TextStem(vocab_size=331, mask_id=330, max_positions=32),
    visible_only=True,
)
MASKING = MaskingConfig(kind="random", prob=0.5, clones=2)


def make_loader(
    *sources: SourceConfig, workers: int = 0, size: int = 12, model: ModelConfig = MODEL, **options: Any
) -> StepLoader:
    data = DataConfig(sources=list(sources), workers=workers, window_shards=2, temperature=1.0)
    return StepLoader(data, MODEL, MASKING, seed=3, global_batch_size=size, **options)


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    real = [batch for batch in batches if batch.keys != ("",)]
    ids = [i for batch in real for i in batch.sample_ids.tolist()]
    return torch.cat([batch.inputs for batch in real]), torch.cat([batch.masked_rt for batch in real]), ids


@pytest.fixture
def mixed(images: Path, sounds: Path, texts: Path) -> list[SourceConfig]:
    return [
        SourceConfig(shards=str(images), modality="vision", weight=2),
        SourceConfig(shards=str(sounds / "train-*.tar"), modality="speech"),
        SourceConfig(shards=str(texts / "train.index.json"), modality="text"),
    ]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.integers(1, 8), accumulation=st.integers(1, 3), stop=st.integers(0, 9), size=st.integers(1, 30))
def test_all_ranks_together_read_what_one_would(
    mixed: list[SourceConfig], ranks: int, accumulation: int, stop: int, size: int
) -> None:
    alone = make_loader(*mixed, size=size)
    for _ in range(stop):
        next(alone)
    state = alone.state_dict()
    loaders = [
        make_loader(*mixed, size=size, dp_rank=rank, dp_size=ranks, accumulation=accumulation) for rank in range(ranks)
    ]
    for loader in loaders:
        loader.load_state_dict(state)
    for _ in range(3):
        expected = next(alone)
        parts = [next(loader) for loader in loaders]
        assert all(len(part) == accumulation for part in parts)
        assert len({batch.modality for part in parts for batch in part}) == 1
        for ours, theirs in zip(joined([b for part in parts for b in part]), joined(expected), strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert [loader.state_dict() for loader in loaders] == [alone.state_dict()] * ranks


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attempts=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0, 0, 1, 2]), st.integers(1, 4)), min_size=2),
    size=st.integers(10, 40),
    modality=st.sampled_from(["vision", "speech"]),
)
def test_no_stop_and_no_change_of_ranks_and_workers_loses_or_repeats_a_sample(
    images: Path, sounds: Path, attempts: list[tuple[int, int, int]], size: int, modality: str
) -> None:
    """Attempts of (ranks, workers, steps until the stop), one after the other, until two epochs are over."""
    source = SourceConfig(shards=str(images if modality == "vision" else sounds), modality=modality)  # type: ignore[arg-type]
    samples = 90 if modality == "vision" else 75
    state: dict[str, Any] | None = None
    seen: dict[int, list[int]] = {}
    for ranks, workers, steps in itertools.cycle(attempts):
        # One rank with workers says enough about them, and processes are dear.
        loaders = [
            make_loader(source, size=size, dp_rank=rank, dp_size=ranks, workers=0 if rank else workers)
            for rank in range(ranks)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(steps):
            ids = [i for loader in loaders for b in next(loader) if b.keys != ("",) for i in b.sample_ids.tolist()]
            counts = loaders[0].take_counts()[modality]
            # Where a batch holds items of two epochs, those of the first come first.
            for epoch, count in sorted(counts.epochs.items()):
                seen.setdefault(epoch, []).extend(ids[: count.planned])
                ids = ids[count.planned :]
            assert ids == []
        state = loaders[0].state_dict()
        for loader in loaders:
            loader.close()
        if max(seen) >= 2:
            break
    for epoch in range(2):
        assert len(seen[epoch]) == len(set(seen[epoch])) == samples


def test_worker_processes_change_nothing(mixed: list[SourceConfig]) -> None:
    loaders = [make_loader(*mixed, workers=workers) for workers in (0, 1, 2)]
    try:
        for _ in range(12):
            steps = [joined(next(loader)) for loader in loaders]
            for step in steps[1:]:
                assert torch.equal(step[0], steps[0][0])
                assert torch.equal(step[1], steps[0][1])
                assert step[2] == steps[0][2]
        states = [loader.state_dict() for loader in loaders]
        assert states[0] == states[1] == states[2]
    finally:
        for loader in loaders:
            loader.close()


def test_the_state_is_of_the_last_step_handed_out_and_not_of_what_workers_read_ahead(images: Path) -> None:
    source = SourceConfig(shards=str(images))
    ahead, stopped = make_loader(source, workers=2), make_loader(source, workers=2)
    for _ in range(3):
        next(ahead)
        next(stopped)
    resumed = make_loader(source)
    resumed.load_state_dict(stopped.state_dict())
    stopped.close()
    for _ in range(8):
        assert joined(next(resumed))[2] == joined(next(ahead))[2]
    ahead.close()


def test_crops_and_masks_differ_between_epochs_and_steps(images: Path) -> None:
    loader = make_loader(SourceConfig(shards=str(images)), size=90)
    first, second = joined(next(loader)), joined(next(loader))
    order = [second[2].index(i) for i in first[2]]
    assert sorted(first[2]) == sorted(second[2])
    assert not torch.equal(first[0], second[0][order])
    assert loader.counters()["vision/epoch"] == 1


def test_every_source_keeps_its_own_position_and_counts(mixed: list[SourceConfig]) -> None:
    loader = make_loader(*mixed, size=5)
    seen = {"vision": 0, "speech": 0, "text": 0}
    for _ in range(40):
        [batch] = next(loader)
        seen[batch.source] += len(batch.sample_ids)
    counters = loader.counters()
    assert {name: counters[f"{name}/delivered"] for name in seen} == seen
    assert all(seen.values())
    assert counters["delivered"] == counters["planned"] == sum(seen.values())
    assert set(loader.state_dict()["sources"]) == set(seen)


def test_a_rank_without_samples_gets_a_blank_row_that_counts_nothing(mixed: list[SourceConfig]) -> None:
    for source in mixed:
        loader = make_loader(source, size=2, dp_rank=0, dp_size=4)
        [batch] = next(loader)
        assert batch.keys == ("",)
        assert not batch.masked_rt.any()
        assert len(batch.inputs) == 1
        assert loader.counters()["delivered"] == 0


def test_other_shards_are_refused_on_resume(images: Path, tmp_path: Path) -> None:
    from small_shards import image_samples

    from d2v_scale.shards.writing import write_set

    state = make_loader(SourceConfig(shards=str(images))).state_dict()
    write_set(tmp_path, "train", "image", image_samples(90)[::-1], per_shard=20)
    with pytest.raises(CheckpointError, match="not those the checkpoint was trained on"):
        make_loader(SourceConfig(shards=str(tmp_path))).load_state_dict(state)
    with pytest.raises(CheckpointError, match="data sources are vision"):
        make_loader(SourceConfig(shards=str(images), name="other")).load_state_dict(state)


def test_shards_may_move_between_runs(images: Path, tmp_path: Path) -> None:
    import shutil

    state = make_loader(SourceConfig(shards=str(images))).state_dict()
    shutil.copytree(images, tmp_path / "moved")
    make_loader(SourceConfig(shards=str(tmp_path / "moved"))).load_state_dict(state)


def test_a_step_that_never_arrives_is_a_verdict_and_no_hang(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from d2v_scale.modalities.vision import decoder as vision

    monkeypatch.setattr(vision.VisionDecoder, "training_row", lambda *_: time.sleep(60))
    data = DataConfig(sources=[SourceConfig(shards=str(images))], workers=1, timeout_s=1.0)
    loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=4)
    with pytest.raises(DataStarved, match="No batch arrived"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_not_about_arriving_is_not_called_starved(
    images: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any RuntimeError was, such as the device's being out of memory, and ended the run with the code for data."""
    from d2v_scale.data.collate import Collator

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Collator, "batch", fail)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        next(make_loader(SourceConfig(shards=str(images)), workers=workers))
    assert not isinstance(caught.value, DataStarved)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_worker_that_is_gone_is_a_verdict(images: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from d2v_scale.data.collate import Collator

    def end(*_: Any, **__: Any) -> None:
        os._exit(3) if how == "ended" else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Collator, "batch", end)
    with pytest.raises(DataStarved, match="No batch arrived"):
        next(make_loader(SourceConfig(shards=str(images)), workers=1))


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (SourceConfig(shards="/nowhere/*.tar"), DataError, "No shard matches"),
        (SourceConfig(shards="/nowhere/a-{000..002}.tar"), DataError, "3 of 3 shards .* do not exist"),
        (
            SourceConfig(shards="IMAGES", modality="speech"),
            DataError,
            "hold images, .* 'speech' reads recordings",
        ),
        (SourceConfig(shards="IMAGES", weight=0), ConfigError, "weight"),
        (SourceConfig(shards="IMAGES/train-000000.tar", index="IMAGES/gone.index.json"), DataError, "cannot be read"),
    ],
)
def test_mistakes_are_named_before_the_first_step(
    images: Path, source: SourceConfig, error: type[Exception], text: str
) -> None:
    source = SourceConfig(
        shards=source.shards.replace("IMAGES", str(images)),
        modality=source.modality,
        weight=source.weight,
        index=source.index and source.index.replace("IMAGES", str(images)),
    )
    with pytest.raises(error, match=text):
        make_loader(source)


def test_read_from_takes_one_pattern_or_one_per_modality() -> None:
    data = DataConfig()
    data.read_from("/a/{0..3}.tar,x", ["vision"])
    assert [(s.modality, s.shards) for s in data.sources] == [("vision", "/a/{0..3}.tar,x")]
    data.read_from("vision=/a/{0,1}.tar,speech=/b", ["vision", "speech"])
    assert [(s.modality, s.shards) for s in data.sources] == [("vision", "/a/{0,1}.tar"), ("speech", "/b")]
    with pytest.raises(ConfigError, match="names no modality"):
        data.read_from("/a", ["vision", "speech"])


def test_speech_budget_in_seconds(sounds: Path) -> None:
    data = DataConfig(sources=[SourceConfig(shards=str(sounds), modality="speech")], workers=0)
    loader = StepLoader(data, MODEL, MASKING, seed=1, global_batch_size=4, batch_unit="seconds")
    seen: list[int] = []
    while loader.counters()["speech/epoch"] == 0:
        [batch] = next(loader)
        assert batch.valid is None
        assert batch.inputs.numel() <= 4.4 * 16000
        seen += [] if loader.counters()["speech/epoch"] else batch.sample_ids.tolist()
    assert len(seen) == len(set(seen))


def test_speech_is_normalised_over_the_whole_file_before_it_is_cropped(sounds: Path) -> None:
    loader = make_loader(SourceConfig(shards=str(sounds), modality="speech"), size=75)
    [batch] = next(loader)
    # Crops of white noise have nearly, but not exactly, the file's moments.
    assert np.abs(batch.inputs.std(dim=1).numpy() - 1).max() < 0.2
    assert float(batch.inputs.mean(dim=1).abs().max()) > 1e-5
