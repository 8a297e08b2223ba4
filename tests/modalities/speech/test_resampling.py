"""d2v_scale.modalities.speech.resampling: long recordings piece by piece."""

import io
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.speech.resampling import length_at_16_khz, resample, resampled


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 8001, 7999]),
    sizes=st.lists(st.integers(1, 30000), min_size=1, max_size=6),
)
def test_pieces_are_resampled_as_the_whole(rate: int, sizes: list[int]) -> None:
    wave = np.random.default_rng(sum(sizes)).standard_normal(sum(sizes)).astype(np.float32)
    pieces = np.split(wave, np.cumsum(sizes)[:-1])
    made = np.concatenate(list(resampled(iter(pieces), rate)))
    assert len(made) == length_at_16_khz(len(wave), rate)
    np.testing.assert_allclose(made, resample(wave, rate), atol=2e-6)
    assert np.array_equal(next(resampled(iter([wave]), rate)), resample(wave, rate))


def test_a_long_recording_is_never_in_memory_at_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of stereo at 44.1 kHz took 0.6 GB for one crop."""
    monkeypatch.setattr(speech, "_BLOCK", 1 << 16)
    rate, seconds = 44100, 60
    content = io.BytesIO()
    wave = (0.1 * np.random.default_rng(0).standard_normal((rate * seconds, 2))).astype(np.float32)
    soundfile.write(content, wave, rate, format="WAV")
    expected = resample(wave.mean(axis=1), rate)
    del wave
    tracemalloc.start()
    made = speech.decode(content.getbuffer())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(made, expected, atol=2e-4)
    assert len(made) == 16000 * seconds
    # The waveform in pieces and joined, and the file that is read; at its own rate it would be 21 MB more.
    assert peak < 2 * made.nbytes + len(content.getvalue()) + (4 << 20)
