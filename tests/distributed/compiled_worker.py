"""One rank of the comparison of compiled with eager blocks: compiled_worker.py OUT.json

Two steps of small models at ZeRO-1 and ZeRO-3, with and without activation checkpointing. Rank 0 writes for every case
the losses and the largest relative difference of a gradient from that of the eager ZeRO-1 run.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.modalities import published_parts
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe

MODELS = ("v1_vision", "v2_speech")
CASES = [  # ZeRO stage, compiled, activation checkpointing; the first is what the others are compared with
    (1, False, False),
    (1, True, False),
    (3, False, False),
    (3, True, False),
    (3, True, True),
    (1, True, True),
]


def run(
    name: str, stage: int, compiled: bool, checkpointing: bool
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Gradients and losses of two steps."""
    topology = groups.initialize()
    model = tiny_models.model(name, drop_path=0.2)
    model.compile, model.activation_checkpointing = compiled, checkpointing
    objective = ObjectiveConfig(target=tiny_models.target_of(name))
    recipe = Recipe(model=model, objective=objective, optim=OptimConfig(lr=1e-3, eps=1e-4))
    recipe.teacher_parts = published_parts(model)
    numbers = ds_config.RecipeNumbers(precision="fp32", compile=compiled)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "memory_efficient_linear": False}
    config = ds_config.resolve({"zero_optimization": zero}, numbers, recipe.parallel, topology.world_size)
    student, teacher = build_engines(recipe, config, topology)
    student.module.train()
    gradients: list[dict[str, torch.Tensor]] = []

    def keep() -> None:
        found = {key: safe_get_full_grad(p) for key, p in student.module.named_parameters()}
        gradients.append({key: value.clone() for key, value in found.items() if value is not None})

    student.before_step.append(keep)
    losses = []
    for step in range(2):
        clones = 2 if name.startswith("v2") else 1
        batch = tiny_models.batch(name, 2, clones, not name.endswith("vision"), 10 * step + topology.rank)
        _, seen = train_step(student, teacher, [batch], objective, Draw(1, step), observe=False)
        topology.sum_over_replicas(seen.loss)
        losses.append(float(seen.loss))
    teacher.destroy()
    student.destroy()
    return gradients, losses


def difference(ours: list[dict[str, torch.Tensor]], reference: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference of a tensor's elements, in parts of the largest gradient of the step."""
    worst = 0.0
    for step, other in zip(ours, reference, strict=True):
        assert step.keys() == other.keys()
        largest = max(float(value.abs().max()) for value in other.values())
        worst = max(worst, *(float((step[key] - other[key]).abs().max()) / largest for key in other))
    return worst


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        reference, expected = run(name, *CASES[0])
        for case in CASES[1:]:
            gradients, losses = run(name, *case)
            found = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
            compiled_frames = torch._dynamo.utils.counters["frames"]["ok"] if case[1] else 0
            rows.append(
                {
                    "model": name,
                    "case": case,
                    "gradient": difference(gradients, reference),
                    "loss": found,
                    "compiled": compiled_frames,
                    "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()) if case[1] else 0,
                    "why": list(torch._dynamo.utils.counters["graph_break"])[:5] if case[1] else [],
                }
            )
            print(rows[-1], flush=True)
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))
    groups.shutdown()


if __name__ == "__main__":
    main()
