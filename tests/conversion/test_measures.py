"""What is readable is decided once: `measure_of` refuses what training would lose, and nothing else."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
from PIL import Image
from small_shards import documents, image_samples

from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labels import class_number
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.speech import resampling
from d2v_scale.modalities.text.decoder import require_text
from d2v_scale.modalities.text.tokenizer import open_tokenizer, usable_tokenizer
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.shards.content import WORDS
from d2v_scale.shards.writing import Sample, write_set


def image(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (picture or Image.linear_gradient("L").resize((48, 40)).convert("RGB")).save(content, kind, **options)
    return content.getvalue()


def sound(kind: str, rate: int = 44100, subtype: str | None = None, seconds: float = 1.0) -> bytes:
    content = io.BytesIO()
    wave = np.sin(np.arange(int(seconds * rate)) / 9) * 0.3
    soundfile.write(content, wave, rate, format=kind, subtype=subtype)
    return content.getvalue()


def of_unknown_length(flac: bytes) -> bytes:
    """As ffmpeg writes it into a pipe: no count of samples, no checksum."""
    changed = bytearray(flac)
    changed[21] &= 0xF0
    changed[22:42] = bytes(20)
    return bytes(changed)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


BOX = b"\0\0\0\x18ftyp%s\0\0\0\0mif1" + bytes(100)
NOISE = Image.effect_noise((200, 200), 90)
IMAGES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "jpeg": (lambda: image("JPEG"), None),
    "cmyk": (lambda: image("JPEG", Image.new("CMYK", (20, 20), (9, 80, 3, 0))), None),
    "palette": (lambda: image("PNG", Image.new("P", (20, 20), 3), transparency=b"\1\2\3"), None),
    "16 bit": (lambda: image("PNG", Image.fromarray(np.full((9, 9), 300, dtype=np.uint16))), None),
    "animated": (lambda: image("GIF", save_all=True, append_images=[Image.new("RGB", (48, 40), (255, 0, 0))]), None),
    "webp": (lambda: image("WEBP"), None),
    "avif": (lambda: BOX % b"avif", "is AVIF, which is not read"),
    "heic": (lambda: BOX % b"heic", "is HEIC, which is not read"),
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"<html>not found</html>", "no image"),
    "float": (lambda: image("TIFF", Image.fromarray(np.ones((9, 9), dtype=np.float32))), "range is not known"),
    "lab": (lambda: image("TIFF", Image.new("LAB", (9, 9))), None),
    "bomb": (lambda: image("PNG", Image.new("1", (20000, 20000))), "more than data.vision.max_pixels"),
    "cut jpeg": (lambda: image("JPEG", NOISE)[:-2000], "truncated"),
    "cut png": (lambda: image("PNG", NOISE)[:-2000], ""),
    "header of a jpeg": (lambda: image("JPEG")[:200], ""),
}
SOUNDS: dict[str, tuple[Callable[[], bytes], int | str]] = {
    "flac": (lambda: sound("FLAC"), 16000),
    "u-law": (lambda: sound("WAV", 8000, "ULAW"), 16000),
    "24 bits": (lambda: sound("WAV", 16000, "PCM_24"), 16000),
    "float": (lambda: sound("WAV", 16000, "FLOAT"), 16000),
    "sphere": (lambda: sound("NIST", 16000), 16000),
    "flac of unknown length": (lambda: of_unknown_length(sound("FLAC")), 16000),
    "half an mp3": (lambda: half(sound("MP3", seconds=3)), 23005),
    "half a flac": (lambda: half(sound("FLAC")), "lost sync"),
    "no samples": (lambda: sound("WAV")[:44], "no samples"),
    "empty": (lambda: b"", "empty"),
    "m4a": (lambda: BOX % b"M4A ", "not recognised"),
}
TEXTS: dict[str, tuple[bytes, str | None]] = {
    "sound": (b"the quick brown fox", None),
    "mark": (b"\xef\xbb\xbfthe quick brown fox", None),
    "latin-1": ("Grüße über Flüsse".encode("latin-1"), "not of the encoding"),
    "utf-16": ("the fox".encode("utf-16"), "NUL bytes"),
    "nul": (b"the \0 fox", "NUL bytes"),
    "blank": (b" \n\t ", "empty"),
    "surrogate": (b"broken \xed\xa0\xbd", "not of the encoding"),
}
MODELS: dict[str, ModelConfig] = {
    "vision": ModelConfig(vision=VisionStem(image_size=16, patch_size=4)),
    "speech": ModelConfig(speech=SpeechStem()),
    "text": ModelConfig(text=TextStem(vocab_size=331, mask_id=330, max_positions=24)),
}


def lost_in_training(folder: Path, modality: str, samples: list[Sample]) -> set[str]:
    """Keys of the samples that a stream of them loses, which knows no index."""
    write_set(folder / "made", "a", WORDS[modality], samples, per_shard=100)
    shards = folder / "bare"
    shards.mkdir()
    (folder / "made" / "a-000000.tar").rename(shards / "a-000000.tar")
    data = DataConfig(sources=[SourceConfig(shards=str(shards), modality=modality)], workers=0, max_bad_ratio=0.99)
    loader = StepLoader(
        data, MODELS[modality], MaskingConfig(kind="random", prob=0.5), seed=1, global_batch_size=len(samples)
    )
    [batch] = next(loader)
    assert len(batch.keys) + batch.lost == len(samples)
    return {sample["__key__"] for sample in samples} - set(batch.keys)


def reason_to_refuse(modality: str, members: dict[str, bytes]) -> str | None:
    try:
        measure_of(WORDS[modality])(members)
    except Exception as error:  # as its callers do
        return str(error)
    return None


def test_an_image_is_refused_where_training_loses_it(tmp_path: Path) -> None:
    """A converter took AVIF called .jpg, and images above the limit; training lost them in every epoch."""
    samples: list[Sample] = []
    for name, (make, reason) in IMAGES.items():
        samples.append({"__key__": name, "jpg": make()})
        said = reason_to_refuse("vision", {"jpg": samples[-1]["jpg"]})
        assert (said is None) == (reason is None), (name, said)
        assert reason is None or reason in (said or ""), (name, said)
    expected = {name for name, (_, reason) in IMAGES.items() if reason is not None}
    assert lost_in_training(tmp_path, "vision", samples) == expected


def test_an_image_larger_than_pillows_limit_is_read_where_ours_allows_it() -> None:
    content = image("PNG", Image.new("1", (20000, 10000)), compress_level=1)
    assert vision.open_image(content, 200_000_000).size == (20000, 10000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_recording_is_as_long_as_the_decoder_says(tmp_path: Path) -> None:
    """The length of half an MP3 was that of its header: it was sound to the index and lost in every epoch."""
    samples: list[Sample] = []
    for name, (make, expected) in SOUNDS.items():
        content = make()
        samples.append({"__key__": name, "wav": content})
        if isinstance(expected, str):
            assert expected in (reason_to_refuse("speech", {"mp3": content}) or ""), name
        else:
            length = measure_of("recording")({"mp3": content})
            assert length == len(speech.decode(content)) == pytest.approx(expected, abs=300), name
    expected_lost = {name for name, (_, expected) in SOUNDS.items() if isinstance(expected, str)}
    assert lost_in_training(tmp_path, "speech", samples) == expected_lost


def test_a_text_is_refused_where_it_would_be_mangled(texts: Path) -> None:
    measure = measure_of("text", texts / "tokenizer.model")
    for name, (content, reason) in TEXTS.items():
        if reason is None:
            assert measure({"txt": content}) == len(open_tokenizer(texts / "tokenizer.model")("the quick brown fox")), (
                name
            )
            continue
        with pytest.raises(ValueError, match=reason):
            measure({"txt": content})
        with pytest.raises(ValueError, match=reason):
            measure({"txt": b"the fox", "txt2": content})
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        require_text("broken \ud83d")


@pytest.mark.parametrize("ids", [np.zeros(0, np.int32), np.array([1.5]), np.array([-1, 2]), np.array([[1, 2]])])
def test_what_is_no_line_of_ids_is_refused(ids: Any) -> None:
    content = io.BytesIO()
    np.save(content, ids)
    with pytest.raises(ValueError, match="no line of token ids"):
        measure_of("text")({"npy": content.getvalue()})


def test_an_id_beyond_the_vocabulary_loses_its_document_and_not_the_run(tmp_path: Path) -> None:
    samples: list[Sample] = []
    for name, ids in (("sound", [5, 6, 2]), ("foreign", [5, 40000, 2])):
        content = io.BytesIO()
        np.save(content, np.array(ids * 20))
        samples.append({"__key__": name, "npy": content.getvalue()})
    write_set(tmp_path, "a", "text", samples, per_shard=1, measure=measure_of("text"))
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path), modality="text")], workers=0, max_bad_ratio=0.99)
    loader = StepLoader(data, MODELS["text"], MaskingConfig(kind="random"), seed=1, global_batch_size=6)
    [batch] = next(loader)
    assert batch.lost == 3
    assert int(batch.inputs.max()) == 6


@pytest.mark.parametrize("special", [{"bos_id": -1, "eos_id": -1, "pad_id": 0, "unk_id": 1}, {"unk_id": 0}, {}])
def test_a_foreign_tokenizer_is_refused_before_shards_are_made(tmp_path: Path, special: dict[str, int]) -> None:
    """Ids that ended with -1 were stored, and refused when training began."""
    model = tmp_path / "foreign.model"
    with model.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(200)),
            model_writer=stream,
            vocab_size=40,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
            **special,
        )
    with pytest.raises(DataError, match=r"foreign.model lacks (<s>|<pad>).*has the ids \("):
        usable_tokenizer(model)


@pytest.mark.parametrize("label", [b"dog", b"5000000", b"-1", b"1.5", b"", b"\xff"])
def test_a_label_that_is_no_class_number_is_named(label: bytes) -> None:
    with pytest.raises(ValueError, match="no class number below 100000"):
        class_number(label)
    assert class_number(b" 12\n") == 12


def test_labels_that_are_no_numbers_cost_pretraining_nothing(tmp_path: Path) -> None:
    samples = image_samples(8)
    for sample in samples:
        sample["cls"] = b"dog"
    assert lost_in_training(tmp_path, "vision", samples) == set()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_whatever_its_exif_says(kind: str, orientation: int) -> None:
    """Pictures of a phone that was held upright were learned lying on their side."""
    meant = np.zeros((96, 64, 3), dtype=np.uint8)
    meant[:48, :32], meant[48:, :32], meant[:48, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    turn = vision._TURNS.get(inverse)
    stored = Image.fromarray(meant) if turn is None else Image.fromarray(meant).transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    content = image(kind, stored, exif=exif, **options)
    assert vision.upright_size(vision.open_image(content, 10**6)) == (64, 96)
    for factor in (1, 2):
        seen = vision.upright(vision.open_image(content, 10**6), "RGB", factor)
        shown = np.asarray(seen.resize((64, 96), Image.Resampling.BOX)).astype(int)
        assert abs(shown - meant).mean() < 8, (orientation, factor)


def test_damaged_exif_data_do_not_lose_an_image() -> None:
    content = image("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 20)
    assert vision.upright(vision.open_image(content, 10**6), "RGB").size == (48, 40)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_output_by_output_is_torchaudios(rate: int) -> None:
    wave = np.random.default_rng(0).standard_normal(rate // 4).astype(np.float32)
    expected = resampling.resample(wave, rate)
    divisor = int(np.gcd(rate, 16000))
    ours = resampling._by_output(wave, rate // divisor, 16000 // divisor)
    assert ours.shape == expected.shape == (resampling.length_at_16_khz(len(wave), rate),)
    assert np.abs(ours - expected).max() < 1e-4  # torchaudio counts time in fp32


@pytest.mark.parametrize("rate", [7999, 8001, 11127, 44056, 999_983])
def test_an_odd_rate_needs_no_large_kernel(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second at 8001 Hz took 4.3 GB."""
    monkeypatch.setattr(resampling, "_by_kernel", lambda _: pytest.fail("a kernel was made"))
    wave = resampling.resample(np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32), rate)
    assert len(wave) == resampling.length_at_16_khz(rate // 2, rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(wave)) / 16000)
    assert np.abs(wave - expected)[100:-100].max() < 1e-2
