"""Raw features, and the encoder trained with labels alone."""

from pathlib import Path

import pytest
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.command_line import parse
from d2v_scale.conversion.demo import digits
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.evaluation import supervised
from d2v_scale.evaluation.probes import score
from d2v_scale.evaluation.raw import hashed, raw_features
from d2v_scale.evaluation.supervised import shuffled


def test_a_bag_of_tokens_does_not_depend_on_order_or_padding() -> None:
    def batch(rows: list[list[int]]) -> Batch:
        inputs = torch.tensor(rows)
        mask = torch.zeros(inputs.shape, dtype=torch.bool)
        return Batch(
            modality="text", inputs=inputs, valid=inputs != 1, masked_rt=mask, sample_ids=torch.arange(len(rows))
        )

    model = tiny_models.model("v1_text")
    long, _ = raw_features([(batch([[0, 5, 6, 5, 1, 1]]), torch.tensor([0]))], model)
    short, _ = raw_features([(batch([[0, 6, 5, 5]]), torch.tensor([0]))], model)
    assert torch.equal(long, short)
    assert long.square()[0, [0, 1, 5, 6]].tolist() == pytest.approx([0.25, 0, 0.5, 0.25])


def test_mean_log_mel_does_not_see_what_fills_a_row_up() -> None:
    batch = tiny_models.batch("v1_speech", samples=2, padded=True)
    assert batch.valid is not None
    model = tiny_models.model("v1_speech")
    features, _ = raw_features([(batch, torch.zeros(2))], model)
    batch.inputs[~batch.valid] = 100.0
    again, _ = raw_features([(batch, torch.zeros(2))], model)
    assert features.shape == (2, 80)
    assert torch.equal(features, again)


def test_wide_features_are_hashed_to_columns_that_keep_their_products() -> None:
    """Pixels of a photograph cannot be whitened: there are 150 thousand."""
    x_bf = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0))
    x_bf[3:] += x_bf[:3]
    narrow = hashed(x_bf, 1024)
    assert narrow.shape == (6, 1024)
    assert torch.equal(narrow, hashed(x_bf, 1024))
    assert torch.allclose(narrow @ narrow.T / 20_000, x_bf @ x_bf.T / 20_000, atol=0.15)
    assert hashed(x_bf[:, :1024], 1024).equal(x_bf[:, :1024])


def test_shuffling_keeps_labels_with_their_samples_and_misses_none() -> None:
    batches = []
    for first in (0, 100):
        batch = tiny_models.batch("v2_vision", samples=5)
        batch.inputs[:] = torch.arange(first, first + 5)[:, None, None, None]
        batches.append((batch, torch.arange(first, first + 5)))
    stream = shuffled(batches, 2, seed=1)
    orders = []
    for _ in range(2):
        epoch = [next(stream) for _ in range(6)]
        for batch, labels in epoch:
            assert torch.equal(batch.inputs[:, 0, 0, 0], labels.float())
        orders.append(torch.cat([labels for _, labels in epoch]).tolist())
        assert sorted(orders[-1]) == [*range(5), *range(100, 105)]
    assert orders[0] != orders[1]


@pytest.mark.usefixtures("world_of_one")
def test_labels_alone_teach_digits_and_pixels_tell_them_apart(tmp_path: Path) -> None:
    digits.write(tmp_path)
    recipe, _ = parse(["--recipe=demo_vision", "--model.backbone.depth=1", "--objective.target.top_k_layers=1"])
    train, test = (
        LabelledSet(f"{tmp_path}/{split}.index.json", "vision", recipe.data, recipe.model, limit=limit)
        for split, limit in (("train", 600), ("test", 200))
    )
    model = supervised.train_from_scratch(recipe, train, steps=60)
    assert supervised.accuracy(model, test) > 0.4
    pixels = score(*raw_features(train, recipe.model), *raw_features(test, recipe.model))
    assert min(pixels.values()) > 0.85
