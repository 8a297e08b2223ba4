"""Recordings as log-mel arrays: what Kaldi computes, the same bits whatever part is read, and what is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import npy, sound_samples

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.modalities.array import log_mel
from d2v_scale.modalities.array.decoder import ArrayDecoder
from d2v_scale.modalities.array.log_mel import Spectrum, fbank
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem
from d2v_scale.shards.reading import SampleFault, SampleStore
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import Sample, write_set

BANDS = 16


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * 0.1


def wav(wave: np.ndarray, rate: int = 16_000) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, wave, rate, format="WAV", subtype="FLOAT")
    return content.getvalue()


def stem_of(*, extent: int = 32, longer: Any = "crop", transform: Any = "log_mel", **options: Any) -> ArrayStem:
    axes = {"band": ArrayAxis(patch=4, extent=BANDS), "time": ArrayAxis(patch=4, extent=extent, longer=longer)}
    return ArrayStem(axes=axes, transform=transform, **options)


def test_it_is_kaldis_as_eat_calls_it() -> None:
    """Of a recording shorter than a piece bit by bit; of a longer one, which is computed in pieces, nearly."""
    from torchaudio.compliance import kaldi

    for seconds, exact in ((0.025, True), (0.5, True), (10, True), (60, False)):
        wave = noise(int(16_000 * seconds))
        theirs = kaldi.fbank(
            torch.from_numpy(wave)[None],
            htk_compat=True,
            sample_frequency=16_000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        ).numpy()
        ours = Spectrum(wave, LogMel(), 128).whole()
        assert ours.shape == (1, 128, len(theirs))
        assert ours.flags.c_contiguous
        if exact:
            np.testing.assert_array_equal(ours[0], theirs.T)
        np.testing.assert_allclose(ours[0], theirs.T, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(400, 40_000),
    start=st.floats(0, 1),
    stop=st.floats(0, 1),
    piece=st.sampled_from([1, 7, 64, 4096]),
)
def test_a_part_has_the_bits_that_it_has_in_the_whole(samples: int, start: float, stop: float, piece: int) -> None:
    def spectrum() -> Spectrum:
        made = Spectrum(noise(samples), LogMel(), BANDS)
        made._piece = piece
        return made

    whole = spectrum().whole()
    frames = whole.shape[2]
    first = min(frames - 1, int(start * frames))
    last = max(first + 1, int(stop * frames))
    np.testing.assert_array_equal(spectrum().slice(2, first, last), whole[:, :, first:last])
    np.testing.assert_array_equal(spectrum().slice(1, 3, 9), whole[:, 3:9])


def test_a_crop_of_a_long_recording_computes_the_pieces_that_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(wave_n: np.ndarray, config: LogMel, bands: int) -> np.ndarray:
        computed.append(len(wave_n))
        return fbank(wave_n, config, bands)

    monkeypatch.setattr(log_mel, "fbank", counted)
    long = Spectrum(noise(16_000 * 300), LogMel(), BANDS)
    long.slice(2, 20_000, 20_100)
    assert computed == [4095 * 160 + 400]


@settings(max_examples=60, deadline=None)
@given(rate=st.sampled_from([8000, 16_000, 22_050, 44_100]), hop=st.integers(1, 800), window=st.floats(1, 60))
def test_windows_are_counted_as_kaldi_counts_them(rate: int, hop: int, window: float) -> None:
    config = LogMel(sample_rate=rate, hop_ms=hop * 1000 / rate, window_ms=window)
    assert config.hop == hop
    config.check("log_mel", BANDS)
    for samples in (config.length, config.length + 1, config.length + hop, config.length + 5 * hop + hop // 2):
        made = fbank(noise(samples), config, BANDS)
        assert len(made) == config.frames_of(samples)
        assert config.samples_of(len(made)) <= samples < config.samples_of(len(made) + 1)
    assert config.frames_of(config.length - 1) == 0


def recordings() -> list[Sample]:
    """Of several lengths: shorter than a patch, than what is read, exactly it, longer; in the end one at another rate
    and one of two channels."""
    lengths = [400, 700, 3000, 400 + 31 * 160, 400 + 32 * 160, 400 + 32 * 160 + 1, 9000, 20_000]
    samples: list[Sample] = [
        {"__key__": f"{k:02d}", "wav": wav(noise(length, k)), "cls": k % 2} for k, length in enumerate(lengths)
    ]
    samples.append({"__key__": "90", "wav": wav(noise(9000, 90), 22_050), "cls": 0})
    samples.append({"__key__": "91", "wav": wav(noise(18_000, 91).reshape(-1, 2)), "cls": 1})
    return samples


def stored(samples: list[Sample], config: LogMel) -> list[Sample]:
    """The same samples, of each the log-mel of its whole recording as a `.npy`."""

    def log_mel_of(content: bytes) -> bytes:
        return npy(Spectrum(speech.decode(content, config.sample_rate), config, BANDS).whole())

    return [{"__key__": one["__key__"], "cls": one["cls"], "npy": log_mel_of(one["wav"])} for one in samples]


def both(folder: Path, config: LogMel) -> tuple[str, str]:
    samples = recordings()
    write_set(folder / "sound", "train", "recording", samples, per_shard=4, measure=speech.measure)
    write_set(folder / "stored", "train", "array", stored(samples, config), per_shard=4)
    return str(folder / "sound" / "train.index.json"), str(folder / "stored" / "train.index.json")


def loader_of(shards: str, stem: ArrayStem, seed: int) -> StepLoader:
    model = ModelConfig(visible_only=True, arrays={"mel": stem})
    data = DataConfig(sources=[SourceConfig(shards=shards, modality="mel", name="words")], workers=0)
    masks = MaskingConfig(kind="blocks", prob=0.6, length=2, clones=2)
    return StepLoader(data, model, masks, seed=seed, global_batch_size=4)


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.keys == theirs.keys
    assert ours.grid == theirs.grid
    for name in ("inputs", "valid", "masked_rt", "real_bt"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        assert mine is None or torch.equal(mine, other), name


@pytest.mark.parametrize(
    ("options", "log_mel_options"),
    [
        ({}, {}),
        ({"normalise": "sample"}, {}),
        ({"normalise": "moments", "mean": [-4.268], "std": [9.138]}, {}),
        ({"extent": 128, "longer": "refuse", "normalise": "channel"}, {}),
        ({"positions": "learned"}, {"sample_rate": 8000, "window": "povey", "hop_ms": 12.5, "window_ms": 20.0}),
    ],
)
def test_recordings_give_bitwise_what_their_stored_log_mel_gives(
    options: dict[str, Any], log_mel_options: dict[str, Any], tmp_path: Path
) -> None:
    """Crops, padding, masks; over epochs, seeds and a resumed one; and what is evaluated."""
    config = LogMel(**log_mel_options)
    sound, arrays = both(tmp_path, config)
    recorded = stem_of(log_mel=config, **options)
    kept = stem_of(transform="none", **options)
    crops = set()
    for seed in (1, 2):
        ours, theirs = loader_of(sound, recorded, seed), loader_of(arrays, kept, seed)
        for step in range(8):
            [mine], [other] = next(ours), next(theirs)
            assert_same(mine, other)
            assert mine.lost == 0
            if step == 4:
                state = ours.state_dict()
            crops |= {float(row[0, 0, -1]) for row, key in zip(mine.inputs, mine.keys, strict=True) if key == "07"}
        resumed = loader_of(sound, recorded, seed)
        resumed.load_state_dict(state)
        again = loader_of(arrays, kept, seed)
        for _ in range(5):
            next(again)
        for _ in range(3):
            [mine], [other] = next(resumed), next(again)
            assert_same(mine, other)
    assert (len(crops) > 1) == (recorded.axes["time"].longer == "crop")
    sets = [
        list(LabelledSet(shards, "mel", DataConfig(), ModelConfig(arrays={"mel": stem}), batch_size=3))
        for shards, stem in ((sound, recorded), (arrays, kept))
    ]
    assert sum(len(batch.keys) for batch, _ in sets[0]) == 10
    for (mine, labels), (other, their_labels) in zip(*sets, strict=True):
        assert_same(mine, other)
        assert torch.equal(labels, their_labels)


def test_time_that_a_recording_lacks_is_padding(tmp_path: Path) -> None:
    """3000 samples are 17 windows: four patches and a quarter, of eight."""
    sound, _ = both(tmp_path, LogMel())
    store = SampleStore(find_shards(SourceConfig(shards=sound)))
    decoder = ArrayDecoder(stem_of(), "model.arrays.mel")
    row = decoder.evaluation_row(store.read(0, 2))
    assert row.shape == (1, BANDS, 17)
    stacked = decoder.stack([row])
    assert stacked.grid == (4, 8)
    assert stacked.valid is not None
    assert stacked.valid.view(4, 8).tolist() == [[True] * 5 + [False] * 3] * 4
    assert not stacked.inputs[..., 17:].any()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"wav": wav(noise(399))}, "is 0.02494 s long, less than one window of 25 ms"),
        ({"wav": wav(noise(400 + 32 * 160))}, "has 33 steps along time, more than model.arrays.mel.axes.time.extent"),
        ({"flac": b"nothing"}, "is not decoded by libsndfile"),
        ({"wav": wav(np.full(1000, np.nan, np.float32))}, "holds values that are not finite"),
        ({"npy": npy(np.zeros((1, BANDS, 8)))}, "has no .flac, .wav"),
    ],
)
def test_what_is_no_spectrum_is_lost_by_name_and_counted(held: dict[str, Any], said: str, tmp_path: Path) -> None:
    samples = [{"__key__": "bad", **held}, {"__key__": "good", "wav": wav(noise(2000))}]
    write_set(tmp_path, "train", "recording", samples, per_shard=10)
    loader = loader_of(str(tmp_path / "train.index.json"), stem_of(longer="refuse"), 1)
    batches = [next(loader)[0] for _ in range(2)]
    assert sum(batch.lost for batch in batches) == 4
    assert {key for batch in batches for key in batch.keys} == {"good"}
    assert sum(loader.faults().values()) == 4
    store = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "train.index.json"))))
    with pytest.raises(SampleFault) as fault:
        ArrayDecoder(stem_of(longer="refuse"), "model.arrays.mel").evaluation_row(store.read(0, 0))
    assert said in fault.value.fault.reason
    assert fault.value.fault.key == "bad"


def test_what_an_index_could_not_read_is_lost_as_of_waveforms(tmp_path: Path) -> None:
    samples: list[Sample] = [{"__key__": "bad", "wav": b"nothing"}, {"__key__": "good", "wav": wav(noise(2000))}]
    write_set(tmp_path, "train", "recording", samples, per_shard=10, measure=speech.measure)
    loader = loader_of(str(tmp_path / "train.index.json"), stem_of(), 1)
    [batch] = next(loader)
    assert (batch.lost, set(batch.keys)) == (2, {"good"})


def test_what_shards_hold_decides_and_other_shards_are_refused(tmp_path: Path) -> None:
    sound, arrays = both(tmp_path, LogMel())
    with pytest.raises(DataError, match="the shards hold arrays, but the stem 'mel' reads recordings"):
        loader_of(arrays, stem_of(), 1)
    with pytest.raises(DataError, match="the shards hold recordings, but the stem 'mel' reads arrays"):
        loader_of(sound, stem_of(transform="none"), 1)
    [reader] = modalities.stems(ModelConfig(arrays={"speech_mel": stem_of()}))
    assert reader.content == "recording"


def test_shards_without_an_index_are_streamed_to_the_same_rows(tmp_path: Path) -> None:
    write_set(tmp_path, "train", "recording", sound_samples(6), per_shard=6)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*.index")):
        path.unlink()
    loader = loader_of(str(tmp_path / "train-000000.tar"), stem_of(), 1)
    [batch] = next(loader)
    assert batch.inputs.shape == (4, 1, BANDS, 32)


def test_sizes_of_masks_are_given_in_seconds() -> None:
    """Without a word about the rate, which `hop_ms` says."""
    [reader] = modalities.stems(ModelConfig(arrays={"mel": stem_of()}))
    band, time = reader.named_axes
    assert band.units == {}
    assert time.units == {"s": 25.0, "ms": 0.025}


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        ({"hop_ms": 10.01}, "hop_ms", r"is 10\.01 ms, which are 160\.16 samples at 16000 a second"),
        ({"hop_ms": 0.01}, "hop_ms", "which are 0.16 samples"),
        ({"window_ms": 0.1}, "window_ms", "which are 1 samples"),
        ({"window_ms": 2000.0}, "window_ms", "at most 1000 ms"),
        ({"high_hz": 8001.0}, "high_hz", r"is 8001\.0\. Give at most half of 16000"),
        ({"low_hz": 8000.0}, "low_hz", r"is 8000\.0, and the highest band ends at 8000"),
        ({"low_hz": 50.0, "high_hz": 40.0}, "low_hz", "the highest band ends at 40"),
        ({"sample_rate": 10}, "sample_rate", "is 10, which is no rate of sound"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_key(options: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        stem_of(log_mel=LogMel(**options)).check(32, "model.arrays.mel")
    assert error.value.key == f"model.arrays.mel.log_mel.{key}"


def test_arrays_that_no_recording_becomes_are_refused() -> None:
    def refused(stem: ArrayStem) -> str:
        with pytest.raises(ConfigError) as error:
            stem.check(32, "model.arrays.mel")
        return str(error.value)

    time = ArrayAxis(patch=4, extent=32)
    assert "has 1 axes (time), and log_mel makes two" in refused(ArrayStem(transform="log_mel", axes={"time": time}))
    assert "channels: is 2, but log_mel makes one" in refused(stem_of(channels=2))
    assert "key: is 'x', but recordings are no .npz" in refused(stem_of(key="x"))
    assert "log_mel: is set, but transform is 'none'" in refused(stem_of(transform="none", log_mel=LogMel(hop_ms=5)))
    axes = {"band": ArrayAxis(extent=3), "time": time}
    assert "axes: make 3 bands of a recording" in refused(ArrayStem(transform="log_mel", axes=axes))
    stem = stem_of()
    stem.axes["time"].rate = 50
    assert "axes.time.rate: is 50, but hop_ms 10 makes 100 steps of a second" in refused(stem)
    stem.axes["time"].rate = 100
    stem.check(32, "model.arrays.mel")
