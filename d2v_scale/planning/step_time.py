"""How long an optimizer step takes, estimated from FLOPs, traffic, counted collectives and what they cost.

The model: layers compute at a rate that depends on the width, unless the host, which issues their operations, is
slower; a transfer takes its bytes over their bandwidth and for each collective the steps of a ring. What can overlap
with computation (ZeRO's gathers and reductions, the teacher's update in host memory) costs nothing until it takes
longer than the computation; the rest (tensor-parallel sums, hops between stages, ZeRO-1's gather of weights, sums of a
few numbers, the optimizer) is added. In a pipeline nothing overlaps: the teacher is updated and gathered before the
first pass, and gradients are reduced after the last. Nor does anything where the host computes (`Costs.waits`).
"""

from dataclasses import dataclass

from d2v_scale.planning import collectives, traffic
from d2v_scale.planning.costs import ADAM_BYTES, BESIDE, EMA_BYTES, RECOMPUTED, Costs
from d2v_scale.planning.hardware import BANDWIDTH_REACHED, Hardware
from d2v_scale.planning.job import Job


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    products: float
    """What the device computes, recomputation included, on an average pipeline stage."""
    issuing: float
    """What the host needs to issue that."""
    compute: float
    """What both take together: the longer one, or their sum where the host computes; in a pipeline with hops."""
    bubble: float
    """Share of the compute phase that an average stage waits for others."""
    hidden: float
    """Transfers that overlap with computation."""
    exposed: float
    """Transfers that do not."""
    update: float
    """Optimizer and teacher."""
    host: float
    """What the host does once a step."""

    @property
    def total(self) -> float:
        """All of it."""
        return max(self.compute / (1 - self.bubble), self.hidden) + self.exposed + self.update + self.host


def step_time(job: Job, step: str, device: Hardware, devices_per_node: int, costs: Costs) -> StepTime:
    """Estimate one step of this kind (`Job.steps`)."""
    on_node = min(devices_per_node, job.world_size)
    crowding = costs.crowding(on_node)
    micro, pipeline = job.recipe.accumulation, job.parallel.pipeline
    each = [_slot(job, step, costs, stage) for stage in range(pipeline)]
    products = [crowding * one for one, _ in each]
    issuing = [one for _, one in each]
    hops = 2 * costs.hop if pipeline > 1 else 0.0
    slots = [(a + b if costs.waits else max(a, b)) + hops for a, b in zip(products, issuing, strict=True)]
    whole = sum(slots) + (micro - 1) * max(slots)
    compute = micro * sum(slots) / pipeline
    hidden, exposed = _transfers(job, step, devices_per_node, costs)
    update, behind = _updates(job, device, costs, crowding)
    hidden += behind
    if costs.waits:
        hidden, exposed = 0.0, exposed + hidden
    return StepTime(
        products=micro * sum(products) / pipeline,
        issuing=micro * sum(issuing) / pipeline,
        compute=compute,
        bubble=1 - compute / whole if pipeline > 1 else 0.0,
        hidden=hidden,
        exposed=exposed,
        update=update,
        host=costs.host(job.stage).step,
    )


def _slot(job: Job, step: str, costs: Costs, stage: int) -> tuple[float, float]:
    """Of a mean micro-batch on one pipeline stage: seconds that the device computes, and that the host issues."""
    tensor, micro, pipeline = job.parallel.tensor, job.recipe.accumulation, job.parallel.pipeline
    again = job.recipe.model.activation_checkpointing
    # Of every matrix that is sliced one side is narrower.
    width = round(job.recipe.model.backbone.width / tensor**0.5)
    host = costs.host(job.stage)
    products = issuing = 0.0
    for modality in job.steps[step]:
        layers = [job.costs[modality].layers[position] for position in job.stage_layers[modality][stage]]
        samples = job.step_samples(modality) / (job.data * micro)
        for one in layers:
            block = one.layer.kind == "block"
            flops = one.on_each(tensor) + (one.forward / tensor if block and again else 0.0)
            products += samples * flops / (costs.blocks if block else costs.others).at(width)
        blocks: float = sum(one.layer.kind == "block" for one in layers)
        cost = job.costs[modality]
        if cost.apart:  # in a pipeline there is none
            its = round(job.recipe.teacher.model_beside(job.recipe.model).backbone.width / tensor**0.5)
            blocks += BESIDE * (cost.apart_blocks - blocks)
            for one in cost.apart:
                rate = costs.blocks if one.layer.kind == "block" else costs.others
                products += samples * one.on_each(tensor) / rate.at(its)
        issuing += blocks * host.layer * (1 + (RECOMPUTED if again else 0.0)) / len(job.steps[step])
    # The first stage has the stem, the last one the decoder and the loss.
    ends = (stage == 0) + (stage == pipeline - 1)
    return products, issuing + host.micro * ends / 2


def _transfers(job: Job, step: str, devices_per_node: int, costs: Costs) -> tuple[float, float]:
    """Seconds of transfers that can overlap with computation, and of others."""
    calls = collectives.collectives(job)
    seconds = {True: 0.0, False: 0.0}
    for one in traffic.transfers(job, step, devices_per_node):
        seconds[one.hidden] += one.within / costs.link + one.between / costs.network
        if isinstance(one, traffic.Hop):
            continue  # `Costs.hop` is in the stages' slots
        count = collectives.tensor_sums(job, step) if one.name == traffic.TENSOR_SUMS else calls.get(one.name, 1)
        seconds[one.hidden] += count * costs.ring.seconds(one.passes, one.group, one.on_node)
    if sums := calls.get(collectives.SUMS, 0):
        seconds[False] += sums * costs.ring.seconds(2, job.data, traffic.replicas_on_node(job, devices_per_node))
    return seconds[True], seconds[False]


def _updates(job: Job, device: Hardware, costs: Costs, crowding: float) -> tuple[float, float]:
    """Seconds of optimizer and teacher on their own, and of what overlaps with computation."""
    tensor, data = job.parallel.tensor, job.data
    own = max(sum(one.local(tensor) for one in student) for student, _ in job.stage_tensors) / data
    others = max(sum(one.local(tensor) for one in teacher) for _, teacher in job.stage_tensors) / data
    memory = costs.host(job.stage).update_rate / crowding
    host, pcie = (bandwidth * BANDWIDTH_REACHED for bandwidth in (device.host_memory_bandwidth, device.host_bandwidth))
    alone = behind = 0.0
    if job.offloads("optimizer"):
        alone += own * (ADAM_BYTES / host + (4 + job.itemsize) / pcie)
    else:
        alone += own * ADAM_BYTES / memory
    if job.offloads("param"):
        behind += 2 * job.recipe.accumulation * job.itemsize * own / pcie
    if not job.recipe.teacher.follows:
        others = 0.0
    if job.recipe.teacher.placement == "cpu":
        behind += others * (EMA_BYTES / host + (4 + job.teacher_itemsize) / pcie)
    else:
        alone += others * EMA_BYTES / memory
    return (alone, behind) if job.parallel.pipeline == 1 else (alone + behind, 0.0)
