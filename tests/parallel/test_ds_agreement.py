"""What a DeepSpeed JSON repeats of the recipe must be what the recipe says; both values are named."""

from typing import Any

import pytest

from d2v_scale.errors import ConfigError
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel import ds_config
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.parallel.ds_config import RecipeNumbers

COSINE = OptimConfig(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, warmup_steps=10, max_steps=100, clip=1.0)
POLYNOMIAL = OptimConfig(lr=1e-3, schedule="polynomial", warmup_steps=10, max_steps=100)


def resolve(raw: dict[str, Any], optim: OptimConfig = COSINE, **parallel: int) -> dict[str, Any]:
    numbers = RecipeNumbers(precision="fp32", clip=optim.clip, optim=optim)
    whole = {"zero_optimization": {"stage": 1}, **raw}
    return ds_config.resolve(whole, numbers, ParallelConfig(**parallel), 2)


AGREEING: list[tuple[dict[str, Any], OptimConfig]] = [
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.98], "eps": 1e-6}}}, COSINE),
    (
        {"optimizer": {"type": "adamw", "params": {"weight_decay": 0.05, "torch_adam": True, "max_grad_norm": 1}}},
        COSINE,
    ),
    ({"optimizer": {"type": "Adam", "params": {"lr": "auto", "adam_w_mode": True, "bias_correction": True}}}, COSINE),
    ({"optimizer": {"type": "auto", "params": {}}}, COSINE),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}, COSINE),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}}}, COSINE),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-3, "warmup_min_lr": 0}}}, POLYNOMIAL),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}}}, POLYNOMIAL),
]


@pytest.mark.parametrize(("raw", "optim"), AGREEING, ids=str)
def test_a_section_that_says_what_the_recipe_says_is_accepted_and_left_out(
    raw: dict[str, Any], optim: OptimConfig
) -> None:
    assert not {"optimizer", "scheduler"} & resolve(raw, optim).keys()


@pytest.mark.parametrize(
    ("raw", "key", "both"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", ("'Lamb'", "'AdamW'")),
        ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr", ("0.0003", "0.001")),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", ("0.999", "0.98")),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "optimizer.params.betas", ("[0.9]", "0.98")),
        ({"optimizer": {"params": {"eps": 1e-8}}}, "optimizer.params.eps", ("1e-08", "1e-06")),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "optimizer.params.weight_decay", ("0", "0.05")),
        ({"optimizer": {"params": {"max_grad_norm": 0.5}}}, "optimizer.params.max_grad_norm", ("0.5", "1.0")),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode", ("False", "True")),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad", ("True", "False")),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001}}},
            "scheduler.type",
            ("'WarmupLR'", "'WarmupCosineLR'"),
        ),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", ("'OneCycle'", "'WarmupCosineLR'")),
        ({"scheduler": {"params": {"warmup_max_lr": 0.01}}}, "scheduler.params.warmup_max_lr", ("0.01", "0.001")),
        ({"scheduler": {"params": {"warmup_num_steps": 500}}}, "scheduler.params.warmup_num_steps", ("500", "10")),
        ({"scheduler": {"params": {"total_num_steps": 99}}}, "scheduler.params.total_num_steps", ("99", "100")),
        ({"scheduler": {"params": {"warmup_min_lr": 1e-5}}}, "scheduler.params.warmup_min_lr", ("1e-05", "0.0")),
        ({"scheduler": {"params": {"warmup_type": "log"}}}, "scheduler.params.warmup_type", ("'log'", "'linear'")),
        ({"pipeline": {"stages": 4}}, "pipeline.stages", ("4", "1")),
    ],
)
def test_a_section_that_says_something_else_is_refused_with_both(
    raw: dict[str, Any], key: str, both: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    assert caught.value.key == key
    assert all(value in str(caught.value) for value in both), str(caught.value)


def test_a_template_of_another_schedule_is_told() -> None:
    raw = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    (line,) = ds_config.remarks(raw, COSINE)
    assert line == "The DeepSpeed JSON leaves its WarmupLR to `auto`: optim.schedule is used, cosine"
    assert ds_config.remarks({"scheduler": {"type": "WarmupDecayLR"}}, POLYNOMIAL) == []


def test_what_does_nothing_here_is_told() -> None:
    raw = {
        "aio": {"block_size": 1048576, "single_submit": False},
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "steps_per_print": 10,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    }
    (line,) = ds_config.remarks(raw, COSINE)
    assert "aio.block_size (it is of NVMe offload, which is refused)" in line
    assert "activation_checkpointing.partition_activations, activation_checkpointing.cpu_checkpointing (model." in line
    assert "single_submit" not in line
    assert "fp16" not in line
    assert ds_config.remarks({"zero_optimization": {"stage": 3}}, COSINE) == []
