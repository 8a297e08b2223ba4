"""What a fine-tuned model is measured by. Plots read this, too: nothing heavy is imported."""

from typing import Literal

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "wer", "cer"]

METRICS: dict[str, list[Metric]] = {
    "classify": ["accuracy", "f1", "matthews"],
    "regress": ["pearson", "spearman"],
    "ctc": ["wer", "cer"],
}
