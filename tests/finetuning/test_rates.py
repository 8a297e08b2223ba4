import pytest
import tiny_models
import torch

from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.rates import layer_share, set_task_rates, traits
from d2v_scale.optim import OptimConfig, make_optimizer, parameter_groups


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        # Three blocks: 1.0 goes on below them, but for the table that all of them share.
        ("v1_vision", {"blocks.2": 0.5, "blocks.0": 0.125, "stems.vision.context": 0.0625, "stems.vision.bias": 1.0}),
        # One block more before the main ones; patch embedding and CLS have the full rate.
        ("v2_vision", {"blocks.2": 0.5, "blocks.0": 0.125, "stems.vision.prenet.0": 0.0625, "stems.vision.context": 1}),
    ],
)
def test_layer_decay_as_published(name: str, shares: dict[str, float]) -> None:
    model = tiny_models.model(name)
    task = TaskConfig(layer_decay=0.5)
    assert {part: layer_share(f"{part}.weight", task, model) for part in shares} == shares


def test_what_is_frozen_has_rate_zero_and_is_not_decayed() -> None:
    model, task = tiny_models.model("v1_speech"), TaskConfig(kind="ctc", freeze_updates=3, layer_decay=0.5)
    names = ["stems.speech.features.convs.0.weight", "blocks.0.norm1.weight", "head.out.weight"]
    values = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in names}
    config = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(parameter_groups(values.items(), config, lambda n: traits(n, task, model)), config)
    for update, moved in ((0, [False, False, True]), (3, [False, True, True])):
        before = [value.detach().clone() for value in values.values()]
        set_task_rates(optimizer, config, update)
        for value in values.values():
            value.grad = torch.zeros_like(value)
        optimizer.step()
        assert [not torch.equal(a, b) for a, b in zip(before, values.values(), strict=True)] == moved
