"""Labelled samples from shards: whole, with their labels, in an order that survives a stop and another world size."""

from pathlib import Path

import pytest
import tiny_models
import torch
from small_shards import documents, image_samples, sound_samples

from d2v_scale.data.config import DataConfig, SourceConfig, SpeechData
from d2v_scale.data.labels import Scores, Vocabulary
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.finetuning.config import CtcConfig, ImageConfig, TaskConfig
from d2v_scale.finetuning.loading import LabelledLoader
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.modalities.text.decoder import TokenCounter
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem, VisionStem
from d2v_scale.parallel import groups
from d2v_scale.running.totals import RunTotals
from d2v_scale.shards.writing import write_set

TEXTS = ["One", "two three", "café"]


def loader(task: TaskConfig, model: ModelConfig, shards: Path, modality: str, **options) -> LabelledLoader:  # type: ignore[no-untyped-def]
    data = DataConfig(sources=[SourceConfig(shards=str(shards), modality=modality)], workers=0)
    data.speech = SpeechData(max_seconds=0.5)
    options = {"seed": 1, "global_batch_size": 4, **options}
    return LabelledLoader(task, data, model, **options)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    samples = [sample | {"txt": TEXTS[k % 3]} for k, sample in enumerate(sound_samples(24))]
    write_set(tmp_path, "train", "recording", samples, per_shard=10, measure=measure)
    return tmp_path


def test_recordings_come_whole_with_their_transcripts_and_long_ones_are_left_out(recordings: Path) -> None:
    task = TaskConfig(kind="ctc", ctc=CtcConfig(letters="abcdefghijklmnopqrstuvwxyz"))
    loaded = loader(task, tiny_models.model("v1_speech"), recordings, "speech")
    seen: dict[str, int] = {}
    vocabulary = Vocabulary(task.ctc.letters)
    for _ in range(12):
        [batch] = next(loaded)
        assert batch.labels is not None
        for row, sample_key in enumerate(batch.keys):
            length = batch.inputs.shape[1] if batch.valid is None else int(batch.valid[row].sum())
            seen[sample_key] = length
            learned = [number for number in batch.labels[row].tolist() if number >= 0]
            assert learned == vocabulary.encode(TEXTS[int(sample_key[-4:]) % 3]).tolist()
    short = {s["__key__"]: measure({"flac": s["flac"]}) for s in sound_samples(24)}
    assert seen == {name: length for name, length in short.items() if length <= 8000}
    assert min(seen.values()) < max(seen.values())


def test_every_rank_has_its_share_and_a_stopped_loader_continues(recordings: Path) -> None:
    task, model = TaskConfig(kind="classify", classes=3), tiny_models.model("v1_speech")
    alone = loader(task, model, recordings, "speech")
    whole = [next(alone)[0] for _ in range(4)]
    state = alone.state_dict()
    after = next(alone)[0]
    pair = [loader(task, model, recordings, "speech", dp_rank=rank, dp_size=2) for rank in range(2)]
    for expected in whole:
        parts = [next(one)[0] for one in pair]
        assert sum((part.keys for part in parts), ()) == expected.keys
    continued = loader(task, model, recordings, "speech")
    continued.load_state_dict(state)
    assert next(continued)[0].keys == after.keys
    assert set(torch.cat([batch.labels for batch in whole if batch.labels is not None]).tolist()) == {0, 1, 2}


def test_images_are_augmented_by_draws_of_their_own(tmp_path: Path) -> None:
    write_set(tmp_path, "train", "image", image_samples(8, side=16), per_shard=10, classes=["a", "b", "c"])
    model = ModelConfig(vision=VisionStem(image_size=16, patch_size=4))
    plain = loader(TaskConfig(), model, tmp_path, "vision", global_batch_size=8)
    strong = [TaskConfig(image=ImageConfig(rand_augment=9.0)) for _ in range(2)]
    first, again = (next(loader(task, model, tmp_path, "vision", global_batch_size=8))[0] for task in strong)
    batch = next(plain)[0]
    assert torch.equal(first.inputs, again.inputs)
    assert first.keys == batch.keys
    assert not torch.equal(first.inputs, batch.inputs)
    assert plain.classes == ["a", "b", "c"]


