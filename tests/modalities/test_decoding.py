"""Decoding, cropping and packing: d2v_scale.data.{vision,speech,text}"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_shards import documents, image_samples, sound_samples

from d2v_scale.data.config import DataConfig, SourceConfig, SpeechData, VisionData
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.text.decoder import TextDecoder, chunks_of_documents
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.shards.reading import SampleFault
from d2v_scale.shards.writing import write_set


class OneSample:
    """A sample that is not in a shard."""

    key = "k"

    def __init__(self, extension: str, content: bytes) -> None:
        self._member = extension, memoryview(content)

    def read(self, shard: int, number: int) -> "OneSample":
        return self

    def member(self, extensions: tuple[str, ...]) -> tuple[str, memoryview]:
        assert self._member[0] in extensions
        return self._member

    def fault(self, reason: str) -> SampleFault:
        return SampleFault("s", "k", reason)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> OneSample:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return OneSample("jpg" if kind == "JPEG" else "png", content.getvalue())


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900), seed=st.integers(0, 10**6))
def test_crops_lie_inside_the_image_and_keep_their_limits(width: int, height: int, seed: int) -> None:
    config = VisionData(crop_scale=(0.2, 1.0))
    left, top, right, bottom = vision.crop_box(width, height, config, np.random.default_rng(seed).random(vision.DRAWS))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 50 and 0.6 < width / height < 1.6:
        share = (right - left) * (bottom - top) / (width * height)
        assert 0.17 < share <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.43


@settings(max_examples=100, deadline=None)
@given(width=st.integers(60, 900), height=st.integers(60, 900), aspect=st.floats(0.5, 2.0), seed=st.integers(0, 10**6))
def test_crops_have_the_shape_of_the_models_images(width: int, height: int, aspect: float, seed: int) -> None:
    config, draws = VisionData(crop_ratio=(0.75, 4 / 3)), np.random.default_rng(seed).random(vision.DRAWS)
    left, top, right, bottom = vision.crop_box(width, height, config, draws, aspect)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert 0.7 < (right - left) / (bottom - top) / aspect < 1.43
    left, top, right, bottom = vision.centre_box(width, height, 0.9, aspect)
    assert (right - left) / (bottom - top) == pytest.approx(aspect)
    assert max((right - left) / width, (bottom - top) / height) == pytest.approx(0.9)
    assert (left + right, top + bottom) == pytest.approx((width, height))


def test_a_wide_model_sees_its_crop_in_proportion() -> None:
    """A circle stays one: nothing is stretched in evaluation."""
    x, y = np.meshgrid(np.arange(120) - 59.5, np.arange(90) - 44.5)
    disc = Image.fromarray((np.hypot(x, y) < 20).astype(np.uint8) * 255)
    decoder = vision.VisionDecoder(VisionData(), VisionStem(image_size=(32, 48), patch_size=4, channels=1))
    row = decoder.evaluation_row(encoded(disc))  # type: ignore[arg-type]
    assert row.shape == (32, 48)
    tall, wide = (row > 127).any(axis=1).sum(), (row > 127).any(axis=0).sum()
    assert abs(int(tall) - int(wide)) <= 1
    assert abs(tall - 40 * 32 / (80 * 0.875)) <= 1
    assert decoder.stack([row]).grid == (8, 12)
    assert decoder.blank().shape == (32, 48, 1)


def test_crop_areas_are_uniform() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(3000):
        left, top, right, bottom = vision.crop_box(
            1000, 1000, VisionData(crop_scale=(0.1, 0.5)), rng.random(vision.DRAWS)
        )
        areas.append((right - left) * (bottom - top) / 1e6)
    assert np.abs(np.quantile(areas, [0.25, 0.5, 0.75]) - [0.2, 0.3, 0.4]).max() < 0.02


def test_a_large_jpeg_is_decoded_small_with_nearly_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.meshgrid(np.linspace(0, 6, 1600), np.linspace(0, 5, 1200))
    smooth = ((np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) + 1) * 127).astype(np.uint8)
    sample = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    decoder = vision.VisionDecoder(VisionData(jitter=(0, 0, 0)), VisionStem(image_size=64))
    draws = np.random.default_rng(3).random(vision.DRAWS)
    drafted = decoder.training_row(sample, 0, 0, 0, draws).values.astype(float)  # type: ignore[arg-type]
    sizes = []
    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size) or original(self, *a, **k))
    decoder.training_row(sample, 0, 0, 0, draws)  # type: ignore[arg-type]
    assert sizes[0][0] <= 800
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    full = decoder.training_row(sample, 0, 0, 0, draws).values.astype(float)  # type: ignore[arg-type]
    assert sizes[1][0] == 1600
    assert np.abs(full - drafted).mean() < 2


def test_images_are_normalised_per_channel_and_grey_models_get_one() -> None:
    sample = encoded(Image.new("RGB", (20, 20), (255, 0, 128)))
    decoder = vision.VisionDecoder(VisionData(), VisionStem(image_size=8, patch_size=4))
    row = decoder.evaluation_row(sample)  # type: ignore[arg-type]
    stacked = decoder.stack([row])
    assert stacked.inputs.shape == (1, 3, 8, 8)
    assert torch.allclose(
        stacked.inputs[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, 0.426]), atol=1e-2
    )
    grey = vision.VisionDecoder(VisionData(), VisionStem(image_size=8, patch_size=4, channels=1))
    assert grey.stack([grey.evaluation_row(sample)]).inputs.shape == (1, 1, 8, 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="channels"):
        vision.VisionDecoder(VisionData(mean=[0.5] * 4, std=[0.5] * 4), VisionStem(channels=4))


def deep(kind: str) -> Image.Image:
    """A grey ramp of 64 x 64 pixels, 0 to 65535."""
    return Image.fromarray(np.linspace(0, 65535, 4096).reshape(64, 64).astype(kind))


@pytest.mark.parametrize(("pixels", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<u2", "PPM")])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_keep_their_shades(pixels: str, kind: str, channels: int) -> None:
    """All that was not nearly black became white."""
    decoder = vision.VisionDecoder(VisionData(), VisionStem(image_size=64, channels=channels))
    row = decoder.evaluation_row(encoded(deep(pixels), kind))  # type: ignore[arg-type]
    shades = Image.fromarray((np.asarray(deep("<u2")) // 256).astype(np.uint8))
    expected = decoder.evaluation_row(encoded(shades))  # type: ignore[arg-type]
    assert np.array_equal(row, expected)
    assert len(np.unique(row)) > 200


@pytest.mark.parametrize("pixels", ["<i4", "<f4"])
def test_images_of_unknown_range_are_refused(pixels: str) -> None:
    decoder = vision.VisionDecoder(VisionData(), VisionStem(image_size=64))
    with pytest.raises(ValueError, match="range is not known"):
        decoder.evaluation_row(encoded(deep(pixels), "TIFF"))  # type: ignore[arg-type]


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    decoder = vision.VisionDecoder(VisionData(max_pixels=1000), VisionStem())
    with pytest.raises(SampleFault, match=r"100 x 100 pixels, more than data.vision.max_pixels"):
        decoder.evaluation_row(encoded(Image.new("RGB", (100, 100))))  # type: ignore[arg-type]


def test_jitter_changes_colours_only_where_it_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    sample = encoded(Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)))
    draws = rng.random(vision.DRAWS)
    rows = [
        vision.VisionDecoder(VisionData(jitter=jitter), VisionStem(image_size=16)).training_row(sample, 0, 0, 0, draws)  # type: ignore[arg-type]
        for jitter in ((0.0, 0.0, 0.0), (0.4, 0.4, 0.4))
    ]
    assert not np.array_equal(rows[0].values, rows[1].values)


@pytest.mark.parametrize(("rate", "kind"), [(16000, "FLAC"), (8000, "WAV"), (44100, "OGG"), (22050, "MP3")])
def test_recordings_of_any_rate_and_format_become_16_khz_mono(rate: int, kind: str) -> None:
    time = np.arange(rate) / rate
    stereo = np.stack([np.sin(2 * np.pi * 440 * time)] * 2, axis=1) * 0.5
    content = io.BytesIO()
    soundfile.write(content, stereo, rate, format=kind)
    wave = speech.decode(content.getvalue())
    assert wave.dtype == np.float32
    assert speech.measure({kind.lower(): content.getvalue()}) == len(wave) == 16000
    spectrum = np.abs(np.fft.rfft(wave[2000:12000]))
    assert abs(spectrum.argmax() * 1.6 - 440) < 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_recording_with_a_value_that_is_not_finite_is_lost_alone(tmp_path: Path, value: float) -> None:
    """One NaN made its batch's loss NaN: the whole step was skipped, every epoch, and nothing named the recording."""
    samples = sound_samples(4)
    wave = np.zeros((8000, 2), dtype=np.float32)
    wave[4000, 1] = value
    content = io.BytesIO()
    soundfile.write(content, wave, 16000, format="WAV", subtype="FLOAT")
    samples[2] = {"__key__": "broken", "wav": content.getvalue(), "cls": 0}
    write_set(tmp_path, "train", "recording", samples, per_shard=10, measure=speech.measure)
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path), modality="speech")], workers=0, max_bad_ratio=0.5)
    loader = StepLoader(
        data, ModelConfig(speech=SpeechStem()), MaskingConfig(kind="random"), seed=1, global_batch_size=4
    )
    [batch] = next(loader)
    assert batch.inputs.isfinite().all()
    assert batch.lost == 1
    assert "broken" not in batch.keys
    assert loader.faults() == {str(tmp_path / "train-000000.tar"): 1}


