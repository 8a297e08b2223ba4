"""The page of an alignment in numbers."""

from d2v_scale.alignment.table import lines
from d2v_scale.plots.alignment import _controls, _verdicts

AGAINST = {"score": 0.038, "control": -0.0002, "difference": -0.0001, "lower_bound": -0.0004, "above": False}
VERDICT = {"score": -0.0003, "verdict": "not above controls", "layer": [1], "not_above": ["shuffled pairs"]}
PAIR = {
    "held_out_concepts": 60,
    "training_concepts": 100,
    "notes": [],
    "chance": {"CKA": 0.0},
    "verdicts": {"CKA": VERDICT | {"against": {"shuffled pairs": AGAINST}}},
}


def test_nothing_is_minus_nothing() -> None:
    """Debiased CKA about zero was -0.000."""
    result = {"pairs": {"vision - text": PAIR}, "rule": "above", "seeds": 1, "random_encoders": 2, "refused": []}
    empty = {"one_set_split": False, "left_out": {}, "on_both_sides": {}, "samples": {}, "lost": []}
    result |= {"data": empty | {"concepts": {"held_out": 60, "train": 100}}}
    shown = [_controls(PAIR), _verdicts(result), "\n".join(lines(result))]
    assert "<td>0.038</td><td>0.000</td><td>+0.000</td>" in shown[0]
    assert not any("-0.000" in text for text in shown)
