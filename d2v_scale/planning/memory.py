"""Bytes that a job holds on a device and in host memory, by class of tensor.

The first five classes are those that `d2v_scale.teacher.held_bytes` measures; activations and buffers come on top.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

import torch

from d2v_scale.checkpoint.config import GENERATIONS
from d2v_scale.modalities.costs import Setting
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import parts_of
from d2v_scale.optim import is_matrix, stem_scale
from d2v_scale.parallel import whole_matrices
from d2v_scale.planning import activations
from d2v_scale.planning.job import Job, TensorSize

PERSISTENCE_THRESHOLD = 100_000
REUSE_DISTANCE = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
BUCKET = 500_000_000
"""What DeepSpeed takes where its JSON does not say (elements)."""

RESERVED = 0.08
"""Share of a device's memory that is left to CUDA's context, communication buffers and fragmentation (assumed)."""
HOST_RESERVED = 0.25
"""Share of host memory that is left to the system, its file cache and the data pipeline (assumed)."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank, by class."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_total(self) -> float:
        """All of a device's bytes at the fullest moment of a step."""
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        """All of this rank's bytes in host memory, the data pipeline not included."""
        return sum(self.host.values())


def budget(job: Job) -> Budget:
    """What the fullest rank holds: of all pipeline stages the one whose device needs most."""
    return max((stage_budget(job, stage) for stage in range(job.parallel.pipeline)), key=lambda one: one.device_total)


def stage_budget(job: Job, stage: int) -> Budget:
    """What the fullest rank of one pipeline stage holds."""
    states, host = held(job, stage)
    found = max((stage_activations(job, stage, modality) for modality in job.recipe.sequences), default=0.0)
    device = {**states, "activations": found, "targets": _target_states(job, stage)}
    device["buffers"] = _buffers(job, stage, states["gradients"], found)
    return Budget(device, {**host, "checkpoint": _pinned(_shard(job, stage)), "memory copies": _copies(job, stage)})


def _copies(job: Job, stage: int) -> float:
    """What is held for `checkpoint.memory`: the snapshot, and two generations of this rank's shard and of one that
    another node's rank sent, which one node alone is spared."""
    if not job.recipe.checkpoint.memory.every:
        return 0.0
    shard = _shard(job, stage)
    return _pinned(shard) + 2 * GENERATIONS * shard


def _pinned(size: float) -> float:
    """Pinned memory comes in powers of two."""
    return float(2 ** ceil(log2(max(1.0, size))))


def _shard(job: Job, stage: int) -> float:
    """What is copied and then written while the run goes on: this rank's part of weights, moments and teacher in
    fp32."""
    tensor, data = job.parallel.tensor, job.data
    student, teacher = (
        _partitioned(tensors, tensor, data) if sharded else _local(tensors, tensor) / data
        for tensors, sharded in zip(job.stage_tensors[stage], (job.stage == 3, job.parallel.pipeline == 1), strict=True)
    )
    return 4.0 * (3 * student + teacher - _of_muon(job, job.stage_tensors[stage][0]))


