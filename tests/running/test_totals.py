"""d2v_scale.running.totals: what a run was given, over ranks and restarts, against what the index promised."""

import logging
from pathlib import Path
from typing import Any

import pytest
from small_shards import image_samples

from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.parallel import groups
from d2v_scale.running.totals import RunTotals
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.writing import write_shard

MODEL = ModelConfig(
    vision=VisionStem(image_size=8, patch_size=4),
    speech=SpeechStem(),
    text=TextStem(vocab_size=331, mask_id=330, max_positions=32),
)


def open_loader(*sources: SourceConfig, size: int = 7, workers: int = 0, **data: Any) -> StepLoader:
    config = DataConfig(sources=list(sources), workers=workers, window_shards=2, max_bad_ratio=0.5, **data)
    return StepLoader(config, MODEL, MaskingConfig(kind="random", prob=0.5), seed=3, global_batch_size=size)


def run(loader: StepLoader, totals: RunTotals, steps: int) -> list[dict[str, float]]:
    """Figures of every step."""
    found = []
    for _ in range(steps):
        next(loader)
        totals.collect(loader.take_counts(), groups.single_process())
        found.append(totals.figures(1.0))
    return found


def closed(figures: list[dict[str, float]], source: str) -> list[dict[str, float]]:
    start = f"data/{source}/epoch_"
    found = [{k.removeprefix(start): v for k, v in one.items() if k.startswith(start)} for one in figures]
    return [one for one in found if one]


def test_an_epoch_is_compared_with_its_index_when_it_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = image_samples(30)
    for k in (4, 11):
        samples[k]["png"] = b"no image"
    entries = [write_shard(tmp_path / f"a-{k}.tar", samples[10 * k : 10 * k + 10]) for k in range(3)]
    SetIndex(content="image", shards=entries).save(tmp_path / "a.index.json")
    loader = open_loader(SourceConfig(shards=str(tmp_path)))
    totals = RunTotals(loader.sources)
    figures = run(loader, totals, 10)
    assert closed(figures, "vision") == [{"planned": 30, "delivered": 28, "lost": 2, "left_out": 0}] * 2
    assert figures[-1]["data/delivered"] + figures[-1]["data/lost"] == figures[-1]["data/planned"] == 70
    assert figures[-1]["data/vision/epoch"] == 2
    assert caplog.text.count("30 expected, 28 delivered, 2 lost") == 2
    assert "do not add up" not in caplog.text


def test_totals_go_on_after_a_restart(images: Path) -> None:
    source = SourceConfig(shards=str(images))
    straight = open_loader(source)
    expected = run(straight, RunTotals(straight.sources), 30)
    first = open_loader(source)
    totals = RunTotals(first.sources)
    found = run(first, totals, 11)
    state = totals.state_dict(), first.state_dict()
    second = open_loader(source)
    resumed = RunTotals(second.sources)
    second.load_state_dict(state[1])
    resumed.load_state_dict(state[0], state[1])
    assert found + run(second, resumed, 19) == expected


def test_totals_of_a_run_that_goes_back_are_those_of_one_that_was_restarted(images: Path) -> None:
    source = SourceConfig(shards=str(images))
    loader = open_loader(source)
    totals = RunTotals(loader.sources)
    run(loader, totals, 2)
    state = totals.state_dict(), loader.state_dict()
    # Steps that are taken back: counted, and an epoch closed that no record has told of.
    for _ in range(12):
        next(loader)
    totals.collect(loader.take_counts(), groups.single_process())
    assert totals._totals["vision"].closed is not None
    loader.load_state_dict(state[1])
    totals.load_state_dict(state[0], state[1])
    other = open_loader(source)
    restarted = RunTotals(other.sources)
    other.load_state_dict(state[1])
    restarted.load_state_dict(state[0], state[1])
    assert run(loader, totals, 4) == run(other, restarted, 4)


def test_an_epoch_begun_by_a_checkpoint_without_totals_is_not_judged(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = SourceConfig(shards=str(images))
    first = open_loader(source)
    run(first, RunTotals(first.sources), 5)
    second = open_loader(source)
    totals = RunTotals(second.sources)
    second.load_state_dict(first.state_dict())
    totals.load_state_dict(None, first.state_dict())
    with caplog.at_level(logging.WARNING):
        figures = run(second, totals, 40)
    assert [one["delivered"] for one in closed(figures, "vision")] == [90, 90]
    assert "do not add up" not in caplog.text


def test_a_sample_that_vanishes_without_a_word_is_noticed(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = open_loader(SourceConfig(shards=str(images)))
    totals = RunTotals(loader.sources)
    for _ in range(14):
        next(loader)
        counts = loader.take_counts()
        if 0 in counts["vision"].epochs and counts["vision"].epochs[0].delivered == 7:
            counts["vision"].epochs[0].delivered -= 1
        totals.collect(counts, groups.single_process())
    assert "these do not add up" in caplog.text


@pytest.mark.parametrize("shortest", [0.1, 0.6])
def test_recordings_that_are_too_short_belong_to_the_epoch(
    sounds: Path, shortest: float, caplog: pytest.LogCaptureFixture
) -> None:
    loader = open_loader(SourceConfig(shards=str(sounds), modality="speech"))
    loader._data.speech.min_seconds = shortest
    totals = RunTotals(loader.sources)
    epochs = closed(run(loader, totals, 40), "speech")
    assert len(epochs) >= 2
    assert all(one["planned"] + one["left_out"] == 75 for one in epochs)
    assert all((one["left_out"] > 0) == (shortest > 0.5) for one in epochs)
    assert "do not add up" not in caplog.text


def test_audio_that_is_cropped_away_is_recorded_and_warned_of(sounds: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = open_loader(SourceConfig(shards=str(sounds), modality="speech"), size=40)
    [figures] = run(loader, RunTotals(loader.sources), 1)
    assert 0.1 < figures["data/cropped"] < 0.9
    assert "of the audio of speech is cropped away" in caplog.text
    assert "data.window_shards (2)" in caplog.text


@pytest.mark.parametrize("packing", ["continuous", "document"])
def test_tokens_and_padding_are_counted(texts: Path, packing: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = open_loader(SourceConfig(shards=str(texts), modality="text"))
    loader._data.text.packing = packing  # type: ignore[assignment]
    loader = StepLoader(loader._data, MODEL, MaskingConfig(kind="random"), seed=3, global_batch_size=5)
    totals = RunTotals(loader.sources)
    tokens = places = 0
    for _ in range(6):
        [batch] = next(loader)
        places += batch.inputs.numel()
        tokens += batch.inputs.numel() if batch.valid is None else int(batch.valid.sum())
    totals.collect(loader.take_counts(), groups.single_process())
    figures = totals.figures(2.0)
    assert figures["tokens"] == tokens
    assert figures["tokens_per_second"] == tokens / 2
    assert figures["data/padding"] == pytest.approx(1 - tokens / places)
    assert packing == "continuous" or figures["data/padding"] > 0
    assert "audio_seconds" not in figures
    epochs = closed(run(loader, totals, 300), "text")
    assert epochs
    assert "do not add up" not in caplog.text
