"""The student in DeepSpeed's pipeline, and beside it, in every stage, the teacher of the same layers.

Every stage holds a section of the one list of layers. A micro-batch's student states, teacher states and running sums
of taps travel together, so targets arrive where the predictions are made, and each stage updates its teacher alone. The
batch itself does not travel: every rank of the pipeline has it (`feed`), and knows from it the shapes of what does.

DeepSpeed wants a gradient for every float that crosses a boundary. The student's states have one, and so has the
parameter of the position bias, which all blocks use and the first stage owns. The teacher's tensors have none: they
cross as int32 with the same bits.
"""

import contextlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data2vec.stateless import key
from d2v_scale.model.layers import Carry, states_shape
from d2v_scale.model.stem import Stem
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import flat_step, gradient_norm
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.objective import Objective
from d2v_scale.parallel.whole_matrices import bind
from d2v_scale.parallel.zero import NamedParameters, StepResult, StudentEngine, poisoned
from d2v_scale.process import faults
from d2v_scale.process.profiling import part
from d2v_scale.tracking.meters import Stopwatch


class Stage(nn.Module):
    """The layers of one stage: the student's, which DeepSpeed trains, and the teacher's, which ride along."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.passes: list[Stopwatch] = []
        """The forward and backward passes since `begin`."""
        self._work: deque[tuple[Batch, int]] = deque()
        self._arriving: deque[Batch] = deque()
        self._leaving: deque[Batch] = deque()
        # In a list, so that DeepSpeed sees the student's parameters only.
        self._teacher: list[Teacher] = []
        self._prepare_teacher: Callable[[], None] | None = None
        self._draw = Draw(0, 0)
        self._only_read = False
        self._objective: Objective | None = None

    def accompany(self, teacher: Teacher, prepare: Callable[[], None]) -> None:
        """Run this part of the teacher from now on, each step after a call of `prepare`."""
        self._teacher, self._prepare_teacher = [teacher], prepare

    def begin(
        self, batches: list[Batch], draw: Draw, objective: Objective, data_parallel_rank: int, *, only_read: bool
    ) -> None:
        """Give the micro-batches of one step, in the order in which they will be run. `only_read`: nothing is computed
        that training does not read. Collective over the stage's data-parallel group."""
        assert self._prepare_teacher is not None, "a stage runs its teacher beside its student"
        self._prepare_teacher()
        self._draw, self._objective, self._only_read, self.passes = draw, objective, only_read, []
        # Each stage drops other elements, and other ones in every micro-batch.
        place = (data_parallel_rank, self.student.section.first)
        seeds = [key(draw.seed, "dropout", draw.step, *place, micro) >> 1 for micro in range(len(batches))]
        self._work = deque(zip(batches, seeds, strict=True))
        self._arriving, self._leaving = deque(batches), deque(batches)

    def next_arrival(self) -> "Travelling":
        """What the next micro-batch to be received consists of."""
        return self._travelling(self._arriving.popleft(), self.student.section.first)

    def next_departure(self) -> "Travelling":
        """What the next micro-batch to be sent consists of."""
        return self._travelling(self._leaving.popleft(), self.student.section.last)

    def _travelling(self, batch: Batch, block: int) -> "Travelling":
        return _travelling(self.student, self._teacher[0], batch, block, self._read(self._teacher[0], batch))

    def _read(self, stack: Student | Teacher, batch: Batch) -> Tensor | None:
        return stack.read(batch) if self._only_read else None

    def forward(self, received: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """One micro-batch through this stage; the last one returns its share of the loss."""
        faults.point("forward")
        with self.timed_pass():
            batch, seed = self._work.popleft()
            torch.manual_seed(seed)
            return self._run(batch, received)

    def timed_pass(self) -> Stopwatch:
        """A stopwatch for the pass that follows."""
        self.passes.append(Stopwatch())
        return self.passes[-1]

    def _run(self, batch: Batch, received: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        student, (teacher,), section = self.student, self._teacher, self.student.section
        assert self._objective is not None
        running: list[Tensor | None] | None = None
        features_btd = None
        with part("student"):
            if section.starts:
                carry, features_btd = student.enter(batch)
                self._objective.entered(batch, features_btd)
            else:
                arrived = _unpack(cast(tuple[Tensor, ...], received), teacher, batch)
                states_rsd, positions, teacher_states_bsd, teacher_positions, running = arrived
                carry = student.resume(batch, states_rsd, positions)
            read_n = None if self._objective.reads_states else self._read(student, batch)
            student.run_blocks(batch, carry, self._draw, read_n)
        with part("teacher"), torch.no_grad():
            if section.starts:
                assert features_btd is not None
                teacher_carry = teacher.enter(batch, features_btd.detach())
            else:
                teacher_carry = teacher.resume(batch, teacher_states_bsd, teacher_positions)
            targets_n = self._read(teacher, batch)
            running = teacher.run_blocks(batch, teacher_carry, running, targets_n)
        if not section.ends:
            return _pack(carry, teacher_carry, running)
        with part("teacher"), torch.no_grad():
            made = teacher.leave(batch, running, targets_n)
        with part("student"):
            predictions, encoder_rsd, cls = student.leave(batch, carry, self._draw, read_n=read_n)
            means = student.mean_states(batch, encoder_rsd) if self._objective.reads_states else ()
        return poisoned(self._objective.share(batch, predictions, cls, made, means))


def _pack(carry: Carry, teacher_carry: Carry, running: list[Tensor | None]) -> tuple[Tensor, ...]:
    """What the next stage gets, tensors with gradient first."""
    # A copy: a parameter itself would collect the later stages' gradient outside DeepSpeed's bookkeeping.
    positions = [position.clone() for position in carry.positions]
    teacher_positions = [_as_int(position.float()) for position in teacher_carry.positions]
    totals = [_as_int(total_btd) for total_btd in running if total_btd is not None]
    # What is sent must be contiguous, and the states of a stem whose patches lie along one axis need not be.
    return (carry.states_rsd.contiguous(), *positions, _as_int(teacher_carry.states_rsd), *teacher_positions, *totals)


def _unpack(
    received: tuple[Tensor, ...], teacher: Teacher, batch: Batch
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, ...], list[Tensor | None]]:
    """Student states, its position parameters, teacher states, its position parameters, each target's sum of taps."""
    parts = iter(received)
    biased = _biased(teacher, batch)
    dtype = next(teacher.parameters()).dtype
    states_rsd = next(parts)
    positions = tuple(next(parts) for _ in biased)
    teacher_states_bsd = next(parts).view(dtype)
    teacher_positions = tuple(next(parts).view(torch.float32).to(dtype) for _ in biased)
    tapped = teacher.taps_before(batch.modality, teacher.section.first)
    running = [next(parts).view(torch.float32) if some else None for some in tapped]
    assert next(parts, None) is None, "the stages disagree about what travels"
    return states_rsd, positions, teacher_states_bsd, teacher_positions, running


def _biased(stack: Student | Teacher, batch: Batch) -> list[str]:
    """The stems of a batch whose attention has a position bias, in their order."""
    stems = [own.modality for own in batch.of_stems]
    return [stem for stem in stems if modalities.of(stack.config, stem).has_bias]


def _as_int(x: Tensor) -> Tensor:
    """The same bits as int32, which DeepSpeed expects no gradient for (a bf16 tensor's last axis must be even)."""
    return x.detach().contiguous().view(torch.int32)


Travelling = list[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and types of the tensors that go from a stage to the next."""


def _travelling(student: Student, teacher: Teacher, batch: Batch, block: int, read_n: Tensor | None) -> Travelling:
    """What `_pack` makes of a micro-batch before this main block, if targets are made at `read_n` (None: everywhere).
    Known on the host, from the batch alone."""
    config = student.config
    dtype, teacher_dtype = next(student.parameters()).dtype, next(teacher.parameters()).dtype
    seen: tuple[int, ...] = states_shape(config, batch, masked=False)
    kept: Travelling = [(states_shape(config, batch, masked=True), dtype)]
    ridden: Travelling = [(seen, teacher_dtype)]
    for stem in _biased(student, batch):
        shape: tuple[int, ...] = cast(Stem, student.stems[stem]).bias.parameter_shape
        kept.append((shape, dtype))
        ridden.append((shape, torch.float32))
    for own in batch.of_stems:
        tapped = sum(teacher.taps_before(own.modality, block))
        summed = (seen[0], own.masked_rt.shape[1]) if read_n is None else (1, len(read_n))
        ridden += [((*summed, seen[2]), torch.float32)] * tapped
    # As `_as_int` makes them.
    as_int = [((*shape[:-1], shape[-1] * of.itemsize // 4), torch.int32) for shape, of in ridden]
    return [*kept, *as_int]


class PipelineStudent(StudentEngine):
    """This rank's stage of the student inside DeepSpeed's pipeline engine, at ZeRO stage 1."""

    def __init__(self, engine: Any, ds_config: dict[str, Any], topology: Topology, stage: Stage) -> None:
        from deepspeed.runtime.pipe import schedule

        super().__init__(engine, ds_config, topology)
        self.module = stage.student
        self.pipeline_stage = stage
        self._schedule = Stopwatch()
        # DeepSpeed would hand out one buffer for tensors of different types, and reuse one that is still read.
        engine._allocate_or_extend_buffers = self._new_buffer
        # It would send a message about shapes before every micro-batch, and the host would wait to read it.
        engine._send_tensor_meta = self._check_departure
        engine._recv_tensor_meta = self._arrival_buffers
        engine._INSTRUCTION_MAP = {
            **engine._INSTRUCTION_MAP,
            schedule.BackwardPass: self._backward_pass,
            schedule.ReduceGrads: self._reduce_gradients,
        }
        self.optimizer.register_step_pre_hook(self._before_step)

    def train_batches(self, batches: list[Batch], draw: Draw, objective: Objective, *, measure: bool) -> StepResult:
        """See `StudentEngine.train_batches`; DeepSpeed's schedule says in which order the passes are made."""
        assert len(batches) == self.accumulation, "as many micro-batches as gradient_accumulation_steps"
        self.pipeline_stage.begin(batches, draw, objective, self.topology.data_parallel_rank, only_read=True)
        self._schedule.start()
        with part("pipeline"):
            self.engine.train_batch(_nothing(self.topology.device))
        if measure:
            self._measure_idle()
        return self._verdict()

    @torch.no_grad()
    def forward_batches(self, batches: list[Batch], draw: Draw, objective: Objective) -> None:
        """See `StudentEngine.forward_batches`."""
        self.pipeline_stage.begin(batches, draw, objective, self.topology.data_parallel_rank, only_read=False)
        # It puts its modules into eval mode, and would leave them so.
        was_training = self.engine.module.training
        self.engine.eval_batch(
            _nothing(self.topology.device), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        self.engine.module.train(was_training)

    def over_stages(self, part: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The union of what the stages give, in their order. Collective over the pipeline."""
        parts: list[Any] = [None] * self.topology.pipeline_size
        dist.all_gather_object(parts, part, group=self.topology.pipeline_group)
        return {name: shape for one in parts for name, shape in one.items()}

    def _measure_idle(self) -> None:
        busy = sum(watch.seconds() for watch in self.pipeline_stage.passes)
        own = torch.tensor([busy, self._schedule.seconds()], device=self.topology.device)
        every = [torch.empty_like(own) for _ in range(self.topology.pipeline_size)]
        dist.all_gather(every, own, group=self.topology.pipeline_group)
        stages = torch.stack(every).tolist()
        longest = max(span for _, span in stages)
        self.idle_shares = [1 - busy / longest for busy, _ in stages]

    def _backward_pass(self, engine: Any, buffer_id: int) -> None:
        faults.point("backward")
        with self.pipeline_stage.timed_pass(), part("backward"):
            type(engine)._exec_backward_pass(engine, buffer_id)

    def _reduce_gradients(self, engine: Any) -> None:
        self._schedule.stop()
        type(engine)._exec_reduce_grads(engine)
        self._absent.before_step()

    def _before_step(self, *_: Any) -> None:
        faults.point("optimizer")
        for wait in self.before_step:
            wait()

    def _check_departure(self, leaving: tuple[Tensor, ...], _stage: int) -> None:
        known = self.pipeline_stage.next_departure()
        found = [(tuple(x.shape), x.dtype) for x in leaving]
        assert found == known, f"the next stage expects {known}, and this one has {found}"

    def _arrival_buffers(self, _stage: int) -> tuple[Tensor, ...]:
        return tuple(self._new_buffer(0, shape, dtype) for shape, dtype in self.pipeline_stage.next_arrival())

    def _new_buffer(self, _index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.topology.device)


def _nothing(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed loads instead of batches: `Stage.begin` has them."""
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    while True:
        yield nothing, nothing


def build_pipeline(
    make: Callable[[], Student],
    ds_config: dict[str, Any],
    make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
    topology: Topology,
    initialize: Callable[[nn.Module], None] | None = None,
) -> PipelineStudent:
    """Build this rank's stage of the student and its engine from a resolved DeepSpeed configuration. Collective.

    `make` builds the section of this stage; the rest is as in `zero.build_student`.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    student = make()
    if initialize is not None:
        initialize(student)
    stage = Stage(student)
    place = PipeModelDataParallelTopology(
        num_pp=topology.pipeline_size, num_mp=topology.tensor_size, num_dp=topology.data_parallel_size
    )
    # One DeepSpeed layer a stage: where to cut is ours to say. It prints a line that says nothing.
    layers = [stage if index == topology.pipeline_rank else nn.Identity() for index in range(topology.pipeline_size)]
    with contextlib.redirect_stdout(io.StringIO()):
        module = PipelineModule(layers, topology=place, partition_method="uniform", dynamic_shape=True)
    optimizer = make_optimizer([(name, p) for name, p in student.named_parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, dist_init_required=False)
    pipeline = PipelineStudent(engine, ds_config, topology, stage)
    flat_step.bind(pipeline)
    pipeline.check_layout()
    gradient_norm.bind(engine.optimizer)
    bind(pipeline)
    return pipeline