def test_normalisation_is_over_the_whole_file() -> None:
    wave = (np.random.default_rng(0).standard_normal(4000) * 0.01 + 3).astype(np.float32)
    normal = speech.normalize(wave)
    reference = torch.nn.functional.layer_norm(torch.from_numpy(wave).double(), (4000,)).numpy()
    assert np.abs(normal - reference).max() < 1e-3


def test_frames_are_those_of_the_convolutions() -> None:
    lengths = {400: 1, 16000: 49, 32000: 99, 160000: 499, 250000: 781, 320000: 999}
    assert {samples: SpeechStem().frames_of(samples) for samples in lengths} == lengths
    assert SpeechStem().frames_of(torch.tensor([*lengths])).tolist() == [*lengths.values()]
    with pytest.raises(ConfigError, match=r"data.speech.min_seconds.*Give at least 0.025"):
        speech.SpeechDecoder(SpeechData(min_seconds=0.01), SpeechStem())
    coarse = SpeechStem(conv_layers=[(8, 4000, 2000)])
    with pytest.raises(ConfigError, match=r"Give at least 0\.25"):
        speech.SpeechDecoder(SpeechData(min_seconds=0.1), coarse)
    speech.SpeechDecoder(SpeechData(min_seconds=0.25), coarse)


@given(lengths=st.lists(st.integers(-1, 90), max_size=20), block=st.integers(1, 40))
@settings(deadline=None)
def test_chunks_cover_every_token_of_every_document_once(lengths: list[int], block: int) -> None:
    document_c, start_c, stop_c = chunks_of_documents(np.array(lengths, dtype=np.int64), block)
    seen = [(d, t) for d, a, b in zip(document_c, start_c, stop_c, strict=True) for t in range(a, b)]
    assert sorted(seen) == [(d, t) for d, length in enumerate(lengths) for t in range(max(length, 0))]
    assert len(document_c) == 0 or int((stop_c - start_c).max()) <= block


