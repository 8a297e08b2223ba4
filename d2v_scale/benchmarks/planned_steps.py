"""Optimizer steps of small models under any engine, for what a plan estimates: one after the other, in turns."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2v_scale.benchmarks import cases
from d2v_scale.errors import UserError
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel.config import ParallelConfig, data_parallel_size
from d2v_scale.parallel.groups import Topology
from d2v_scale.planning import legal
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Precision, Recipe

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A small model, how it is divided, and the samples of a micro-batch of each data-parallel rank."""

    recipe: str = "d2v2_text_base"
    width: int = 64
    depth: int = 2
    length: int = 16
    """Tokens of a sample; of images the edge in pixels."""
    samples: int = 1
    clones: int = 2
    vocabulary: int = 1000
    accumulation: int = 1
    stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    checkpointing: bool = False
    precision: Precision = "auto"

    @property
    def parallel(self) -> ParallelConfig:
        """How the model is divided."""
        return ParallelConfig(tensor=self.tensor, pipeline=self.pipeline)

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's JSON, like those that are shipped."""
        zero = {"stage": self.stage, "overlap_comm": self.pipeline == 1, "reduce_bucket_size": 50_000_000}
        return {"zero_optimization": {**zero, "stage3_param_persistence_threshold": 0}}

    def case(self, world_size: int) -> cases.Case:
        """The recipe, for so many ranks."""
        width = self.width
        keys = {
            "model.backbone.width": width,
            "model.backbone.heads": max(2, width // 64),
            "model.backbone.ffn": 4 * width,
            "model.backbone.depth": self.depth,
            "model.activation_checkpointing": str(self.checkpointing).lower(),
            "objective.target.top_k_layers": 1,
            "accumulation": self.accumulation,
            "batch_unit": "samples",
            "precision": self.precision,
        }
        if self.recipe.startswith("d2v2"):
            keys |= {"model.predictor.width": width, "model.backbone.prenet_depth": 0}
            keys["objective.masking.clones"] = self.clones
        if "text" in self.recipe:
            keys |= {"model.text.vocab_size": self.vocabulary, "model.text.mask_id": self.vocabulary - 1}
            keys["model.text.max_positions"] = self.length
        else:
            keys["model.vision.image_size"] = self.length
        replicas = data_parallel_size(self.parallel, world_size)
        keys["global_batch_size"] = self.samples * self.accumulation * replicas
        made = cases.case(self.recipe, self.samples, self.length, tuple(f"--{key}={keys[key]}" for key in keys))
        made.recipe.parallel = self.parallel
        return made

    def planned(self, world_size: int) -> Recipe:
        """What the planner is asked about."""
        return self.case(world_size).recipe


class Steps:
    """Engines and micro-batches of some work, on this rank."""

    def __init__(self, work: Work, topology: Topology) -> None:
        """Collective: all ranks must call."""
        made = work.case(topology.world_size)
        self._recipe = recipe = made.recipe
        auto = legal.usual_precision(topology.device.type)
        config = legal.deepspeed_config(recipe, work.deepspeed, topology.world_size, auto=auto)
        self.student, self.teacher = build_engines(recipe, config, topology)
        self.student.module.train()
        first = topology.data_parallel_rank * work.accumulation
        self._batches = [made.batch(first + k).to(topology.device) for k in range(work.accumulation)]
        self._number = 0

    def step(self) -> None:
        """One optimizer step. Collective: all ranks must call."""
        # The engines take a batch's tensors as they are; its layout is made once.
        batches = [replace(batch) for batch in self._batches]
        result, _ = train_step(
            self.student, self.teacher, batches, self._recipe.objective, Draw(1, self._number), observe=False
        )
        assert result.applied
        self._number += 1

    def close(self) -> None:
        """Give the memory back."""
        self.teacher.destroy()
        self.student.destroy()


def fastest(these: Sequence[Work], topology: Topology, rounds: int) -> list[float]:
    """Seconds of each one's fastest step, in turns after three that are not counted. Collective: all ranks must
    call, and each has its own answer."""
    sides = [Steps(work, topology) for work in these]
    best = [math.inf] * len(sides)
    for number in range(rounds + 3):  # DeepSpeed learns the order of modules in the first two
        for index, side in enumerate(sides):
            begin = time.perf_counter()
            side.step()
            wait(topology.device)
            if number >= 3:
                best[index] = min(best[index], time.perf_counter() - begin)
    for side in sides:
        side.close()
    return best


def wait(device: torch.device) -> None:
    """Until all that was issued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_ranks(world: int, module: str, *arguments: str) -> dict[str, Any]:
    """Run a module on some ranks of this machine; the JSON object that its rank 0 prints on a line of its own. Raises
    UserError where they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(
            f"{world} ranks that were to be measured ended with code {done.returncode}: {done.stderr[-2000:].strip()}",
            "Mend what they say, or take fewer ranks.",
        )
    found: dict[str, Any] = json.loads(lines[-1])
    return found
