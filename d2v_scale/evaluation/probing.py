"""What an encoder is worth on labelled shards: `d2v probe`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.config import LETTERS
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.labels import ClassLabels, Labels, Transcripts
from d2v_scale.errors import DataError, UserError
from d2v_scale.evaluation.features import HiddenStates, extract
from d2v_scale.evaluation.frozen import FrozenEncoder, Weights
from d2v_scale.evaluation.knn import whitened_knn
from d2v_scale.evaluation.position_probes import (
    PositionLinear,
    States,
    attentive_accuracy,
    extract_states,
    predictions,
    train_probe,
)
from d2v_scale.evaluation.probes import linear_probe, weighted_layers_probe
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.evaluation import answers, measure, outside_vocabulary
from d2v_scale.finetuning.loading import held_out_labels, labels_of
from d2v_scale.finetuning.model import outputs_of
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.finetuning.step import ctc_loss_sum
from d2v_scale.interop.encoder_source import check_tokenizer, open_encoder
from d2v_scale.interop.exporting import pick_modality, pick_sequence
from d2v_scale.recipe import Recipe
from d2v_scale.shards.class_names import agreed_classes
from d2v_scale.tracking import log_evaluation
from d2v_scale.tracking.follow import pass_on
from d2v_scale.tracking.record import METRICS_FILE

LAST_LAYERS = 4
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is measured, of what, and on what."""

    checkpoint: str
    task: str = "knn"
    """One of `knn`, `linear`, `attentive`, `ctc`, `classify`."""
    data: str | None = None
    """Labelled training shards; None: the recipe's `evaluation.train`."""
    test: str | None = None
    """Labelled held-out shards; None: the recipe's `evaluation.test`."""
    weights: Weights = "teacher"
    modality: str | None = None
    """Of the stem; None: there is one."""
    limit: int | None = None
    """At most this many samples of each set."""
    batch_size: int = 64
    k: int = 20
    """Neighbours."""
    letters: str = LETTERS
    """Characters that a new ctc head predicts."""
    beam: int | None = None
    """Width of the beam that ctc decodes with; None: the model's, or 1."""


def probe(asked: ProbeOptions) -> dict[str, object]:
    """The result: scores, and what they are of."""
    if asked.task in ("classify", "ctc"):
        task = open_encoder(asked.checkpoint).recipe.task
        if task is not None and (task.kind == "ctc") == (asked.task == "ctc"):
            return own_head(asked)
        if asked.task == "classify":
            raise UserError(
                f"{asked.checkpoint} has no classifier of its own.",
                "Use --task linear or attentive, or fine-tune it.",
            )
    encoder = FrozenEncoder.load(asked.checkpoint, asked.weights)
    of_positions = asked.task in ("attentive", "ctc")
    scores, sizes, chance = (position_scores if of_positions else pooled_scores)(encoder, asked)
    result: dict[str, object] = {
        "checkpoint": str(encoder.source),
        "step": encoder.step,
        "weights": encoder.weights,
        "task": asked.task,
        **sizes,
        "error" if asked.task == "ctc" else "accuracy": scores,
    }
    if chance is not None:
        result["chance"] = chance
    tell_mlflow(encoder.run_dir, encoder.step, encoder.weights, asked.task, scores)
    return result


Scores = tuple[dict[str, float], dict[str, int], float | None]
"""Scores by name, samples that were read or lost by set, share of the most frequent class."""


