"""Measure what a checkpoint's frozen features are worth on labelled shards.

  python tools/probe.py runs/vit --data 'train/*.tar' --test 'test/*.tar' --task linear

knn: 20 nearest neighbours by cosine, of whitened features. linear: logistic regression, penalty chosen on a
fifth of the training samples. Both for every layer and for the mean of the last four; linear also for a learned
combination of all layers.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import UserError
from d2v_scale.evaluation import Features, extract, knn, linear_probe, weighted_layers_probe, whitened
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.tracking import log_evaluation
from d2v_scale.tracking.record import METRICS_FILE

LAST_LAYERS = 4
Score = Callable[[Tensor, Tensor, Tensor, Tensor], float]


def main() -> int:
    """Parse arguments, extract features, fit, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a run directory (its newest checkpoint)")
    parser.add_argument("--data", help="labelled training shards; default: the recipe's evaluation.train")
    parser.add_argument("--test", help="labelled held-out shards; default: the recipe's evaluation.test")
    parser.add_argument("--task", choices=["knn", "linear"], default="knn")
    parser.add_argument("--weights", choices=["teacher", "student", "random"], default="teacher")
    parser.add_argument("--limit", type=int, help="at most this many samples of each set")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--k", type=int, default=20, help="neighbours (knn)")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    try:
        result = probe(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(result)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def probe(arguments: argparse.Namespace) -> dict[str, object]:
    """The result: accuracies by layer, and what they are of."""
    encoder = FrozenEncoder.load(arguments.checkpoint, arguments.weights)
    train = features_of(encoder, arguments.data or encoder.recipe.evaluation.train, "--data", arguments)
    test = features_of(encoder, arguments.test or encoder.recipe.evaluation.test, "--test", arguments)

    def score(x_nd: Tensor, y_n: Tensor, x_qd: Tensor, y_q: Tensor) -> float:
        if arguments.task == "knn":
            x_nd, x_qd = whitened(x_nd, x_qd)
            return knn(x_nd, y_n, x_qd, y_q, arguments.k)
        return linear_probe(x_nd, y_n, x_qd, y_q).accuracy

    pairs = zip(train.layers_lnd, test.layers_lnd, strict=True)
    accuracies = {f"layer {i + 1}": score(x, train.labels_n, q, test.labels_n) for i, (x, q) in enumerate(pairs)}
    last = score(train.last(LAST_LAYERS), train.labels_n, test.last(LAST_LAYERS), test.labels_n)
    accuracies[f"mean of the last {LAST_LAYERS}"] = last
    if arguments.task == "linear":
        weighted = weighted_layers_probe(train.layers_lnd, train.labels_n, test.layers_lnd, test.labels_n)
        accuracies["learned combination"] = weighted.accuracy
    result: dict[str, object] = {
        "checkpoint": str(encoder.source),
        "step": encoder.step,
        "weights": encoder.weights,
        "task": arguments.task,
        "train_samples": len(train.labels_n),
        "test_samples": len(test.labels_n),
        "chance": torch.bincount(test.labels_n).max().item() / len(test.labels_n),
        "accuracy": accuracies,
    }
    tell_mlflow(encoder, arguments.task, accuracies)
    return result


def features_of(encoder: FrozenEncoder, shards: str | None, option: str, arguments: argparse.Namespace) -> Features:
    """Features of one labelled set."""
    if shards is None:
        raise UserError("The recipe names no labelled shards.", f"Give them with {option}.")
    modality = encoder.recipe.model.modalities[0]
    recipe = encoder.recipe
    labelled = LabelledSet(shards, modality, recipe.data, recipe.model, arguments.batch_size, arguments.limit)
    return extract(encoder.hidden_states, labelled, encoder.valid_positions, encoder.device)


def tell_mlflow(encoder: FrozenEncoder, task: str, accuracies: dict[str, float]) -> None:
    """A nested run under the training run, if the checkpoint lies in a run directory."""
    run_dir = encoder.source.parent.parent
    if (run_dir / METRICS_FILE).exists():
        values = {f"probe/{name}": value for name, value in accuracies.items()}
        log_evaluation(
            run_dir, f"{task} {encoder.weights}", encoder.step, values, {"weights": encoder.weights, "task": task}
        )
        print(f"Recorded in {run_dir}; tools/sync_mlflow.py sends it if the run is over.")


def print_table(result: dict[str, object]) -> None:
    """For people."""
    print(f"{result['task']} on {result['weights']} features of {result['checkpoint']}")
    print(f"{result['train_samples']} training and {result['test_samples']} held-out samples")
    assert isinstance(result["accuracy"], dict)
    for name, value in {**result["accuracy"], "most frequent class": result["chance"]}.items():
        print(f"  {name:24s} {value:.3f}")


if __name__ == "__main__":
    sys.exit(main())
