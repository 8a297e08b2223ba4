"""The teacher: sharded over the data-parallel ranks, in fp32, on the device or in host memory.

The teacher is a ZeRO-3 engine without an optimizer, whatever the student's stage; a plain module where there is but one
data-parallel rank. Partition i of a teacher parameter covers the same elements as partition i of the student's, so the
update `teacher += (1 - decay) * (student - teacher)` is local: no collective, no gathered tensor. Its truth is fp32;
the forward pass reads a copy in the compute precision (in fp32 the two are one tensor). The source is the student's
fp32 master weight; at stages 1 and 2 in bf16 the bf16 weight: their masters are cut without regard to parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_scale.data2vec import ema
from d2v_scale.data2vec.targets import Made
from d2v_scale.errors import ConfigError
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import ds_config
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.layout_check import check_cut
from d2v_scale.parallel.shards import TensorSlice, full_shape, global_shapes, partition_range, tensor_slice
from d2v_scale.parallel.zero import StudentEngine, construct
from d2v_scale.process import faults
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.entry import Entry, sharded_engine
from d2v_scale.teacher.host_source import HostSource
from d2v_scale.teacher.host_update import HostUpdate

CHUNK = 1 << 24
"""Elements handled at once: bounds the temporary memory of an update (64 MiB in fp32)."""


@dataclass(frozen=True)
class TeacherShard:
    """A flat range [start, start + numel) of the teacher's tensor `name`, with its fp32 values."""

    name: str
    shape: tuple[int, ...]
    """Of the tensor-parallel slice (the whole tensor where there is none)."""
    slice: TensorSlice | None
    start: int
    values: Tensor
    compute: Tensor | None
    """The same range in the precision of the forward pass; None where `values` is what the forward pass reads."""
    source: Tensor | None
    """The student's values of the range; None: the teacher is another model, or this is not read again."""
    averaged: bool
    """False: copied from the student at every update."""
    counted: bool
    """False on all but one of the tensor-parallel ranks that hold the same values."""

    @property
    def numel(self) -> int:
        """Elements of the range."""
        return self.values.numel()


@dataclass(frozen=True)
class HeldRange:
    """A range of a teacher parameter that this rank is to hold in fp32."""

    name: str
    parameter: Tensor
    start: int
    range: Tensor
    """What the forward pass reads: flat, in its precision."""
    source: Tensor | None
    """The student's values; None: the teacher is another model."""


