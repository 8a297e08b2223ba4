import numpy as np
import pytest

from d2v_scale.finetuning import metrics


def test_classes() -> None:
    guessed, labels = np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1])
    found = metrics.of_classes(guessed, labels, ["accuracy", "f1", "matthews"])
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews": 2 / np.sqrt(12)})


def test_scores_follow_the_order_and_a_constant_guess_is_worth_nothing() -> None:
    scores = np.array([0.0, 1.0, 2.0, 5.0])
    found = metrics.of_scores(np.exp(scores), scores, ["pearson", "spearman"])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 1
    assert metrics.of_scores(np.ones(4), scores, ["pearson"]) == {"pearson": 0.0}


def test_errors_are_divided_by_all_words_and_not_averaged_over_samples() -> None:
    texts, guessed = ["a b c d", "x", ""], ["a b c d", "y", "noise"]
    found = metrics.of_texts(guessed, texts, ["wer", "cer"])
    assert found == pytest.approx({"wer": 1 / 5, "cer": 1 / 8})