def held(job: Job, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of weights, gradients, optimizer and teacher on the device and in host memory, between the last backward
    pass of a step and the update."""
    student, teacher = job.stage_tensors[stage]
    lasting = 0
    tensor, data, size = job.parallel.tensor, job.data, job.itemsize
    if job.stage == 3:
        part: float = _partitioned(student, tensor, data)
        lasting = persistent(job, student) if data > 1 else 0
        weights, gradients = float(size * part), 4.0 * part
    else:
        part = _local(student, tensor) / data
        weights = float(size * _local(student, tensor))
        gradients = _stage_1_gradients(job, student) if _gradients_are_views(job) else 4.0 * part
    moments = (8.0 if _masters_are_weights(job) else 12.0) * part - 4.0 * _of_muon(job, student)
    device = {"weights": weights, "gradients": gradients, "master and moments": moments, **_teacher(job, teacher)}
    host = {name: device[name] for name, away in _in_host_memory(job).items() if away}
    device |= dict.fromkeys(host, 0.0)
    # Small weights stay gathered on the device.
    device["weights"] += size * lasting
    return device, host


def matrices(job: Job, tensors: Sequence[TensorSize]) -> list[TensorSize]:
    """The parameters that Muon steps."""
    shape = {True: (1, 1), False: (1,)}  # whether there are rows and columns is all that is asked
    return [one for one in tensors if is_matrix(one.name, shape[one.name in job.sizes.decayed], job.recipe.optim)]


def _of_muon(job: Job, tensors: Sequence[TensorSize]) -> float:
    """Elements of this rank that Muon steps: they have one moment."""
    found = matrices(job, tensors)
    tensor, data = job.parallel.tensor, job.data
    return _partitioned(found, tensor, data) if job.stage == 3 else _local(found, tensor) / data


def _target_states(job: Job, stage: int) -> float:
    """The states of targets in fp32, and in fp64 what a step sums for them; whole on every rank of the last stage."""
    if stage < job.parallel.pipeline - 1:
        return 0.0
    total = 0
    for target in (one for each in job.recipe.built_targets().values() for one in each):
        state = target.initial_state()
        said = target.statistics(torch.zeros(1, 1, target.raw_width), torch.ones(1, 1), state) if state else {}
        total += sum(4 * x.numel() for x in state.values()) + sum(8 * x.numel() for x in said.values())
    return float(total)


def persistent(job: Job, tensors: Sequence[TensorSize]) -> int:
    """Elements of the parameters that stage 3 leaves gathered."""
    return sum(one.local(job.parallel.tensor) for one in persistent_tensors(job, tensors))


def persistent_tensors(job: Job, tensors: Sequence[TensorSize]) -> list[TensorSize]:
    """The parameters that stage 3 leaves gathered, and gathers one by one after each step."""
    threshold = int(job.zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))
    return [one for one in tensors if one.local(job.parallel.tensor) <= threshold]


def kept_gathered(job: Job, elements: float) -> float:
    """Elements, of so many that stage 3 gathers for the forward pass, that are still gathered when the backward pass
    begins: those used again within the reuse distance, which is counted to the end of the model and back. DeepSpeed's
    prefetching keeps some more, so this is the least."""
    return min(elements, max(fetching(job)[2], _prefetched(job)) / 2)


def _prefetched(job: Job) -> float:
    """Elements that stage 3 gathers ahead."""
    ahead, live, _ = fetching(job)
    return min(ahead, live)


def fetching(job: Job) -> tuple[float, float, float]:
    """Elements that stage 3 gathers ahead at once, that it has gathered at most, and within which it keeps what will be
    used again."""
    zero = job.zero
    ahead = float(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    live = float(zero.get("stage3_max_live_parameters", REUSE_DISTANCE))
    return ahead, live, float(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))


def reduce_bucket(job: Job) -> float:
    """Elements of the bucket that gradients are reduced in."""
    return float(job.zero.get("reduce_bucket_size", BUCKET))


def stage_activations(job: Job, stage: int, modality: str) -> float:
    """Bytes of the activations that a stage keeps when it keeps most, with the teacher's and the loss's temporaries."""
    model, lengths = job.recipe.model, job.lengths[modality]
    samples, built = job.micro_batch(modality), job.recipe.built_targets()
    each = [(stem, lengths.of(stem), built[stem]) for stem in parts_of(modality)]
    setting = Setting(samples=samples, itemsize=job.itemsize, tensor=job.parallel.tensor)
    every = activations.activations(model, modality, lengths, setting)
    layers = [every[position] for position in job.stage_layers[modality][stage]]
    whole = sum(one.saved for one in layers)
    if model.activation_checkpointing:
        blocks = [one.saved for one in layers if one.layer.kind == "block"]
        whole = sum(one.kept for one in layers) + max(blocks, default=0.0)
    pipeline = job.parallel.pipeline
    in_flight = min(job.recipe.accumulation, pipeline - stage) if pipeline > 1 else 1
    if stage == pipeline - 1:
        for stem, own, targets in each:
            whole += activations.loss_bytes(own, samples, targets)
            whole += activations.head_bytes(model.of(stem), own, setting, len(targets) - 1)
    teacher = Setting(samples=samples, itemsize=job.teacher_itemsize, tensor=job.parallel.tensor)
    sums = sum(own.positions * sum(bool(target.layers) for target in targets) for _, own, targets in each)
    beside = job.recipe.teacher.model_beside(model)
    return in_flight * whole + activations.teacher_bytes(beside, lengths, teacher, sums)


def _local(tensors: Sequence[TensorSize], tensor: int) -> int:
    return sum(one.local(tensor) for one in tensors)


def _partitioned(tensors: Sequence[TensorSize], tensor: int, data: int) -> int:
    """Elements of a stage-3 rank: each parameter's share, rounded up."""
    return sum(ceil(one.local(tensor) / data) for one in tensors)


def _teacher(job: Job, tensors: Sequence[TensorSize]) -> dict[str, float]:
    tensor, data = job.parallel.tensor, job.data
    if job.parallel.pipeline > 1:
        # One flat copy to compute with, gathered once a step; its part in fp32 is this rank's.
        whole, part = _local(tensors, tensor), _local(tensors, tensor) / data
        if job.teacher_itemsize == 4 and job.recipe.teacher.placement == "device":
            return {"teacher fp32": 4.0 * whole, "teacher compute": 0.0}
        return {"teacher fp32": 4.0 * part, "teacher compute": float(job.teacher_itemsize * whole)}
    share = _partitioned(tensors, tensor, data)
    # In fp32 what is averaged and what is computed with are one tensor.
    return {"teacher fp32": 4.0 * share, "teacher compute": 2.0 * share if job.teacher_itemsize == 2 else 0.0}


def _in_host_memory(job: Job) -> dict[str, bool]:
    optimizer = job.offloads("optimizer")
    return {
        "weights": job.offloads("param"),
        "gradients": optimizer,
        "master and moments": optimizer,
        "teacher fp32": job.recipe.teacher.placement == "cpu",
    }


def _masters_are_weights(job: Job) -> bool:
    """Stages 1 and 2 in fp32 step the weights themselves (`parallel.flat_step`)."""
    return job.stage < 3 and job.itemsize == 4 and not job.offloads("optimizer")


def _gradients_are_views(job: Job) -> bool:
    """Stages 1 and 2 accumulate in the weights' precision, without another copy of this rank's part."""
    dtype = (job.config.get("data_types") or {}).get("grad_accum_dtype") or "auto"
    return job.stage < 3 and (job.itemsize == 4 or dtype in ("auto", "bf16")) and not job.offloads("optimizer")


def _stage_1_gradients(job: Job, tensors: Sequence[TensorSize]) -> float:
    """The fullest rank's gradients: every parameter that its partition touches keeps its whole gradient."""
    held_by: Counter[int] = Counter()
    for group in parameter_groups(job, tensors):
        sizes = [one.local(job.parallel.tensor) for one in group]
        share, start = max(1, ceil(sum(sizes) / job.data)), 0
        for size in sizes:
            for rank in range(start // share, min(job.data - 1, (start + size - 1) // share) + 1):
                held_by[rank] += size
            start += size
    return float(job.itemsize * max(held_by.values(), default=0))


def parameter_groups(job: Job, tensors: Sequence[TensorSize]) -> list[Sequence[TensorSize]]:
    """What the optimizer treats alike."""
    optim, decayed = job.recipe.optim, job.sizes.decayed
    groups: dict[tuple[bool, float, bool], list[TensorSize]] = {}
    of_muon = {one.name for one in matrices(job, tensors)}
    for one in tensors:
        plain = optim.decay_on == "matrices" and one.name not in decayed
        groups.setdefault((plain, stem_scale(one.name, optim), one.name in of_muon), []).append(one)
    return [groups[key] for key in sorted(groups)]


def _block(model: ModelConfig) -> int:
    """Weights of a block's matrices."""
    backbone = model.backbone
    return 4 * backbone.width**2 + 2 * backbone.width * backbone.ffn


def _buffers(job: Job, stage: int, gradients: float, saved: float) -> float:
    """What exists for a moment: gathered weights, buckets, and gradients on their way into this rank's part."""
    student, teacher = job.stage_tensors[stage]
    own, tensor, size = _local(student, job.parallel.tensor), job.parallel.tensor, job.itemsize
    bucket = min(own, reduce_bucket(job))
    backward = size * bucket * (2 if job.zero.get("overlap_comm") else 1)
    if job.parallel.pipeline == 1 and job.data > 1:
        model = job.recipe.model
        ahead, its = (_prefetched(job) + _block(x) / tensor for x in (model, job.recipe.teacher.model_beside(model)))
        backward += job.teacher_itemsize * min(_local(teacher, tensor), its)
        if job.stage == 3:
            backward += size * min(own, kept_gathered(job, own) + ahead)
    if job.stage == 3:
        return backward
    if job.stage == 1:
        backward += max(0.0, size * own - gradients)
    # The step makes an fp32 copy of the gradients when the activations are gone.
    copy = 0.0 if job.offloads("optimizer") else (4 + size) * own / job.data
    if sizes := [one.numel for one in matrices(job, student)]:
        # Whole matrices, and for this rank's part its momentum ahead and what it is moved along.
        copy += 4 * max(*sizes, min(whole_matrices.BUCKET, sum(sizes))) + 8 * _of_muon(job, student)
    return max(backward, copy - saved)
