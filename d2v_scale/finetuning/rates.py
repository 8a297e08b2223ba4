"""Which parameters learn, how fast, and from which update on (spec 7.1, 7.2)."""

import difflib
import math
import re

import torch

from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.model.config import ModelConfig
from d2v_scale.optim import OptimConfig, set_rates

ALWAYS_FROZEN = ("stems.speech.features.convs", "stems.speech.features.conv_norms")


NamedParameters = list[tuple[str, torch.nn.Parameter]]


def freeze(named: NamedParameters, task: TaskConfig) -> NamedParameters:
    """Give the parameters of `task.frozen` no gradient, so that it does not count in the norm that clipping divides by.

    They stay among the trainable ones with rate 0 (`traits`): every ZeRO stage then has them in its partitions, and a
    checkpoint has all parameters. A hook makes each gradient zero before ZeRO sees it. Returns `named`. Raises
    ConfigError for a prefix that no parameter has.
    """
    for prefix in task.frozen:
        if not any(_below(name, prefix) for name, _ in named):
            near = difflib.get_close_matches(prefix, _prefixes(named), n=1, cutoff=0)
            raise ConfigError(
                "task.frozen",
                f"names {prefix!r}, but no parameter is called that or lies below it",
                f"Did you mean {near[0]!r}?",
            )
    for name, parameter in named:
        if any(_below(name, prefix) for prefix in task.frozen):
            parameter.register_hook(torch.zeros_like)
    return named


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _prefixes(named: NamedParameters) -> list[str]:
    parts = [name.split(".") for name, _ in named]
    return sorted({".".join(part[:count]) for part in parts for count in range(1, len(part) + 1)})


def traits(name: str, task: TaskConfig, model: ModelConfig, scale: float = 1.0) -> dict[str, float]:
    """Keys of a parameter's group: its share of the learning rate, and the update at which it begins to learn.
    `scale`: of its stem (`optim.stem_scale`)."""
    if any(_below(name, prefix) for prefix in (*ALWAYS_FROZEN, *task.frozen)):
        return {"share": 0.0, "begins": math.inf}
    if name.startswith("head."):
        return {"share": 1.0, "begins": 0}
    return {"share": scale * layer_share(name, task, model), "begins": task.freeze_updates}


def layer_share(name: str, task: TaskConfig, model: ModelConfig) -> float:
    """Layer decay: block i of L, counted from 1 with those before the main ones, has decay^(L + 1 - i); the stem is
    block 0 or has the full rate. The relative position table belongs to all blocks and has the full rate."""
    prenet = model.backbone.prenet_depth
    blocks = prenet + model.backbone.depth
    if found := re.match(r"stems\.\w+\.prenet\.(\d+)\.", name):
        return task.layer_decay ** (blocks - int(found.group(1)))
    if found := re.match(r"blocks\.(\d+)\.", name):
        return task.layer_decay ** (blocks - prenet - int(found.group(1)))
    decays = not model.visible_only if task.stem_decay is None else task.stem_decay
    if re.match(r"stems\.\w+\.(features|context)\.", name) and decays:
        return task.layer_decay ** (blocks + 1)
    return 1.0


def set_task_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, completed_updates: int) -> float:
    """As `optim.set_rates`; parameters that do not learn yet have rate 0, and are not decayed either."""
    for group in optimizer.param_groups:
        group["lr_scale"] = group["share"] if completed_updates >= group["begins"] else 0.0
    return set_rates(optimizer, config, completed_updates)
