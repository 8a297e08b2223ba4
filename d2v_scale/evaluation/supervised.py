"""The same encoder trained with labels from scratch: what the labels alone can teach it."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data2vec import stateless
from d2v_scale.model.init import initialize
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.optim import make_optimizer, parameter_groups, set_rates
from d2v_scale.recipe import Recipe

BATCH_SIZE = 32
"""Samples of an update."""


class Classifier(nn.Module):
    """The recipe's encoder, the mean over positions of its last block, a linear layer."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        self.encoder = Student(recipe.model)
        self.head = nn.Linear(recipe.model.backbone.width, classes)
        self._draw = Draw(recipe.seed, 0)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, classes) of a batch in which nothing is masked."""
        states_btd = self.encoder(batch, self._draw).encoder_rsd
        return self.head(mean_over_positions(states_btd, self.encoder.valid_positions(batch)))


def train_from_scratch(recipe: Recipe, train: LabelledSet, steps: int, batch_size: int = BATCH_SIZE) -> Classifier:
    """`steps` updates of cross-entropy with the recipe's optimizer, on the samples as evaluation sees them.

    In one process (`groups.single_process()` must have been called). The order of samples depends on the recipe's seed.
    """
    samples = list(train)
    classes = max(len(train.classes), 1 + max(int(labels_b.max()) for _, labels_b in samples))
    model = Classifier(recipe, classes)
    initialize(model, recipe.seed)
    optim = recipe.optim
    optimizer = make_optimizer(parameter_groups(model.named_parameters(), optim), optim)
    model.train()
    for step, (batch, labels_b) in zip(range(steps), shuffled(samples, batch_size, recipe.seed), strict=False):
        # The recipe's schedule, stretched to these steps.
        set_rates(optimizer, optim, step * optim.max_steps // steps)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels_b).backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip or float("inf"))
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, test: LabelledSet) -> float:
    """Share of samples in [0, 1] whose class gets the largest logit."""
    right = [model(batch).argmax(dim=1) == labels_b for batch, labels_b in test]
    return torch.cat(right).float().mean().item()


def shuffled(batches: list[tuple[Batch, Tensor]], batch_size: int, seed: int) -> Iterator[tuple[Batch, Tensor]]:
    """The samples of `batches` in new batches without end, in another order every epoch.

    Rows of one new batch come from one old batch, since only those are padded to one length.
    """
    for epoch in itertools.count():
        random = stateless.numpy_generator(seed, "supervised", epoch)
        parts = []
        for number, (batch, _) in enumerate(batches):
            order = torch.from_numpy(random.permutation(len(batch.inputs)))
            parts += [(number, rows) for rows in order.split(batch_size)]
        for k in random.permutation(len(parts)):
            number, rows = parts[k]
            batch, labels_b = batches[number]
            chosen = Batch(
                modality=batch.modality,
                inputs=batch.inputs[rows],
                valid=None if batch.valid is None else batch.valid[rows],
                masked_rt=batch.masked_rt[rows],
                sample_ids=batch.sample_ids[rows],
                grid=batch.grid,
                extra_tokens=batch.extra_tokens,
            )
            yield chosen, labels_b[rows]
