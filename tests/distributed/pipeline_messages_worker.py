"""One of two pipeline stages: what it sends, receives and reads in a step whose micro-batches differ in shape."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import host_syncs
import pytest
import tiny_models
import topology_worker
import torch
from deepspeed.runtime.pipe import p2p
from topology_worker import clones

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step

CASES = (("v1_vision", "bf16"), ("v2_speech", "fp32"), ("v1_text", "bf16"))
MICRO_BATCHES = 4


def batches_of(name: str, step: int) -> list[Batch]:
    """Each of another number of samples."""
    padded = "vision" not in name
    return [
        tiny_models.batch(name, samples=1 + micro, clones=clones(name), padded=padded, seed=10 * step + micro)
        for micro in range(MICRO_BATCHES)
    ]


def listen() -> Counter[str]:
    """Messages between stages from now on, by direction and whether they are a tensor of the model's."""
    found: Counter[str] = Counter()

    def watched(name: str) -> Any:
        original = getattr(p2p, name)

        def call(tensor: torch.Tensor, stage: int, *args: Any, **kwargs: Any) -> Any:
            # DeepSpeed writes shapes into 256 integers.
            shapes = tensor.dtype == torch.int32 and tuple(tensor.shape) == (256,)
            found[f"{name} {'shapes' if shapes else 'values'}"] += 1
            return original(tensor, stage, *args, **kwargs)

        return call

    for name in ("send", "recv"):
        setattr(p2p, name, watched(name))
    return found


def main() -> None:
    topology = groups.initialize(groups.ParallelConfig(pipeline=2))
    messages = listen()
    for name, precision in CASES:
        recipe = topology_worker.recipe_of({"model": name, "pipeline": 2, "accumulation": MICRO_BATCHES})
        numbers = ds_config.RecipeNumbers(precision=precision, accumulation=MICRO_BATCHES, clip=1.0)  # type: ignore[arg-type]
        config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, topology.world_size)
        student, teacher = build_engines(recipe, config, topology)
        student.module.train()
        for step in range(2):
            batches = batches_of(name, step)
            messages.clear()
            with host_syncs.recorded(pytest.MonkeyPatch()) as syncs:
                syncs.ignoring = False
                result, _ = train_step(student, teacher, batches, recipe.objective, Draw(1, step), observe=False)
                syncs.ignoring = True
            assert result.applied
            assert not syncs.found, f"{name}: the host waits{syncs}"
        # States and, where blocks get a position bias, its parameter: of both networks; and the sum of taps, if any.
        modality = tiny_models.modality_of(name)
        back = 1 + modalities.of(recipe.model, modality).has_bias
        section = student.module.section
        tapped = teacher.module.taps_before(modality, section.last if section.starts else section.first)
        there = 2 * back + sum(tapped)
        sent, received = (there, back) if topology.pipeline_rank == 0 else (back, there)
        expected = {"send values": MICRO_BATCHES * sent, "recv values": MICRO_BATCHES * received}
        assert dict(messages) == expected, (name, topology.pipeline_rank, messages)
        teacher.destroy()
        student.destroy()
    print("no shapes were sent")
    groups.shutdown()


if __name__ == "__main__":
    main()
