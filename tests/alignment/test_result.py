"""d2v_scale.alignment.result: what it says of the encoders that were compared."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from d2v_scale.alignment import result
from d2v_scale.alignment.models import Model
from d2v_scale.interop.encoder_source import EncoderSource
from d2v_scale.recipe import Recipe


@pytest.mark.parametrize(
    ("asked", "held", "said"),
    [
        ("teacher", ["student"], "student"),
        ("teacher", ["teacher", "student"], "student and teacher"),
        ("random", ["teacher"], "random"),
    ],
)
def test_weights_are_those_that_were_read(
    asked: str, held: list[Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher was said to be compared where a run has a student's weights alone."""
    monkeypatch.setattr(result, "_counts", lambda *_: {})
    sources = [EncoderSource(Path(one), Recipe(), {}.get, weights=one) for one in held]
    options = argparse.Namespace(weights=asked, random_seeds=0)
    made = result.result_of(options, [Model(sources)], None, {}, [], {}, [])  # type: ignore[arg-type]
    assert made["weights"] == said
    assert [one["weights"] for one in made["runs"]] == (["random"] if asked == "random" else held)
