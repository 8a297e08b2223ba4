"""Bytes that each device sends in one optimizer step, by kind of transfer and by link.

Collectives are counted as rings: gathering or scattering N bytes over d devices sends N (d - 1) / d from each, an
all-reduce twice that. Where a ring spans nodes, its devices on a node share what crosses. Sums of a few numbers
(losses, norms, counts) are left out.
"""

from dataclasses import dataclass, replace

from d2v_scale.model.stem_config import parts_of
from d2v_scale.planning import memory
from d2v_scale.planning.job import Job

TENSOR_SUMS = "tensor-parallel sums"


@dataclass(frozen=True)
class Transfer:
    """One kind of communication, over a whole step."""

    name: str
    moved: float
    """N: bytes of the whole tensors that go through the group, per step."""
    passes: int
    """1: gathered, scattered or sent; 2: all-reduced."""
    group: int
    """Devices that take part."""
    on_node: int
    """Those of them that share a node."""
    hidden: bool
    """Overlaps with computation."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends, over whatever link. A transfer between two stages sends all of it."""
        return self.passes * self.moved * self._others(self.group)

    @property
    def within(self) -> float:
        """Bytes that each device sends over the links of its node."""
        return self.passes * self.moved * (self._others(self.on_node) if self.group > 1 else 0.0)

    @property
    def between(self) -> float:
        """Bytes that each device sends over the network."""
        nodes = -(-self.group // self.on_node)
        return self.passes * self.moved * self._others(nodes) / self.on_node

    @staticmethod
    def _others(count: int) -> float:
        return (count - 1) / count


@dataclass(frozen=True)
class Hop(Transfer):
    """From a pipeline stage to the next, or back: every byte crosses one link."""

    @property
    def sent(self) -> float:
        return self.moved

    @property
    def within(self) -> float:
        return self.moved if self.on_node == self.group else 0.0

    @property
    def between(self) -> float:
        return self.moved - self.within


def transfers(job: Job, step: str, devices_per_node: int) -> list[Transfer]:
    """What the busiest pipeline stage sends for one step of this kind (`Job.steps`)."""
    count = job.parallel.pipeline
    found = [stage_transfers(job, step, devices_per_node, stage) for stage in range(count)]
    return max(found, key=lambda stage: sum(one.sent for one in stage))


def stage_transfers(job: Job, step: str, devices_per_node: int, stage: int) -> list[Transfer]:
    """What each device of one pipeline stage sends for one step of this kind (`Job.steps`)."""
    found = _replicas(job, devices_per_node, stage)
    for of_modality in (_slices, _hops):
        each = [of_modality(job, modality, devices_per_node, stage) for modality in job.steps[step]]
        # Of every modality a list of the same kinds.
        found += [replace(alike[0], moved=sum(one.moved for one in alike)) for alike in zip(*each, strict=True)]
    return [one for one in found if one.sent > 0]


def replicas_on_node(job: Job, devices_per_node: int) -> int:
    """Of the ranks that divide the batch, those that share a node: they are `tensor` apart."""
    return min(job.data, max(1, devices_per_node // job.parallel.tensor))


def _replicas(job: Job, devices_per_node: int, stage: int) -> list[Transfer]:
    """Between data-parallel ranks: weights, gradients and the teacher's weights."""
    tensor, data, micro = job.parallel.tensor, job.data, job.recipe.accumulation
    student, teacher = job.stage_tensors[stage]
    own = job.itemsize * sum(one.local(tensor) for one in student)
    others = job.teacher_itemsize * sum(one.local(tensor) for one in teacher)
    on_node = replicas_on_node(job, devices_per_node)

    def over(name: str, moved: float, passes: int, hidden: bool) -> Transfer:
        return Transfer(name, moved, passes, data, on_node, hidden)

    # A pipeline gathers the teacher before all passes and reduces gradients after them; ZeRO does both on the way.
    on_the_way = job.parallel.pipeline == 1
    found = [over("teacher gather", others * (micro if on_the_way else 1), 1, on_the_way)]
    if of_muon := sum(one.numel for one in memory.matrices(job, student)):
        # Two sums over the ranks of a stage, in fp32: to make matrices whole, and to hand the results round.
        ranks = tensor * data
        found.append(Transfer("Muon's matrices", 2 * 4.0 * of_muon, 2, ranks, min(ranks, devices_per_node), False))
    if job.stage < 3:
        reduced = micro if job.stage == 2 else 1
        found += [over("gradient all-reduce", own * reduced, 2, on_the_way), over("weight gather", own, 1, False)]
        return found
    lasting = memory.persistent(job, student)
    transient = own / job.itemsize - lasting
    again = transient - memory.kept_gathered(job, transient)
    gathers = micro * (transient + again) + lasting
    found += [
        over("weight gather", job.itemsize * gathers, 1, True),
        over("gradient scatter", own * micro, 1, True),
    ]
    return found


def _slices(job: Job, modality: str, devices_per_node: int, stage: int) -> list[Transfer]:
    """Between tensor-parallel ranks: two sums a block and pass."""
    model, lengths = job.recipe.model, job.lengths[modality]
    cost = job.costs[modality]
    layers = cost.layers
    blocks = sum(layers[i].layer.kind == "block" for i in job.stage_layers[modality][stage])
    samples = job.step_samples(modality) / job.data
    width = model.backbone.width
    states = job.itemsize * samples * lengths.clones * (lengths.kept + lengths.extra) * width
    its = job.recipe.teacher.model_beside(model).backbone.width
    teacher_states = job.teacher_itemsize * samples * (lengths.positions + lengths.extra) * its
    passes = 3 if model.activation_checkpointing else 2
    moved = 2 * (blocks * passes * states + (cost.apart_blocks if cost.apart else blocks) * teacher_states)
    tensor = job.parallel.tensor
    return [Transfer(TENSOR_SUMS, moved, 2, tensor, min(tensor, devices_per_node), False)]


def _hops(job: Job, modality: str, devices_per_node: int, stage: int) -> list[Transfer]:
    """Between pipeline stages: student states there and their gradient back, teacher states and the sums of taps."""
    pipeline = job.parallel.pipeline
    lengths, width = job.lengths[modality], job.recipe.model.backbone.width
    samples = job.step_samples(modality) / job.data
    states = job.itemsize * samples * lengths.clones * (lengths.kept + lengths.extra) * width
    moved = 0.0
    if stage < pipeline - 1:
        moved += states + job.teacher_itemsize * samples * (lengths.positions + lengths.extra) * width
        built = job.recipe.built_targets()
        for stem in parts_of(modality):
            for target in built[stem]:
                if any(layer < job.split.blocks[stage].stop for layer in target.layers):
                    moved += 4 * samples * lengths.of(stem).positions * width
    if stage > 0:
        moved += states
    spans = pipeline * job.parallel.tensor * job.data > devices_per_node
    return [Hop("between stages", moved, 1, pipeline, 1 if spans else pipeline, False)] if pipeline > 1 else []
