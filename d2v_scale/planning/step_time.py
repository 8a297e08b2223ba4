"""How long an optimizer step takes, estimated from FLOPs, traffic and the peaks of the hardware.

The model: matrix products reach an assumed share of the peak, transfers an assumed share of their bandwidth. What can
overlap with computation (ZeRO's gathers and reductions, the teacher's update in host memory) costs nothing until it
takes longer than the computation; the rest (tensor-parallel sums, hops between stages, ZeRO-1's gather of weights, the
optimizer) is added. In a pipeline nothing overlaps: the teacher is updated and gathered before the first pass, and
gradients are reduced after the last.
"""

from dataclasses import dataclass

from d2v_scale.planning import traffic
from d2v_scale.planning.hardware import BANDWIDTH_REACHED, Hardware
from d2v_scale.planning.job import Job

_ADAM = 32
"""Bytes that AdamW moves for each element: master, both moments and gradient read, three written, and the weight."""
_EMA = 16
"""Bytes that the teacher's update moves for each element: both read, one written, and the compute copy."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """Matrix products, recomputation included, on an average pipeline stage."""
    bubble: float
    """Share of the compute phase that an average stage waits for others."""
    hidden: float
    """Transfers that overlap with computation."""
    exposed: float
    """Transfers that do not."""
    update: float
    """Optimizer and teacher."""

    @property
    def total(self) -> float:
        """All of it."""
        return max(self.compute / (1 - self.bubble), self.hidden) + self.exposed + self.update


def step_time(job: Job, step: str, device: Hardware, devices_per_node: int, utilisation: float) -> StepTime:
    """Estimate one step of this kind (`Job.steps`). `utilisation`: share of the peak that matrix products reach."""
    flops = sum(_sample_flops(job, modality) * job.step_samples(modality) for modality in job.steps[step])
    sharing = job.data * job.parallel.pipeline
    compute = flops / (sharing * device.bf16_flops * utilisation)
    link = device.link_bandwidth * BANDWIDTH_REACHED
    network = device.network_bandwidth * BANDWIDTH_REACHED
    seconds = {True: 0.0, False: 0.0}
    for one in traffic.transfers(job, step, devices_per_node):
        seconds[one.hidden] += one.within / link + one.between / network
    update, behind = _updates(job, device)
    bubble = job.split.bubble(job.recipe.accumulation) if job.parallel.pipeline > 1 else 0.0
    return StepTime(compute, bubble, seconds[True] + behind, seconds[False], update)


def _sample_flops(job: Job, modality: str) -> float:
    """What a tensor-parallel rank computes for a sample, recomputation included."""
    cost, tensor = job.costs[modality], job.parallel.tensor
    recomputed = cost.recomputed / tensor if job.recipe.model.activation_checkpointing else 0.0
    return sum(one.on_each(tensor) for one in cost.layers) + recomputed


def _updates(job: Job, device: Hardware) -> tuple[float, float]:
    """Seconds of optimizer and teacher on their own, and of what overlaps with computation."""
    tensor, data = job.parallel.tensor, job.data
    own = max(sum(one.local(tensor) for one in student) for student, _ in job.stage_tensors) / data
    others = max(sum(one.local(tensor) for one in teacher) for _, teacher in job.stage_tensors) / data
    memory, host = (
        bandwidth * BANDWIDTH_REACHED for bandwidth in (device.memory_bandwidth, device.host_memory_bandwidth)
    )
    pcie = device.host_bandwidth * BANDWIDTH_REACHED
    alone = behind = 0.0
    if job.offloads("optimizer"):
        alone += own * (_ADAM / host + (4 + job.itemsize) / pcie)
    else:
        alone += own * _ADAM / memory
    if job.offloads("param"):
        behind += 2 * job.recipe.accumulation * job.itemsize * own / pcie
    if job.recipe.teacher.placement == "cpu":
        behind += others * (_EMA / host + (4 + job.teacher_itemsize) / pcie)
    else:
        alone += others * _EMA / memory
    return (alone, behind) if job.parallel.pipeline == 1 else (alone + behind, 0.0)
