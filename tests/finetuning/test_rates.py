import pytest
import tiny_models
import torch

from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.rates import freeze, layer_share, set_task_rates, traits
from d2v_scale.finetuning.step import task_step
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import OptimConfig, make_optimizer, parameter_groups
from d2v_scale.parallel import ds_config, groups, zero
from d2v_scale.spikes import SpikeConfig


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


def test_a_prefix_that_freezes_nothing_is_refused() -> None:
    named = [("stems.speech.bias.scales", torch.nn.Parameter(torch.ones(1)))]
    assert freeze(named, TaskConfig(frozen=["stems.speech.bias"])) == named
    for prefix in ("stems.speech.bia", "stem.speech.bias"):
        with pytest.raises(ConfigError, match=rf"task\.frozen: names '{prefix}'.*mean 'stems\.speech\.bias'"):
            freeze(named, TaskConfig(frozen=[prefix]))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_frozen_does_not_count_in_the_gradient_norm(stage: int) -> None:
    """Against the norm of the others' gradients, as autograd has them."""
    topology, model, task = groups.single_process(), tiny_models.model("v1_text"), TaskConfig(classes=3)
    batch = tiny_models.batch("v1_text")
    batch.keys, batch.labels = ("a", "b", "c"), torch.tensor([0, 1, 2])
    batch.masked_rt.zero_()
    optim = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5)

    def step(frozen: list[str], stage: int) -> tuple[float, torch.nn.Module]:
        task.frozen = frozen
        numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=1, clip=0.01, global_batch_size=3)
        raw = {"zero_optimization": {"stage": stage}}
        config = ds_config.resolve(raw, numbers, groups.ParallelConfig(), 1)
        engine = zero.build_student(
            lambda: TaskModel(model, task),
            config,
            lambda named: make_optimizer(
                parameter_groups(freeze(named, task), optim, lambda name: traits(name, task, model)), optim
            ),
            topology,
            lambda module: initialize(module, 1),
        )
        before = {shard.name: shard.weight.clone() for shard in engine.shards()}
        set_task_rates(engine.optimizer, optim, 0)
        engine.watch_spikes(SpikeConfig(on_spike="skip"))
        result, seen = task_step(engine, [batch], task, Draw(1, 0))
        assert engine.spikes is not None
        assert engine.spikes.rule.state_dict()[""]["loss"] == [float(seen.loss)]
        moved = {shard.name for shard in engine.shards() if not torch.equal(shard.weight, before[shard.name])}
        assert not {name for name in moved if any(name.startswith(prefix) for prefix in frozen)}
        assert "head.out.weight" in moved
        return result.grad_norm, engine.module

    frozen = ["blocks.0", "blocks.1", "stems"]
    plain = TaskModel(model, task)
    initialize(plain, 1)
    logits_bc = plain(batch, Draw(1, 0))
    torch.nn.functional.cross_entropy(logits_bc, batch.labels).backward()
    norms = [
        sum(float(p.grad.square().sum()) for n, p in plain.named_parameters() if p.grad is not None and which(n)) ** 0.5
        for which in (lambda n: not n.startswith(tuple(frozen)), lambda n: True)
    ]
    assert norms[0] < 0.9 * norms[1]
    assert step(frozen, stage)[0] == pytest.approx(norms[0], rel=1e-4)
    assert step([], stage)[0] == pytest.approx(norms[1], rel=1e-4)
