"""How many collectives a data-parallel rank takes part in during one optimizer step, by kind of transfer.

Over many ranks a collective costs more by being one than by its bytes, so their number decides about buckets and
thresholds. DeepSpeed's choices are followed parameter by parameter: what it gathers together at stage 3, what it fills
buckets with, and what it leaves gathered.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby

from d2v_scale.parallel.whole_matrices import in_buckets
from d2v_scale.planning import memory
from d2v_scale.planning.job import Job, TensorSize

Module = list[tuple[str, int]]
"""What is gathered for one call at the latest: names and elements of parameters."""

SUMS = "norms and counts"
"""All-reduces of a few numbers: the count of what is masked, the verdict, and the norm, at stages 1 and 2 of every
parameter group; what the step says about the state of targets, where they have one; the loss, where spikes are looked
for."""


def collectives(job: Job) -> dict[str, int]:
    """Of one step, between data-parallel ranks, by the names of `traffic.transfers` and `SUMS`. Empty in a pipeline and
    where one rank has the whole batch."""
    if job.data == 1 or job.parallel.pipeline > 1:
        return {}
    tensor, micro = job.parallel.tensor, job.recipe.accumulation
    student, teacher = job.stage_tensors[0]
    ahead, live, reuse = memory.fetching(job)
    found = {"teacher gather": micro * _gathers(teacher, tensor, ahead, live, whole_blocks=True)}
    if job.recipe.optim.muon is not None:
        by_group = [memory.matrices(job, group) for group in memory.parameter_groups(job, student)]
        packed = [in_buckets(group, [one.numel for one in group]) for group in by_group]
        found["Muon's matrices"] = 2 * sum(len(list(runs)) for runs in packed)
    bucket = memory.reduce_bucket(job)
    groups = memory.parameter_groups(job, student)
    sometimes = job.recipe.has_target_state() + (job.recipe.optim.spikes.on_spike is not None)
    if job.stage < 3:
        found["gradient all-reduce"] = (micro if job.stage == 2 else 1) * _buckets(student, tensor, bucket)
        found["weight gather"] = len(groups)
        found[SUMS] = 2 + len(groups) + sometimes
        return found
    lasting = memory.persistent_tensors(job, student)
    there = tuple(one for one in student if one not in lasting)
    of_micro = _gathers(there, tensor, ahead, live, reuse, whole_blocks=job.recipe.model.compile, twice=True)
    found["weight gather"] = micro * of_micro + len(lasting)
    found["gradient scatter"] = micro * _buckets(student, tensor, bucket)
    found[SUMS] = 3 + sometimes
    return found


# A search asks the same of every number of micro-batches, and most of its time would go into the answers.
@lru_cache(maxsize=32)
def _gathers(
    tensors: tuple[TensorSize, ...],
    tensor: int,
    ahead: float,
    live: float,
    reuse: float = 0.0,
    *,
    whole_blocks: bool,
    twice: bool = False,
) -> int:
    """All-gathers of a forward pass over these parameters; `twice`: and of a backward pass."""
    modules = _modules(tensors, tensor, whole_blocks=whole_blocks)
    return gathers([*modules, *reversed(modules)] if twice else modules, ahead, live, reuse)


@lru_cache(maxsize=32)
def _buckets(tensors: tuple[TensorSize, ...], tensor: int, most: float) -> int:
    return buckets(_modules(tensors, tensor), most)


def tensor_sums(job: Job, step: str) -> int:
    """All-reduces between tensor-parallel ranks of a step of this kind (`Job.steps`), on the stage that has most: two a
    block and pass."""
    passes = 3 if job.recipe.model.activation_checkpointing else 2

    def run(modality: str, stage: int) -> int:
        """Blocks that are run, in all passes."""
        cost = job.costs[modality]
        own = sum(cost.layers[i].layer.kind == "block" for i in job.stage_layers[modality][stage])
        return passes * own + (cost.apart_blocks if cost.apart else own)

    stages, alike = range(job.parallel.pipeline), job.steps[step]
    most = max(sum(run(modality, stage) for modality in alike) for stage in stages)
    return 2 * most * job.recipe.accumulation // len(alike)


def buckets(modules: Sequence[Module], most: float) -> int:
    """In how many buckets of so many elements the gradients of these modules are reduced, last one first; a gradient
    that is larger goes alone."""
    count, room = 0, 0.0
    for module in reversed(modules):
        size = sum(size for _, size in module)
        if size > room:
            count, room = count + 1, most
        room -= size
    return count


def gathers(trace: Sequence[Module], ahead: float, live: float, reuse: float = 0.0) -> int:
    """All-gathers of ZeRO-3 for modules that run in this order, as DeepSpeed's coordinator makes them.

    What a module lacks is gathered at once; then, ahead of the modules that follow, parameters until they are `ahead`
    elements or `live` are there. After its call a module's parameters go, but for those that are used again before
    `reuse` elements have been. The first to be called is the model itself, which lacks nothing.
    """
    trace = [[], *trace]
    sizes = dict(parameter for module in trace for parameter in module)
    before = [0, *accumulate(sum(size for _, size in module) for module in trace)]
    uses: dict[str, deque[int]] = {name: deque() for name in sizes}
    for step, module in enumerate(trace):
        for name, _ in module:
            uses[name].append(step)
    queue = deque((name, step) for step, module in enumerate(trace) for name, _ in module)
    fetched_for = dict.fromkeys(sizes, -1)
    there: set[str] = set()
    held, count = 0, 0
    for step, module in enumerate(trace):
        wanted = {name for name, _ in module if name not in there}
        if wanted:
            count += 1
        due = {name for name, _ in module if fetched_for[name] < step}
        while due and queue:
            name, at = queue.popleft()
            fetched_for[name] = at
            due.discard(name)
        there |= wanted
        held += sum(sizes[name] for name in wanted)
        room, more = min(live - held, ahead), 0
        chosen: set[str] = set()
        while queue and more < room:
            name, at = queue.popleft()
            fetched_for[name] = max(fetched_for[name], at)
            if name not in there and name not in chosen:
                chosen.add(name)
                more += sizes[name]
        count += bool(chosen)
        there |= chosen
        held += more
        for name, size in module:
            uses[name].popleft()
            again = uses[name][0] if uses[name] else None
            soon = again is not None and before[again] - before[step + 1] < reuse
            if fetched_for[name] <= step + 1 and not soon and name in there:
                there.discard(name)
                held -= size
    return count


def _modules(tensors: Sequence[TensorSize], tensor: int, *, whole_blocks: bool = False) -> list[Module]:
    """Parameters by the module that has them; of a block as one, where it is gathered whole."""

    def owner(one: TensorSize) -> str:
        parts = one.name.split(".")
        place = next((i for i, part in enumerate(parts) if part in ("blocks", "prenet")), None)
        return ".".join(parts[: place + 2] if whole_blocks and place is not None else parts[:-1])

    return [[(one.name, one.local(tensor)) for one in alike] for _, alike in groupby(tensors, key=owner)]
