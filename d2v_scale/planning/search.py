"""All ways to run a recipe on a cluster: which are legal, which fit, and which is estimated to be the fastest."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d2v_scale.errors import ConfigError
from d2v_scale.parallel import ds_config
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.planning import memory
from d2v_scale.planning.costs import Costs
from d2v_scale.planning.hardware import Hardware
from d2v_scale.planning.job import Job, ModelSizes, source_samples
from d2v_scale.planning.step_time import StepTime, step_time
from d2v_scale.recipe import Recipe

PIPELINE_JSON = "pipeline.json"
NEARLY = 0.1
"""Steps that are estimated to differ by less than this share are not told apart."""
_PLACEMENTS: tuple[Literal["device", "cpu"], ...] = ("device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices, and what is assumed of them."""

    nodes: int
    devices_per_node: int
    device: Hardware
    costs: Costs
    """What the parts of a step take there."""

    @property
    def world_size(self) -> int:
        """All devices."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Option:
    """A legal way to run the recipe."""

    deepspeed_config: str
    """Name of the DeepSpeed JSON."""
    job: Job
    budget: memory.Budget
    times: dict[str, StepTime]
    """By kind of step (`Job.steps`)."""
    missing_device: float
    """Bytes by which a device is too small; 0 where it fits."""
    missing_host: float

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.missing_device == 0 and self.missing_host == 0

    @property
    def seconds(self) -> float:
        """Estimated time of a step, the mean over its kinds."""
        return sum(time.total for time in self.times.values()) / len(self.times)


@dataclass(frozen=True)
class Search:
    """What was found: options that fit, fastest first; those that do not, nearest first; and what is refused."""

    fitting: list[Option]
    too_large: list[Option]
    refused: dict[str, str]
    """Topology -> the reason that the program would give."""

    @property
    def recommended(self) -> Option:
        """The fastest that fits; for one at ZeRO-3 the fastest at ZeRO-1 or 2 that is no more than `NEARLY` slower: its
        host has less to do, and its weights are not gathered again and again. One must fit."""
        fastest = self.fitting[0]
        if fastest.job.stage < 3:
            return fastest
        near = (one for one in self.fitting if one.seconds <= (1 + NEARLY) * fastest.seconds)
        return next((one for one in near if one.job.stage < 3), fastest)


def search(recipe: Recipe, cluster: Cluster, sizes: ModelSizes, folder: Path) -> Search:
    """Try every tensor-parallel size within a node, every pipeline and every DeepSpeed JSON in `folder`.

    Of the variants of each (micro-batches, activation checkpointing, the teacher in host memory) the fastest that fits
    is kept, or the one that comes nearest to fitting.
    """
    found: list[Option] = []
    refused: dict[str, str] = {}
    for parallel, path in _topologies(recipe, cluster, folder):
        variant = dataclasses.replace(recipe, parallel=parallel, accumulation=recipe.data.sources_of_step())
        try:
            job = Job.of(variant, ds_config.read(path), cluster.world_size, sizes, auto=cluster.costs.precision)
            options = [_option(path.name, each, cluster) for each in _variants(job)]
        except ConfigError as error:
            refused[f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, {path.name}"] = str(error)
            continue
        # The teacher stays on the device where it can.
        on_device = [one for one in options if one.fits and one.job.recipe.teacher.placement == "device"]
        fitting = on_device or [one for one in options if one.fits]
        if fitting:
            found.append(min(fitting, key=lambda option: option.seconds))
        else:
            found.append(min(options, key=lambda option: option.missing_device + option.missing_host))
    return Search(
        sorted((one for one in found if one.fits), key=lambda option: option.seconds),
        sorted((one for one in found if not one.fits), key=lambda option: option.missing_device + option.missing_host),
        refused,
    )


def _topologies(recipe: Recipe, cluster: Cluster, folder: Path) -> Iterator[tuple[ParallelConfig, Path]]:
    for tensor in _powers_of_two(cluster.devices_per_node):
        if cluster.devices_per_node % tensor:
            continue
        for pipeline in _powers_of_two(min(recipe.model.backbone.depth, cluster.world_size // tensor)):
            for path in sorted(folder.glob("*.json")):
                if (path.name == PIPELINE_JSON) == (pipeline > 1):
                    yield ParallelConfig(tensor=tensor, pipeline=pipeline), path


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(max(0, most).bit_length())]


def _variants(job: Job) -> Iterator[Job]:
    """Micro-batches of at least one sample of every source."""
    read = {modality: source_samples(job.recipe, modality, job.lengths[modality]) for modality in job.costs}
    smallest = min(map(min, read.values())) / (job.data * job.recipe.rounds)
    if smallest < 1:
        samples = min(map(min, read.values()))
        raise ConfigError(
            "global_batch_size",
            f"{job.recipe.global_batch_size} {job.recipe.batch_unit} are {samples:.0f} samples of the longest length a "
            f"step, fewer than {job.data} data-parallel ranks",
        )
    for checkpointing in (False, True):
        for placement in _PLACEMENTS:
            for rounds in _powers_of_two(int(smallest)):
                accumulation = rounds * job.recipe.data.sources_of_step()
                yield job.varied(accumulation=accumulation, checkpointing=checkpointing, placement=placement)


def _option(name: str, job: Job, cluster: Cluster) -> Option:
    device = cluster.device
    budget = memory.budget(job)
    times = {step: step_time(job, step, device, cluster.devices_per_node, cluster.costs) for step in job.steps}
    missing_device = max(0.0, budget.device_total - device.memory_bytes * (1 - memory.RESERVED))
    missing_host = max(0.0, budget.host_total - device.host_bytes * (1 - memory.HOST_RESERVED))
    return Option(name, job, budget, times, missing_device, missing_host)


def describe(option: Option) -> dict[str, Any]:
    """The keys that a run of this option is started with."""
    recipe = option.job.recipe
    return {
        "deepspeed_config": f"ds_configs/{option.deepspeed_config}",
        "parallel.tensor": recipe.parallel.tensor,
        "parallel.pipeline": recipe.parallel.pipeline,
        "accumulation": recipe.accumulation,
        "model.activation_checkpointing": recipe.model.activation_checkpointing,
        "teacher.placement": recipe.teacher.placement,
    }
