"""Heads, and what is hidden or frozen while they learn."""

import pytest
import tiny_models
import torch

from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.step import ctc_loss_sum
from d2v_scale.modalities.speech.stem import masked_channels
from d2v_scale.model.init import initialize
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.networks.draw import Draw


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def made(name: str, task: TaskConfig) -> TaskModel:
    model = TaskModel(tiny_models.model(name), task)
    initialize(model, 1)
    return model


def ctc(**options: float) -> TaskConfig:
    return TaskConfig(kind="ctc", ctc=CtcConfig(**{"letters": "ab", "channel_mask": 0.0, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_every_modality_has_a_classifier(name: str) -> None:
    model = made(name, TaskConfig(classes=5)).eval()
    logits = model(tiny_models.batch(name, padded=True), Draw(0, 0))
    assert logits.shape == (3, 5)
    assert not any(n.startswith(("predictors", "final_norm")) for n, _ in model.named_parameters())


def test_the_encoder_is_in_the_mode_of_its_model_and_its_parameters_bear_the_names_of_pretraining() -> None:
    model = made("v1_text", TaskConfig(classes=3))
    assert model.train().encoder.training
    assert not model.eval().encoder.training
    below_head = {name: id(p) for name, p in model.named_parameters() if not name.startswith("head.")}
    assert below_head == {name: id(p) for name, p in model.encoder.named_parameters()}


def test_what_lies_in_the_padding_does_not_change_what_a_recording_is_classified_as() -> None:
    model = made("v1_speech", TaskConfig(classes=5)).eval()
    batch = tiny_models.batch("v1_speech", padded=True)
    silent = model(batch, Draw(0, 0))
    assert batch.valid is not None
    batch.inputs = torch.where(batch.valid, batch.inputs, 3.0)
    assert torch.allclose(model(batch, Draw(0, 0)), silent, atol=1e-6)


@pytest.mark.parametrize("name", tiny_models.ARRAYS)
def test_what_lies_in_the_padding_does_not_change_what_an_array_is_classified_as(name: str) -> None:
    """The head's mean was over padding and patches that miss a value, too."""
    model = made(name, TaskConfig(classes=5)).eval()
    batch = tiny_models.batch(name, padded=True)
    [stem] = model.encoder.config.stems.values()
    assert isinstance(stem, ArrayStem)
    assert batch.valid is not None
    real = batch.valid.view(-1, *stem.grid)
    for axis, steps in enumerate(stem.patch):
        real = real.repeat_interleave(steps, dim=1 + axis)
    silent = model(batch, Draw(0, 0))
    batch.inputs = torch.where(real[:, None], batch.inputs, 3.0)
    assert torch.allclose(model(batch, Draw(0, 0)), silent, atol=1e-6)


@pytest.mark.parametrize("name", ["v1_speech", "v2_speech"])
def test_frames_are_masked_in_training_only_and_none_is_removed(name: str) -> None:
    model = made(name, ctc())
    batch = tiny_models.batch(name)
    shown = tiny_models.batch(name)
    shown.masked_rt = torch.zeros_like(shown.masked_rt)
    hidden, seen = model.train()(batch, Draw(0, 0)), model.train()(shown, Draw(0, 0))
    assert hidden.shape == (3, 19, 7)
    assert not torch.allclose(hidden, seen, atol=1e-4)
    assert torch.equal(model.eval()(batch, Draw(0, 0)), model.eval()(shown, Draw(0, 0)))


def test_convolutions_get_no_gradient_and_a_frozen_encoder_gets_none_at_all() -> None:
    model = made("v1_speech", ctc()).train()
    batch = tiny_models.batch("v1_speech")
    model(batch, Draw(0, 0)).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("stems.speech.features.conv") for name in with_gradient)
    assert "stems.speech.features.proj.weight" in with_gradient
    assert "blocks.0.attention.qkv.weight" in with_gradient
    model.zero_grad(set_to_none=True)
    model(batch, Draw(0, 0), learns=False).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.out.weight", "head.out.bias"}


@pytest.mark.parametrize(("name", "std"), [("v1_vision", 2e-5), ("v2_vision", 0.02)])
def test_only_the_image_head_of_1_0_starts_near_zero(name: str, std: float) -> None:
    """Spec 7.2; the reference's mae_image_classification draws with 0.02 and does not scale it."""
    weight = made(name, TaskConfig(classes=200)).head.out.weight
    assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_channels_are_hidden_in_spans() -> None:
    torch.manual_seed(0)
    hidden_rd = masked_channels(400, 256, 0.25, 16, torch.device("cpu"))
    # Four spans a row, less what overlaps.
    share = hidden_rd.float().mean().item()
    assert 0.19 < share < 0.25
    edges = (hidden_rd[:, 1:] != hidden_rd[:, :-1]).sum(dim=1)
    assert int(edges.max()) <= 8
    assert not masked_channels(3, 256, 0.01, 64, torch.device("cpu")).all()


def test_a_transcript_that_does_not_fit_its_frames_adds_nothing() -> None:
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    characters = torch.tensor([[4, 5, -1, -1, -1], [5, 5, 5, 5, 5], [-1, -1, -1, -1, -1]])
    loss = ctc_loss_sum(logits, characters, torch.tensor([4, 4, 4]))
    expected = torch.nn.functional.ctc_loss(logits[0].log_softmax(-1), characters[0, :2], [4], [2], reduction="sum")
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[1:].any()