class EmaTeacher(ABC):
    """The teacher's fp32 values on this rank, and their update from the student's where it follows the student
    (`TeacherConfig.kind`).

    What a topology adds is where the values come from and who runs the forward pass: `ShardedTeacher` under ZeRO,
    `teacher.stage.StageTeacher` in a pipeline.
    """

    module: nn.Module
    """The teacher, or the part of it that is here."""

    def __init__(self, student: StudentEngine, topology: Topology, config: TeacherConfig) -> None:
        self.student = student
        self.kind = config.kind
        self.follows = config.follows
        """Whether updates move it. Else evaluation is of the student."""
        self.topology = topology
        self.completed_updates = 0
        """Updates since the start of the run, those that change nothing included; always equal to the student's."""
        self._measured = torch.zeros(3, dtype=torch.float64)
        self._last_decay = 1.0
        self._shards: list[TeacherShard] = []
        self._batches: list[tuple[bool, list[TeacherShard]]] = []
        self._host_update: HostUpdate | None = None
        self._host_source: HostSource | None = None
        self._changed = True
        """Whether what forward passes read has been written since the last of them."""

    def _hold(self, shards: list[TeacherShard], on_host: bool) -> None:
        """Take these ranges, to update from now on; with the student's values, unless the teacher is another model."""
        self._shards = shards
        self._batches = _batches(shards)
        moves_on_gpu = self.follows and self.topology.device.type == "cuda"
        if on_host and moves_on_gpu:
            self._host_update = HostUpdate(self.topology.device, shards, CHUNK)
            self.student.before_step.append(self._host_update.wait)
        elif moves_on_gpu and any(_source(shard).device.type == "cpu" for shard in shards):
            largest = max(sum(shard.numel for shard in together) for _, together in self._batches)
            self._host_source = HostSource(self.topology.device, largest)
        self.copy_student()

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move towards the student by 1 - decay. Local: no collective. Once after each applied optimizer step.

        decay >= 1 changes nothing (as the reference does) and is counted, and so is what does not follow the student.
        """
        faults.point("ema")
        self.completed_updates += 1
        assert self.completed_updates == self.student.completed_updates, (
            f"the teacher made {self.completed_updates} updates, the student {self.student.completed_updates}"
        )
        self._last_decay = decay
        if ema.is_frozen(decay) or not self.follows:
            return
        self._changed = True
        if self._host_update is not None:
            self._host_update.start(decay)
            return
        for averaged, shards in self._batches:
            values = [shard.values for shard in shards]
            sources = self._sources(shards)
            if averaged:
                ema.average_(values, sources, decay)
            else:
                torch._foreach_copy_(values, sources)
            self._refresh(shards)

    @torch.no_grad()
    def measure(self) -> None:
        """Sum what `health` reports of the update that comes next. Local; reads all weights, so only for the log."""
        if not self.follows:
            return
        self.wait()
        sums = torch.zeros(3, dtype=torch.float32, device=self._shards[0].values.device if self._shards else "cpu")
        for averaged, shards in self._batches:
            counted = [shard for shard in shards if shard.counted]
            if averaged and counted:
                values = [shard.values for shard in counted]
                sources = self._sources(counted)
                sums[0] += torch.stack(torch._foreach_norm(torch._foreach_sub(sources, values))).square().sum()
                sums[1] += torch.stack(torch._foreach_norm(values)).square().sum()
        self._measured = sums

    @torch.no_grad()
    def copy_student(self) -> None:
        """Take the student's values as they are (at the start of a run, or `teacher.reset`). Local."""
        self.wait()
        for shard in self._shards:
            # What memory held may be NaN, which equals nothing: another model is zeros until it is read.
            shard.values.copy_(torch.zeros(()) if shard.source is None else shard.source)
        self._refresh(self._shards)

    def shards(self) -> list[TeacherShard]:
        """The ranges this rank holds, for checkpoints. Local. After writing to `values` call `finish_loading`."""
        self.wait()
        return self._shards

    def finish_loading(self, completed_updates: int) -> None:
        """Make the compute copy follow values that were written through `shards`. Local."""
        self.completed_updates = completed_updates
        with torch.no_grad():
            self._refresh(self._shards)

    def health(self) -> dict[str, Tensor]:
        """Figures of the last update after `measure`, as 0-dim tensors. Collective; no host synchronisation.

        {} of what does not follow the student. `student_teacher_distance` (after the update) and `teacher_update_norm`
        are over averaged parameters, `student_teacher_distance_relative` is divided by the teacher's norm before the
        update.
        """
        if not self.follows:
            return {}
        sums = self._measured.to(self.topology.device, torch.float32, non_blocking=True)
        torch.distributed.all_reduce(sums)
        before, norm = sums[0].sqrt(), sums[1].sqrt()
        step = 1 - min(self._last_decay, 1.0)
        return {
            "student_teacher_distance": before * (1 - step),
            "student_teacher_distance_relative": before * (1 - step) / norm.clamp_min(1e-30),
            "teacher_update_norm": before * step,
            "teacher_norm": norm,
        }

    def wait(self) -> None:
        """Return when the last update is complete. Local; immediate unless the update runs in the background."""
        if self._host_update is not None:
            self._host_update.wait()

    def waited_seconds(self) -> float | None:
        """How long this process has waited for updates in the background so far; None where they are done at once."""
        return None if self._host_update is None else self._host_update.waited_seconds

    @abstractmethod
    def features(self, batch: Any, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """The module's `features`: hidden states for evaluation, without gradient. Collective."""

    @torch.no_grad()
    def features_of_student(self, batch: Any, layers: list[int]) -> list[Tensor]:
        """The same of the student, which is left in the mode it is in. Collective."""
        student = cast(Student, self.student.module)
        was_training = student.training
        student.eval()
        found = student.features(batch, layers)
        student.train(was_training)
        return found

    @property
    def encoder(self) -> nn.Module:
        """What evaluation is of, or the part of it that is here: the teacher where it follows the student, else the
        student."""
        return self.module if self.follows else self.student.module

    def encoder_features(self, batch: Any, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """Hidden states of `encoder`. `features_btd`: the student's, where a teacher shares them. Collective."""
        if self.follows:
            return self.features(batch, features_btd, layers)
        return self.features_of_student(batch, layers)

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all of the teacher's parameters as one process would have them. Collective in a pipeline."""
        return self.student.over_stages(global_shapes(self.module, self.topology.tensor_size))

    def destroy(self) -> None:
        """Remove hooks and buffers."""
        self.wait()

    def _sources(self, shards: list[TeacherShard]) -> list[Tensor]:
        """The student's values of these ranges in fp32, on the device of the teacher's."""
        if self._host_source is not None:
            return self._host_source.bring([_source(shard) for shard in shards])
        return [_source(shard).to(shard.values.device, torch.float32) for shard in shards]

    def _refresh(self, shards: list[TeacherShard]) -> None:
        """Make what the forward pass reads follow the fp32 values of these ranges."""
        self._changed = True
        pairs = [(shard.compute, shard.values) for shard in shards if shard.compute is not None]
        if pairs:
            torch._foreach_copy_([compute for compute, _ in pairs], [values for _, values in pairs])

    def _with_values(
        self, ranges: list[HeldRange], role: Callable[[str], str], device: torch.device
    ) -> list[TeacherShard]:
        """The ranges with their fp32 values on `device`: one allocation, in which a range that the forward pass reads
        directly needs no place."""
        place = self.topology
        parameters = dict(self.student.module.named_parameters())
        direct = [held.range.dtype == torch.float32 and held.range.device == device for held in ranges]
        own = sum(held.range.numel() for held, one_tensor in zip(ranges, direct, strict=True) if not one_tensor)
        self._values = torch.empty(own, dtype=torch.float32, device=device)
        shards, offset = [], 0
        for held, one_tensor in zip(ranges, direct, strict=True):
            name, numel = held.name, held.range.numel()
            assert role(name) in ("averaged", "copied"), f"{name} is {role(name)!r} but the teacher owns it"
            shape = full_shape(held.parameter)
            if held.source is not None:
                assert shape == full_shape(parameters[name]), f"{name} differs in shape from the student's"
            values = held.range if one_tensor else self._values.narrow(0, offset, numel)
            offset += 0 if one_tensor else numel
            cut = tensor_slice(held.parameter, place.tensor_rank, place.tensor_size)
            compute = None if one_tensor else held.range
            averaged, counted = role(name) == "averaged", cut is not None or place.tensor_rank == 0
            shards.append(TeacherShard(name, shape, cut, held.start, values, compute, held.source, averaged, counted))
        return shards


class ShardedTeacher(EmaTeacher):
    """The teacher's values, its forward pass and its update, under ZeRO.

    `make` builds the module; `role(name)` says of each of its parameters whether it is `averaged` or `copied`.
    Parameters are matched to the student's by name, unless the teacher is another model. Collective to construct.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        student: StudentEngine,
        config: TeacherConfig,
        student_config: dict[str, Any],
        topology: Topology,
        role: Callable[[str], str],
    ) -> None:
        from d2v_scale.model.block import Block

        super().__init__(student, topology, config)
        precision = config.precision(student_config)
        on_host = config.placement == "cpu"
        # In bf16 the small compute copy stays on the device; in fp32 it is the truth itself and moves to the host.
        offload = on_host and precision == "fp32"
        self._engine: Any = None
        self._gather_stream: Any = None
        if not _needs_engine(topology, offload):
            # Nothing to divide, and ZeRO-3 would have the host wait for the device before every module.
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self._entry = Entry(make().to(device=topology.device, dtype=dtype)).requires_grad_(False).eval()
        else:
            engine_config = ds_config.teacher_config(student_config, precision, offload)
            self._entry = Entry(construct(make, engine_config, topology, whole=(Block,))).requires_grad_(False)
            self._engine, self._gather_stream = sharded_engine(self._entry, engine_config, topology)
        self.module = self._entry.teacher
        self._hold(self._match(role, torch.device("cpu") if on_host else topology.device), on_host)
        student.make_targets = self.make
        if self._engine is not None:
            check_cut(self.module, topology)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass (targets, of the first kind), without gradient. Collective: every rank must call."""
        return self._run("forward", args, kwargs)

    def make(self, batch: Any, features_btd: Tensor | None, *, only_read: bool = False) -> tuple[Made, ...]:
        """The module's `make`: all targets and what is observed of them. Collective: every rank must call."""
        # Where states of another model lie is not what the batch says of the student's.
        return self._run("make", (batch, features_btd), {"only_read": only_read and self.kind != "checkpoint"})

    def features(self, batch: Any, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """The module's `features`: hidden states for evaluation, without gradient. Collective."""
        return self._run("features", (batch, features_btd, layers), {})

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and buffers."""
        super().destroy()
        if self._engine is not None:
            self._engine.destroy()

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.wait()
        if self._changed and self._gather_stream is not None:
            # DeepSpeed's gathers wait for nothing that was written before them.
            self._gather_stream.wait_stream(torch.cuda.current_stream())
        self._changed = False
        with torch.no_grad():
            return (self._engine or self._entry)(method, args, kwargs)

    def _match(self, role: Callable[[str], str], device: torch.device) -> list[TeacherShard]:
        """This rank's ranges of the teacher, paired with the student's where they are of one model."""
        rank = self.topology.data_parallel_rank
        parameters = dict(self.student.module.named_parameters())
        student_ranges = {shard.name: shard for shard in self.student.shards()} if self.student.stage == 3 else {}
        ranges = []
        for name, parameter in self.module.named_parameters():
            start, numel = (0, parameter.numel()) if self._engine is None else partition_range(parameter, rank)
            if not numel:
                continue
            source: Tensor | None = None
            if self.kind == "checkpoint":
                pass
            elif name not in parameters:
                raise ConfigError("teacher", f"parameter {name} has no counterpart in the student")
            elif self.student.stage == 3:
                ours = student_ranges[name]
                assert (ours.start, ours.numel) == (start, numel), f"{name}: student and teacher are cut differently"
                source = ours.weight
            else:
                source = parameters[name].data.view(-1).narrow(0, start, numel)
            own = parameter.data.view(-1) if self._engine is None else parameter.ds_tensor.data  # type: ignore[attr-defined]
            held = own.narrow(0, 0, numel)
            ranges.append(HeldRange(name, parameter, start, held, source))
        return self._with_values(ranges, role, device)


def _needs_engine(topology: Topology, offload: bool) -> bool:
    return offload or topology.data_parallel_size > 1


def _source(shard: TeacherShard) -> Tensor:
    assert shard.source is not None, "another model than the student has nothing to follow"
    return shard.source


def _batches(shards: list[TeacherShard]) -> list[tuple[bool, list[TeacherShard]]]:
    """Shards in groups of at most CHUNK elements (or one shard), averaged and copied ones apart."""
    batches: list[tuple[bool, list[TeacherShard]]] = []
    for averaged in (True, False):
        room = 0
        for shard in (s for s in shards if s.averaged is averaged):
            if shard.numel > room or not batches or batches[-1][0] is not averaged:
                batches.append((averaged, []))
                room = CHUNK
            batches[-1][1].append(shard)
            room -= shard.numel
    return batches