def pooled_scores(encoder: FrozenEncoder, asked: ProbeOptions) -> Scores:
    """k-NN or linear probe of mean-pooled layers."""
    sets = sets_of(encoder, asked, ClassLabels(), ClassLabels())
    train, test = (extract(finite_states(encoder), one, encoder.valid_positions, encoder.device) for one in sets)
    samples, classes = len(train.labels_n), len(train.labels_n.unique())
    if asked.task == "linear" and (samples < 10 or classes < 2):
        raise UserError(
            f"A linear probe cannot be fitted to {samples} samples of {classes} classes.",
            "It takes 10 samples and 2 classes: give --data with more, or a higher --limit.",
        )

    def score(x_nd: Tensor, y_n: Tensor, x_qd: Tensor, y_q: Tensor) -> float:
        if asked.task == "knn":
            return whitened_knn(x_nd, y_n, x_qd, y_q, asked.k)
        return linear_probe(x_nd, y_n, x_qd, y_q).accuracy

    pairs = zip(train.layers_lnd, test.layers_lnd, strict=True)
    accuracies = {f"layer {i + 1}": score(x, train.labels_n, q, test.labels_n) for i, (x, q) in enumerate(pairs)}
    last = score(train.last(LAST_LAYERS), train.labels_n, test.last(LAST_LAYERS), test.labels_n)
    accuracies[f"mean of the last {LAST_LAYERS}"] = last
    if asked.task == "linear":
        weighted = weighted_layers_probe(train.layers_lnd, train.labels_n, test.layers_lnd, test.labels_n)
        accuracies["learned combination"] = weighted.accuracy
    sizes = counts(sets, len(train.labels_n), len(test.labels_n))
    return accuracies, sizes, most_frequent(test.labels_n)


def finite_states(encoder: FrozenEncoder) -> HiddenStates:
    """The encoder's hidden states, which raise DataError, with the encoder and the samples in it, where one at a real
    position is not finite."""

    def states(batch: Batch) -> list[Tensor]:
        found = encoder.hidden_states(batch)
        if all(bool(x_btd.isfinite().all()) for x_btd in found):
            return found
        lost_bt = torch.stack([~x_btd.isfinite().all(dim=-1) for x_btd in found]).any(dim=0)
        if (valid_bt := encoder.valid_positions(batch)) is not None:
            lost_bt = lost_bt & valid_bt
        lost = [
            sample_key for sample_key, is_lost in zip(batch.keys, lost_bt.any(dim=1).tolist(), strict=True) if is_lost
        ]
        if lost:
            raise DataError(
                f"{encoder.source}: features are not finite of {len(lost)} samples in {len(batch.keys)}, the first: "
                f"{', '.join(lost[:_NAMED])}.",
                "Where it is so of all, the run has diverged: take an earlier checkpoint; else look at these samples.",
            )
        return found

    return states


def position_scores(encoder: FrozenEncoder, asked: ProbeOptions) -> Scores:
    """Attentive pooling, or a new CTC head, on the last layer."""
    task = TaskConfig(kind="ctc", ctc=CtcConfig(letters=asked.letters, beam=asked.beam or 1))
    kinds = (labels_of(task), held_out_labels(task)) if asked.task == "ctc" else (ClassLabels(), ClassLabels())
    sets = sets_of(encoder, asked, *kinds)
    train, test = (extract_states(finite_states(encoder), one, encoder.valid_positions, encoder.device) for one in sets)
    sizes = counts(sets, *(sum(len(batch.labels) for batch in batches) for batches in (train, test)))
    if asked.task == "attentive":
        accuracy = attentive_accuracy(train, test, encoder.device)
        return {"attentive pooling": accuracy}, sizes, most_frequent(torch.cat([batch.labels for batch in test]))
    width, outputs = train[0].states_btd.shape[-1], outputs_of(task)

    def loss(logits_btc: Tensor, states: States) -> Tensor:
        device = logits_btc.device
        return ctc_loss_sum(logits_btc, states.labels.to(device), states.valid_bt.sum(dim=1).to(device))

    head, _ = train_probe(lambda: PositionLinear(width, outputs), train, loss, device=encoder.device)
    found = []
    for logits_btc, states in zip(predictions(head, test, encoder.device), test, strict=True):
        found += answers(task, logits_btc, states.labels, states.valid_bt.sum(dim=1))
    return measure(task, found), sizes | outside_vocabulary(task, found), None


def own_head(asked: ProbeOptions) -> dict[str, object]:
    """What a fine-tuned model says of the held-out samples."""
    predictor = TaskPredictor.load(asked.checkpoint)
    if asked.beam is not None:
        predictor.task.ctc.beam = asked.beam
    shards = shards_of(predictor.recipe, "--test", asked)
    labels = held_out_labels(predictor.task)
    source = predictor.source
    samples = labelled(predictor.recipe, shards, asked, labels)
    check_tokenizer(source.path, source.tokenizer_sha256, shards, samples.tokenizer_sha256)
    agreed_classes([(str(source.path), source.classes or []), (shards, samples.classes)])
    found = []
    for batch, labels_b in samples:
        found += predictor.answers(batch, labels_b)
    scores = measure(predictor.task, found)
    tell_mlflow(source.run_dir, source.step, "student", asked.task, scores)
    return {
        "checkpoint": str(source.path),
        "step": source.step,
        "weights": "fine-tuned",
        "task": asked.task,
        "test_samples": len(found),
        "test_lost": len(samples) - len(found),
        **outside_vocabulary(predictor.task, found),
        "error" if asked.task == "ctc" else "accuracy": scores,
    }


