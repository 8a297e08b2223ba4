"""d2v_scale.data.labelled: what evaluation reads, and what it says of what it cannot read."""

from pathlib import Path

import pytest
import tiny_models
from small_shards import documents, image_samples, sound_samples

from d2v_scale.data.config import DataConfig, SpeechData
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.labels import ClassLabels, Transcripts, Vocabulary
from d2v_scale.errors import DataError
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.modalities.text.decoder import TokenCounter
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem, VisionStem
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.writing import write_set

IMAGES = ModelConfig(vision=VisionStem(image_size=8, patch_size=4))


def test_a_whole_transcript_is_of_a_whole_recording(tmp_path: Path) -> None:
    samples = [sample | {"txt": "yes"} for sample in sound_samples(6)]
    write_set(tmp_path, "test", "recording", samples, per_shard=3, measure=measure)
    data = DataConfig(speech=SpeechData(max_seconds=0.3))
    model = tiny_models.model("v1_speech")

    def lengths(labels: Transcripts | ClassLabels) -> list[int]:
        labelled = LabelledSet(str(tmp_path), "speech", data, model, batch_size=1, labels=labels)
        return [batch.inputs.shape[1] for batch, _ in labelled]

    whole = [measure({"flac": sample["flac"]}) for sample in samples]
    assert max(whole) > 4800
    assert lengths(Transcripts(Vocabulary())) == whole
    assert lengths(ClassLabels()) == [min(length, 4800) for length in whole]
    assert data.speech.max_seconds == 0.3


def test_lost_labelled_samples_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = image_samples(12)
    for number in (1, 4):
        samples[number]["png"] = b"no image"
    samples[6]["cls"] = 7
    write_set(tmp_path, "test", "image", samples, per_shard=20)
    data = DataConfig(max_bad_ratio=0.9)
    labelled = LabelledSet(str(tmp_path), "vision", data, IMAGES, labels=ClassLabels(3))
    for _ in range(2):
        assert sum(len(batch.keys) for batch, _ in labelled.read()) == 9
    assert caplog.text.count("image-0001: is no image of a format that is read") == 1
    assert caplog.text.count("image-0006: its .cls is 7, classes are 0 to 2") == 1
    assert "3 of 12 labelled samples" in caplog.text
    lost = LabelledSet(str(tmp_path), "vision", data, IMAGES, labels=ClassLabels(0))
    with pytest.raises(DataError, match=r"No sample .* the first: .*image-0000: its .cls is 0"):
        lost.read()


def test_text_without_a_tokenizer_is_refused_by_that_name(tmp_path: Path) -> None:
    texts = documents(12)
    model_file = tmp_path / "tokenizer.model"
    tokenizer_training.train(texts * 5, model_file, vocab_size=300)
    samples = [{"__key__": f"{k}", "txt": text, "cls": k % 2} for k, text in enumerate(texts)]
    write_set(tmp_path, "test", "text", samples, per_shard=20, measure=TokenCounter(model_file), tokenizer=model_file)
    stem = ModelConfig(text=TextStem(vocab_size=301, max_positions=24, mask_id=300))
    index = SetIndex.load(tmp_path / "test.index.json")
    assert LabelledSet(str(tmp_path), "text", DataConfig(), stem).tokenizer_sha256 == index.tokenizer_sha256
    index.tokenizer = index.tokenizer_sha256 = None
    index.save(tmp_path / "test.index.json")
    with pytest.raises(DataError, match="names a tokenizer"):
        LabelledSet(str(tmp_path), "text", DataConfig(), stem)