@pytest.mark.parametrize("packing", ["continuous", "document"])
def test_blocks_hold_every_token_once_and_begin_with_bos(texts: Path, tmp_path: Path, packing: str) -> None:
    model = ModelConfig(text=TextStem(vocab_size=331, mask_id=330, max_positions=24))
    data = DataConfig(sources=[SourceConfig(shards=str(texts), modality="text")], workers=0)
    data.text.packing = packing  # type: ignore[assignment]
    data.cache_dir = str(tmp_path)
    tokenizer = open_tokenizer(texts / "tokenizer.model")
    expected = sorted(token for text in documents(110) for token in tokenizer(text))
    for _ in range(2):  # the second pass reads the cache
        loader = StepLoader(data, model, MaskingConfig(kind="spans", length=3, prob=0.3), seed=1, global_batch_size=1)
        seen: list[int] = []
        while loader.counters()["text/epoch"] == 0:
            [batch] = next(loader)
            if batch.epoch > 0:
                break
            row = batch.inputs[0]
            assert row[0] == 0
            assert (batch.valid is None) == bool((row != 1).all())
            seen += row[1:][row[1:] != 1].tolist()
            assert packing == "continuous" or (row[1:-1] == 2).sum() == 0 or row[row != 1][-1] == 2
        # An epoch of one block per step ends exactly at the edge.
        assert sorted(seen) == expected


def test_a_recording_of_less_than_a_frame_is_lost_by_name() -> None:
    content = io.BytesIO()
    soundfile.write(content, np.zeros(100, dtype=np.float32), 16000, format="WAV")
    decoder = speech.SpeechDecoder(SpeechData(), SpeechStem())
    with pytest.raises(SampleFault, match="100 samples long, less than one frame"):
        decoder.evaluation_row(OneSample("wav", content.getvalue()))  # type: ignore[arg-type]