def most_frequent(labels_n: Tensor) -> float:
    """What always guessing the most frequent class is worth."""
    return torch.bincount(labels_n).max().item() / len(labels_n)


def shards_of(recipe: Recipe, option: str, asked: ProbeOptions) -> str:
    """The shards of an option, or of the recipe. Raises UserError."""
    named = recipe.evaluation.of(pick_sequence(recipe, asked.modality))
    given, of_recipe = asked.test, named.test
    if option == "--data":
        given, of_recipe = asked.data, named.train
    shards: str | None = given or of_recipe
    if shards is None:
        raise UserError("The recipe names no labelled shards.", f"Give them with {option}.")
    return shards


def labelled(recipe: Recipe, shards: str, asked: ProbeOptions, labels: Labels) -> LabelledSet:
    """One labelled set, read for the recipe's model. Raises DataError where nothing of it can be read."""
    # A transcript is beside one recording: it says nothing of positions of other parts.
    pick = pick_modality if isinstance(labels, Transcripts) else pick_sequence
    modality = pick(recipe, asked.modality)
    found = LabelledSet(shards, modality, recipe.data, recipe.model, asked.batch_size, asked.limit, labels=labels)
    if next(iter(found), None) is None:
        raise found.nothing_readable()
    return found


def sets_of(encoder: FrozenEncoder, asked: ProbeOptions, learned: Labels, held_out: Labels) -> list[LabelledSet]:
    """The training and the held-out set. Raises DataError where they do not fit each other or the encoder."""
    sets = []
    for option, labels in (("--data", learned), ("--test", held_out)):
        sets.append(labelled(encoder.recipe, shards_of(encoder.recipe, option, asked), asked, labels))
        shards, checksum = sets[-1].shards, sets[-1].tokenizer_sha256
        check_tokenizer(encoder.source, encoder.tokenizer_sha256, shards, checksum)
    agreed_classes([(one.shards, one.classes) for one in sets])
    return sets


def counts(sets: list[LabelledSet], train: int, test: int) -> dict[str, int]:
    """Of the samples of both sets: how many were read, and how many were lost."""
    sizes = {"train_samples": train, "test_samples": test}
    return {**sizes, "train_lost": len(sets[0]) - train, "test_lost": len(sets[1]) - test}


def tell_mlflow(run_dir: Path | None, step: int, weights: str, task: str, scores: dict[str, float]) -> None:
    """A nested run under the training run, where that is known and its directory is still there."""
    if run_dir is not None and (run_dir / METRICS_FILE).exists():
        values = {f"probe/{name}": value for name, value in scores.items()}
        log_evaluation(run_dir, f"{task} {weights}", step, values, {"weights": weights, "task": task})
        print(pass_on(run_dir))


def print_table(result: dict[str, object]) -> None:
    """For people."""
    print(f"{result['task']} on {result['weights']} features of {result['checkpoint']}")
    trained = f"{result['train_samples']} training and " if "train_samples" in result else ""
    print(f"{trained}{result['test_samples']} held-out samples")
    lost = {name: result.get(f"{name}_lost", 0) for name in ("train", "test")}
    if any(lost.values()):
        print(f"lost: {lost['train']} training and {lost['test']} held-out samples")
    if result.get("outside_vocabulary"):
        print(f"{result['outside_vocabulary']} characters of the held-out texts are outside the vocabulary: errors")
    scores = result.get("accuracy", result.get("error"))
    assert isinstance(scores, dict)
    if "chance" in result:
        scores = {**scores, "most frequent class": result["chance"]}
    for name, value in scores.items():
        print(f"  {name:24s} {value:.3f}")
