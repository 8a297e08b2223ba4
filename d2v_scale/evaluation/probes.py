"""Linear probes: a logistic regression on frozen features, with the penalty chosen on a part of the training set."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2v_scale.evaluation.knn import knn, whitened_knn

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(kw_only=True)
class ProbeResult:
    """Outcome of a probe; accuracies in [0, 1] on the held-out set."""

    accuracy: float
    penalty: float
    """The L2 penalty that did best on the validation part of the training set."""
    layer_weights: list[float] | None = None
    """Softmax weights of the layers (weighted probe only)."""


def linear_probe(
    features_nd: Tensor,
    labels_n: Tensor,
    queries_qd: Tensor,
    labels_q: Tensor,
    penalties: tuple[float, ...] = PENALTIES,
    seed: int = 0,
) -> ProbeResult:
    """Multinomial logistic regression on standardised features.

    The penalty (sum of squared weights / 2, against the mean log-loss times N) is chosen on a held-back fifth of the
    training examples, stratified by class; the model is then refitted on all of them. The queries play no part.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = features_nd.float().cpu().numpy(), labels_n.cpu().numpy()

    def fitted(penalty: float, x: np.ndarray, y: np.ndarray) -> object:
        with warnings.catch_warnings():
            # A weak penalty may not converge in time; the held-back examples judge what it came to.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=500, tol=1e-3)).fit(x, y)

    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=_strata(y))
    scores = [(fitted(penalty, fit_x, fit_y).score(held_x, held_y), penalty) for penalty in penalties]  # type: ignore[attr-defined]
    best = max(scores)[1]
    accuracy = fitted(best, x, y).score(queries_qd.float().cpu().numpy(), labels_q.cpu().numpy())  # type: ignore[attr-defined]
    return ProbeResult(accuracy=float(accuracy), penalty=best)


def score(
    features_nd: Tensor,
    labels_n: Tensor,
    queries_qd: Tensor,
    labels_q: Tensor,
    *,
    best_of_plain_and_whitened: bool = False,
) -> dict[str, float]:
    """`knn` (k 20, of whitened features) and `linear` accuracy in [0, 1] on the queries.

    `best_of_plain_and_whitened`: for baselines, which get the better of both k-NN.
    """
    accuracy = whitened_knn(features_nd, labels_n, queries_qd, labels_q)
    if best_of_plain_and_whitened:
        accuracy = max(accuracy, knn(features_nd, labels_n, queries_qd, labels_q))
    return {"knn": accuracy, "linear": linear_probe(features_nd, labels_n, queries_qd, labels_q).accuracy}


def _strata(y: np.ndarray) -> np.ndarray | None:
    """Labels to stratify by, unless a class is too rare to be split or there are more classes than held-back rows."""
    _, counts = np.unique(y, return_counts=True)
    return y if counts.min() >= 2 and 0.2 * len(y) >= len(counts) else None


def weighted_layers_probe(
    layers_lnd: Tensor,
    labels_n: Tensor,
    layers_lqd: Tensor,
    labels_q: Tensor,
    penalties: tuple[float, ...] = PENALTIES,
    seed: int = 0,
) -> ProbeResult:
    """A linear probe on a learned convex combination of all layers (the convention of SUPERB).

    Weights and classifier are fitted together by L-BFGS on standardised layers; pooling is linear, so weighing the
    pooled layers equals weighing before the pooling. The penalty is chosen as in `linear_probe`.
    """
    mean, std = layers_lnd.mean(dim=1, keepdim=True), layers_lnd.std(dim=1, keepdim=True).clamp(min=1e-6)
    train, queries = (layers_lnd - mean) / std, (layers_lqd - mean) / std
    order = torch.randperm(train.shape[1], generator=torch.Generator().manual_seed(seed))
    held, fit = order[: len(order) // 5], order[len(order) // 5 :]
    classes = int(torch.cat([labels_n, labels_q]).max()) + 1

    def accuracy(model: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor) -> float:
        return (_weighted_logits(model, x).argmax(dim=1) == y).float().mean().item()

    scores = [
        (
            accuracy(_fit_weighted(train[:, fit], labels_n[fit], classes, penalty), train[:, held], labels_n[held]),
            penalty,
        )
        for penalty in penalties
    ]
    best = max(scores)[1]
    model = _fit_weighted(train, labels_n, classes, best)
    return ProbeResult(
        accuracy=accuracy(model, queries, labels_q), penalty=best, layer_weights=model[0].softmax(dim=0).tolist()
    )


def _weighted_logits(model: tuple[Tensor, Tensor, Tensor], layers_lnd: Tensor) -> Tensor:
    mixing_l, weight_dc, bias_c = model
    return torch.einsum("l,lnd->nd", mixing_l.softmax(dim=0), layers_lnd) @ weight_dc + bias_c


def _fit_weighted(layers_lnd: Tensor, labels_n: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    layers, count, width = layers_lnd.shape
    model = (torch.zeros(layers), torch.zeros(width, classes), torch.zeros(classes))
    for parameter in model:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(model, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(_weighted_logits(model, layers_lnd), labels_n)
        loss = loss + penalty / (2 * count) * model[1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return (model[0].detach(), model[1].detach(), model[2].detach())
