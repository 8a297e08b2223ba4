"""Sources that are read together: what a step holds at any number of ranks and micro-batches, and after any stop."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import image_samples

from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.shards.writing import write_set

MODEL = ModelConfig(
    vision=VisionStem(image_size=8, patch_size=4),
    speech=SpeechStem(),
    text=TextStem(vocab_size=331, mask_id=330, max_positions=32),
    visible_only=True,
)
MASKING = MaskingConfig(kind="random", prob=0.5, clones=2)


@pytest.fixture
def data(images: Path, sounds: Path, texts: Path) -> DataConfig:
    """Sources that differ in size and unit; two of one stem."""
    sources = [
        SourceConfig(shards=str(images), modality="vision", weight=2),
        SourceConfig(shards=str(sounds / "train-*.tar"), modality="speech", batch_size=6, batch_unit="seconds"),
        SourceConfig(shards=str(texts / "train.index.json"), modality="text", batch_size=5),
        SourceConfig(shards=str(images), modality="vision", name="more", batch_size=3),
    ]
    return DataConfig(sources=sources, workers=0, window_shards=2, mixing="together")


def make(data: DataConfig, **options: Any) -> StepLoader:
    return StepLoader(data, MODEL, MASKING, seed=3, global_batch_size=12, **options)


def ids_and_masks(batches: list[Any]) -> list[tuple[str, list[int], list[list[bool]]]]:
    """By source: the samples that are there, and their masks."""
    found: dict[str, tuple[list[int], list[list[bool]]]] = {}
    for batch in batches:
        ids, masks = found.setdefault(batch.source, ([], []))
        if not batch.is_blank:
            ids += batch.sample_ids.tolist()
            masks += batch.masked_rt.tolist()
    return [(name, *both) for name, both in found.items()]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.integers(1, 6), rounds=st.integers(1, 3), stop=st.integers(0, 9))
def test_every_step_has_every_source_and_all_ranks_together_read_what_one_would(
    data: DataConfig, ranks: int, rounds: int, stop: int
) -> None:
    alone = make(data, accumulation=4)
    for _ in range(stop):
        next(alone)
    state = alone.state_dict()
    assert set(state) == {"step", "sources"}
    assert all(isinstance(value, int) for source in state["sources"].values() for value in source.values())
    loaders = [make(data, accumulation=4 * rounds, dp_rank=rank, dp_size=ranks) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict(state)
    names = data.source_names()
    for _ in range(3):
        expected, parts = next(alone), [next(loader) for loader in loaders]
        assert all([batch.source for batch in part] == names * rounds for part in parts)
        # A rank has a contiguous share of each source.
        assert ids_and_masks([b for part in parts for b in part]) == ids_and_masks(expected)
    assert [loader.state_dict() for loader in loaders] == [alone.state_dict()] * ranks


def test_workers_and_a_stop_change_nothing_and_every_source_is_counted(data: DataConfig) -> None:
    plain, ahead = make(data, accumulation=4), make(dataclasses.replace(data, workers=2), accumulation=4)
    seen = dict.fromkeys(data.source_names(), 0)
    for _ in range(4):
        ours, theirs = next(plain), next(ahead)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.masked_rt, other.masked_rt)
            seen[one.source] += len(one.sample_ids)
    resumed = make(data, accumulation=8)
    resumed.load_state_dict(ahead.state_dict())
    ahead.close()
    assert ids_and_masks(next(resumed)) == ids_and_masks(next(plain))
    counters = make(data, accumulation=4)
    for _ in range(4):
        next(counters)
    assert {name: counters.counters()[f"{name}/delivered"] for name in seen} == seen
    assert seen["vision"] == 48
    assert seen["text"] == 20
    assert seen["more"] == 12


def test_lost_samples_are_counted_for_the_source_that_lost_them(tmp_path: Path, texts: Path) -> None:
    broken = image_samples(40)
    for sample in broken:
        sample["png"] = b"no picture"
    write_set(tmp_path, "train", "image", broken, per_shard=20)
    sources = [
        SourceConfig(shards=str(texts / "train.index.json"), modality="text"),
        SourceConfig(shards=str(tmp_path), modality="vision"),
    ]
    loader = make(DataConfig(sources=sources, workers=0, mixing="together", max_bad_ratio=0.99), accumulation=2)
    text, vision = next(loader)
    assert (len(text.sample_ids), text.lost) == (12, 0)
    assert vision.is_blank
    assert vision.lost == 12
    counts = loader.take_counts()
    assert [(name, count.epochs[0].delivered, count.epochs[0].lost) for name, count in counts.items()] == [
        ("text", 12, 0),
        ("vision", 0, 12),
    ]


def test_a_source_with_fewer_samples_than_ranks_is_refused_by_name(tmp_path: Path, texts: Path) -> None:
    write_set(tmp_path, "train", "image", image_samples(3), per_shard=20)
    sources = [
        SourceConfig(shards=str(texts / "train.index.json"), modality="text"),
        SourceConfig(shards=str(tmp_path), modality="vision", name="few"),
    ]
    data = DataConfig(sources=sources, workers=0, mixing="together")
    make(data, accumulation=2, dp_size=3)
    with pytest.raises(DataError, match="'few' has 3 samples, fewer than the 4 data-parallel ranks"):
        make(data, accumulation=2, dp_size=4)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"temperature": 2.0}, "data.temperature"),
        ({"repeat": 1.0}, "data.sources.0.repeat"),
        ({"weight": 0.0}, "data.sources.0.weight"),
        ({"weight": -1.0}, "data.sources.0.weight"),
        ({"weight": float("nan")}, "data.sources.0.weight"),
    ],
)
def test_what_says_how_often_a_source_comes_is_refused(change: dict[str, float], key: str) -> None:
    own = {name: value for name, value in change.items() if name != "temperature"}
    sources = [SourceConfig(shards="a", modality="text", **own)]  # type: ignore[arg-type]
    data = DataConfig(sources=sources, mixing="together", temperature=change.get("temperature", 1.0))
    with pytest.raises(ConfigError) as error:
        data.check(["text"])
    assert error.value.key == key
