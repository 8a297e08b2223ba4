"""Whether a score is above its controls: differences concept by concept, with bounds over concepts and seeds."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Of all lower bounds of a report together."""
_RESAMPLES = 1000

ABOVE, NOT_ABOVE = "above controls", "not above controls"


@dataclass(frozen=True)
class Difference:
    """By how much the runs' score is above a control's."""

    score: float
    control: float
    difference: float
    lower_bound: float
    """One-sided, of the confidence that was asked for."""

    @property
    def above(self) -> bool:
        """Whether it is more than could be chance."""
        return self.lower_bound > 0


def compared(runs_sn: Tensor, control_rn: Tensor, comparisons: int) -> Difference:
    """The difference of two scores with its lower bound, one of so many `comparisons` (Bonferroni).

    `runs_sn`: the values of N concepts for each of S runs, which differ by their seed; `control_rn`: likewise for R
    repeats of the control (1: it has none). The variance of the difference of means is that over concepts (bootstrap of
    the concepts' own differences), plus that over runs / S, plus that over the control's repeats / R. One run says
    nothing of other seeds: the control's repeats, where it has some, stand for them. Degrees of freedom as of
    Satterthwaite.
    """
    runs, control = runs_sn.double(), control_rn.double()
    difference = float(runs.mean() - control.mean())
    terms = [(_bootstrap_variance(runs.mean(dim=0) - control.mean(dim=0)), runs.shape[1] - 1)]
    spread = _variance(control.mean(dim=1))
    if len(runs) > 1:
        terms.append((_variance(runs.mean(dim=1)) / len(runs), len(runs) - 1))
        terms.append((spread / len(control), len(control) - 1))
    else:
        terms.append((spread * (1 + 1 / len(control)), len(control) - 1))
    variance = sum(term for term, _ in terms)
    bound = difference
    if variance > 0:
        freedom = variance**2 / sum(term**2 / count for term, count in terms if term > 0)
        bound -= quantile(comparisons, freedom) * math.sqrt(variance)
    return Difference(float(runs.mean()), float(control.mean()), difference, bound)


def quantile(comparisons: int, freedom: float) -> float:
    """Of Student's t, one-sided, for one of so many comparisons."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return -float(stdtrit(freedom, (1 - CONFIDENCE) / comparisons))


def _variance(scores: Tensor) -> float:
    return float(scores.var(unbiased=True)) if len(scores) > 1 else 0.0


def _bootstrap_variance(difference_n: Tensor) -> float:
    """Of the mean, over concepts drawn with replacement, the same ones at every call."""
    n = len(difference_n)
    return float((_drawn(n) @ difference_n).var(unbiased=True)) * n / (n - 1)


@lru_cache(maxsize=4)
def _drawn(n: int) -> Tensor:
    """float64 (resamples, N): the share of each concept in a resample."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    return torch.from_numpy(counts / n)
