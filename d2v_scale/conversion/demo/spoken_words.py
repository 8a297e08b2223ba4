"""Speech: words spoken by espeak-ng in many voices, through the `espeakng-loader` wheel (the `demo` extra)."""

import ctypes
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.errors import DataError
from d2v_scale.modalities.speech.decoder import Wave, measure
from d2v_scale.modalities.speech.resampling import resample
from d2v_scale.shards.writing import Sample, write_set

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "yes",
    "no",
    "left",
    "right",
    "stop",
    "go",
    "house",
    "water",
    "music",
    "morning",
]
TRAINING_VOICES = [
    f"en{region}+{speaker}" for region in ("", "-us") for speaker in ["m1", "m2", "m3", "m5", "m7", "f1", "f2", "f4"]
]
HELD_OUT_VOICES = ["en+m4", "en+f3", "en-us+m8", "en-us+f5"]

_PER_SHARD = 256
# (words per minute, pitch 0-100): several readings of a word by each voice.
_READINGS = ((140, 45), (165, 55), (190, 40), (150, 65))
_RETRIEVAL_SYNCHRONOUS = 2
_RATE, _PITCH = 1, 3
_UTF8 = 1


class Synthesizer:
    """espeak-ng, called through its C interface. One per process."""

    def __init__(self) -> None:
        """Raises DataError where the wheel is missing."""
        try:
            import espeakng_loader
        except ImportError as error:
            raise DataError(
                "The speech demo needs the package espeakng-loader.", "Install it with: pip install 'd2v_scale[demo]'."
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(_RETRIEVAL_SYNCHRONOUS, 0, data, 0)
        if self._rate <= 0:
            raise DataError("espeak-ng does not start.", "Install the package espeakng-loader again.")
        self._parts: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int) -> int:
        if samples and count > 0:
            self._parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> Wave:
        """`text` as mono float32 at 16 kHz."""
        self._parts.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {voice!r}.", "Install the package espeakng-loader again.")
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        content = text.encode()
        self._library.espeak_Synth(content, len(content) + 1, 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        pcm = np.frombuffer(b"".join(self._parts), dtype=np.int16)
        return resample(pcm.astype(np.float32) / np.float32(32768), self._rate)


def write(out: Path) -> None:
    """Write the shards of both splits to `out`."""
    synthesizer = Synthesizer()
    for split, voices in (("train", TRAINING_VOICES), ("test", HELD_OUT_VOICES)):
        samples = list(_spoken(synthesizer, voices))
        order = np.random.default_rng(0).permutation(len(samples))
        shuffled = [samples[k] for k in order]
        write_set(out, split, "recording", shuffled, per_shard=_PER_SHARD, measure=measure, classes=WORDS)


def _spoken(synthesizer: Synthesizer, voices: list[str]) -> Iterator[Sample]:
    for voice in voices:
        for rate, pitch in _READINGS:
            for label, word in enumerate(WORDS):
                content = io.BytesIO()
                wave = synthesizer.speak(word, voice, rate, pitch)
                soundfile.write(content, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                key = f"{word}-{voice.replace('+', '-')}-{rate}"
                yield {"__key__": key, "flac": content.getvalue(), "cls": label, "txt": word}
