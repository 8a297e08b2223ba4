"""What a fine-tuned model is worth on held-out samples."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from d2v_scale.finetuning.metric_names import Metric

Numbers = NDArray[np.generic]


def of_classes(guessed_n: Numbers, labels_n: Numbers, metrics: Iterable[Metric]) -> dict[str, float]:
    """accuracy, f1 (two classes: of class 1; more: the mean over classes), matthews."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "accuracy":
            found[metric] = float((guessed_n == labels_n).mean())
        elif metric == "f1":
            two = int(max(guessed_n.max(), labels_n.max())) <= 1
            found[metric] = float(f1_score(labels_n, guessed_n, average="binary" if two else "macro"))
        elif metric == "matthews":
            found[metric] = float(matthews_corrcoef(labels_n, guessed_n))
    return found


def of_scores(guessed_n: Numbers, scores_n: Numbers, metrics: Iterable[Metric]) -> dict[str, float]:
    """pearson, spearman; 0 where nothing varies."""
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]

    if np.ptp(guessed_n) == 0 or np.ptp(scores_n) == 0:
        return dict.fromkeys(metrics, 0.0)
    kinds = {"pearson": pearsonr, "spearman": spearmanr}
    return {metric: float(kinds[metric](guessed_n, scores_n)[0]) for metric in metrics}


def of_texts(guessed: list[str], texts: list[str], metrics: Iterable[Metric]) -> dict[str, float]:
    """wer, cer: errors divided by the words or characters of `texts`; samples without any are left out."""
    import jiwer

    pairs = [(text, guess) for text, guess in zip(texts, guessed, strict=True) if text]
    if not pairs:
        return dict.fromkeys(metrics, float("nan"))
    spoken, heard = [text for text, _ in pairs], [guess for _, guess in pairs]
    kinds = {"wer": jiwer.wer, "cer": jiwer.cer}
    return {metric: float(kinds[metric](spoken, heard)) for metric in metrics}