@pytest.mark.parametrize(("wrong", "told"), [(1, "which is padding"), (40, "the model has 40"), (-7, "the id -7")])
def test_a_document_with_ids_that_the_model_cannot_read_is_lost_by_name(wrong: int, told: str) -> None:
    """A padding id inside would pass for the end of the row, and its mask be drawn for another length."""
    content = io.BytesIO()
    np.save(content, np.array([7, wrong, 8, 2]))
    decoder = TextDecoder(DataConfig(sources=[]), TextStem(vocab_size=40, mask_id=39), None)
    sample = OneSample("npy", content.getvalue())
    sample.has = lambda extension: False  # type: ignore[attr-defined]
    with pytest.raises(SampleFault, match=told):
        decoder.evaluation_row(sample)  # type: ignore[arg-type]


def test_a_students_tokens_are_masked_and_the_teachers_are_not(texts: Path) -> None:
    model = ModelConfig(text=TextStem(vocab_size=331, mask_id=330, max_positions=24))
    data = DataConfig(sources=[SourceConfig(shards=str(texts), modality="text")], workers=0)
    [batch] = next(
        StepLoader(data, model, MaskingConfig(kind="spans", length=3, prob=0.3), seed=1, global_batch_size=8)
    )
    assert batch.student_inputs is not None
    assert (batch.student_inputs[batch.masked_rt] == 330).all()
    assert torch.equal(batch.student_inputs[~batch.masked_rt], batch.inputs[~batch.masked_rt])
    assert (batch.inputs != 330).all()


def test_another_tokenizer_than_the_indexs_is_refused(texts: Path, tmp_path: Path) -> None:
    from d2v_scale.modalities.text.tokenizer_training import train

    train(documents(200), tmp_path / "other.model", vocab_size=320)
    data = DataConfig(sources=[SourceConfig(shards=str(texts), modality="text")], workers=0)
    data.text.tokenizer = str(tmp_path / "other.model")
    model = ModelConfig(text=TextStem(vocab_size=331, mask_id=330))
    with pytest.raises(DataError, match="are of another tokenizer"):
        StepLoader(data, model, MaskingConfig(kind="random"), seed=1, global_batch_size=8)
    data.text.tokenizer = None
    model = ModelConfig(text=TextStem(vocab_size=300, mask_id=299))
    with pytest.raises(ConfigError, match=r"Set model.text.vocab_size to 331"):
        StepLoader(data, model, MaskingConfig(kind="random"), seed=1, global_batch_size=8)


def test_labelled_sets_have_every_label_in_order(images: Path) -> None:
    model = ModelConfig(vision=VisionStem(image_size=8, patch_size=4))
    labelled = LabelledSet(str(images), "vision", DataConfig(), model, batch_size=16)
    keys, labels = [], []
    for batch, labels_b in labelled:
        assert not batch.masked_rt.any()
        keys += batch.keys
        labels += labels_b.tolist()
    assert keys == [f"image-{k:04d}" for k in range(90)]
    assert labels == [k % 3 for k in range(90)]
    assert labelled.classes == ["a", "b", "c"]
    assert sum(len(b.keys) for b, _ in LabelledSet(str(images), "vision", DataConfig(), model, limit=13)) == 13


def test_shares_of_a_labelled_set_are_all_of_it(tmp_path: Path) -> None:
    samples = image_samples(10)
    for number in (4, 5):
        samples[number]["png"] = b"no image"
    write_set(tmp_path, "test", "image", samples, per_shard=10)
    model = ModelConfig(vision=VisionStem(image_size=8, patch_size=4))
    labelled = LabelledSet(str(tmp_path), "vision", DataConfig(max_bad_ratio=0.5), model, batch_size=2)
    whole = [batch.keys for batch, _ in labelled]
    assert labelled.batches == 5
    shares = [[None if found is None else found[0].keys for found in labelled.share(part, 2)] for part in range(2)]
    assert shares == [[whole[0], None, whole[3]], [whole[1], whole[2]]]


def test_text_is_tokenised_all_the_same_where_its_cache_cannot_be_written(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelConfig(text=TextStem(vocab_size=331, mask_id=330, max_positions=32))
    source = SourceConfig(shards=str(texts), modality="text")

    def first_steps(name: str) -> list[torch.Tensor]:
        data = DataConfig(sources=[source], workers=0, cache_dir=str(tmp_path / name))
        loader = StepLoader(data, model, MaskingConfig(kind="random"), seed=1, global_batch_size=8)
        return [next(loader)[0].inputs for _ in range(3)]

    expected = first_steps("sound")

    def full(*_: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    for found, wanted in zip(first_steps("full"), expected, strict=True):
        assert torch.equal(found, wanted)
    assert caplog.text.count("No space left") == 1