def test_pairs_of_texts_are_joined_and_the_longer_one_is_shortened(tmp_path: Path) -> None:
    texts = documents(12)
    model_file = tmp_path / "tokenizer.model"
    tokenizer_training.train(texts * 5, model_file, vocab_size=300)
    long = " ".join(texts)
    samples = [
        {"__key__": f"{k}", "txt": long if k == 0 else "a fox", "txt2": "a dog", "score": f"{k / 2}"} for k in range(4)
    ]
    write_set(tmp_path, "train", "text", samples, per_shard=10, measure=TokenCounter(model_file), tokenizer=model_file)
    stem = TextStem(vocab_size=301, max_positions=24, mask_id=300)
    loaded = loader(TaskConfig(kind="regress"), ModelConfig(text=stem), tmp_path, "text")
    [batch] = next(loaded)
    rows = dict(zip(batch.keys, batch.inputs, strict=True))
    dog = rows["1"][rows["1"] != stem.pad_id].tolist()
    assert dog[0] == stem.bos_id
    ends = [at for at, token in enumerate(dog) if token == stem.eos_id]
    assert len(ends) == 3
    assert ends[1] == ends[0] + 1
    assert ends[2] == len(dog) - 1
    second = dog[ends[1] :]
    full = rows["0"].tolist()
    assert len(full) == 24
    assert full[-len(second) :] == second, "the short text is whole"
    assert full[-len(second) - 1] == stem.eos_id
    assert isinstance(loaded.labels, Scores)
    assert dict(zip(batch.keys, batch.labels.tolist(), strict=True)) == {"0": 0.0, "1": 0.5, "2": 1.0, "3": 1.5}  # type: ignore[union-attr]


def test_samples_without_a_label_are_passed_over_and_a_bad_one_is_named(tmp_path: Path) -> None:
    samples = image_samples(12, side=16)
    for number in range(0, 12, 2):
        del samples[number]["cls"]
    samples[5]["cls"] = "no number"  # type: ignore[assignment]
    for sample in samples:
        if "cls" in sample:
            sample["cls"] = str(sample["cls"]).encode()
    write_set(tmp_path, "train", "image", samples, per_shard=7)
    model = ModelConfig(vision=VisionStem(image_size=16, patch_size=4))
    loaded = loader(TaskConfig(classes=3), model, tmp_path, "vision", global_batch_size=6)
    [batch] = next(loaded)
    assert sorted(batch.keys) == [f"image-{number:04d}" for number in (1, 3, 7, 9, 11)]
    assert batch.lost == 1
    labels = dict(zip(batch.keys, batch.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert all(label == int(sample_key[-4:]) % 3 for sample_key, label in labels.items())
    assert list(loaded.faults().values()) == [1]


def test_shards_without_labels_or_an_index_are_refused(recordings: Path) -> None:
    with pytest.raises(DataError, match=r"has a label \(.score\)"):
        loader(TaskConfig(kind="regress"), tiny_models.model("v1_speech"), recordings, "speech")
    for index in recordings.glob("*.index*"):
        index.unlink()
    with pytest.raises(DataError, match="index"):
        loader(TaskConfig(), tiny_models.model("v1_speech"), recordings, "speech")


def test_a_label_without_an_output_is_a_lost_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = image_samples(6, side=16)
    samples[2]["cls"], samples[4]["cls"] = 7, -1
    write_set(tmp_path, "train", "image", samples, per_shard=10)
    model = ModelConfig(vision=VisionStem(image_size=16, patch_size=4))
    [batch] = next(loader(TaskConfig(classes=5), model, tmp_path, "vision", global_batch_size=6))
    assert batch.lost == 2
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 2]
    assert "image-0002: its .cls is 7, classes are 0 to 4" in caplog.text


def test_classes_are_compared_over_all_sources_before_the_first_step(tmp_path: Path) -> None:
    names = {"one": ["a", "b", "c"], "two": ["a", "b"], "other": ["b", "a"]}
    for folder, classes in names.items():
        write_set(tmp_path / folder, "train", "image", image_samples(6, side=16), per_shard=10, classes=classes)
    model = ModelConfig(vision=VisionStem(image_size=16, patch_size=4))

    def opened(task: TaskConfig, *folders: str) -> LabelledLoader:
        sources = [SourceConfig(shards=str(tmp_path / folder)) for folder in folders]
        return LabelledLoader(task, DataConfig(sources=sources, workers=0), model, seed=1, global_batch_size=4)

    assert opened(TaskConfig(), "two", "one").classes == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"Class 0 is 'b' in .*other.* and 'a' in .*one"):
        opened(TaskConfig(), "one", "other")
    with pytest.raises(ConfigError, match=r"task\.classes: is 2, but the shards' index names 3, the last of them 'c'"):
        opened(TaskConfig(classes=2), "one")


def test_recordings_too_long_for_their_transcripts_are_reported(recordings: Path) -> None:
    task = TaskConfig(kind="ctc")
    loaded = loader(task, tiny_models.model("v1_speech"), recordings, "speech")
    lengths = [measure({"flac": sample["flac"]}) for sample in sound_samples(24)]
    long = sum(length > 8000 for length in lengths)
    totals, topology = RunTotals(loaded.sources), groups.single_process()
    figures: dict[str, float] = {}
    while "data/speech/epoch_left_out" not in figures:
        next(loaded)
        totals.collect(loaded.take_counts(), topology)
        figures = totals.figures(1.0)
    assert figures["data/speech/epoch_left_out"] == long > 0
    assert figures["data/speech/epoch_delivered"] == 24 - long
    again = RunTotals(loaded.sources)
    again.load_state_dict(totals.state_dict(), loaded.state_dict())
    assert again.figures(1.0)["data/left_out"] == figures["data/left_out"]
