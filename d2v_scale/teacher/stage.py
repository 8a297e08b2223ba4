"""The teacher of one pipeline stage: fp32 values sharded over the stage's data-parallel ranks, whole compute copy.

A stage runs its teacher once per micro-batch, so the weights that the forward pass reads stay whole on every rank of
the stage, in one flat tensor. Each rank keeps the fp32 values of a contiguous part of it and updates only those; one
all-gather a step, before the next forward pass, brings the other parts.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.model.layers import Carry
from d2v_scale.networks.layered import Layered
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.pipeline import PipelineStudent
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import EmaTeacher, HeldRange


class StageTeacher(EmaTeacher):
    """The teacher's values of one stage and their update. Its forward pass is the stage's (`pipeline.Stage`), beside
    `student`'s.

    `make` builds the part of the teacher that this stage runs; `role(name)` says of each of its parameters whether it
    is `averaged` or `copied`. Collective to construct: all ranks must call.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        student: PipelineStudent,
        config: TeacherConfig,
        student_config: dict[str, Any],
        topology: Topology,
        role: Callable[[str], str],
    ) -> None:
        super().__init__(student, topology, config)
        dtype = torch.bfloat16 if config.precision(student_config) == "bf16" else torch.float32
        self.module = make().requires_grad_(False).to(device=topology.device, dtype=dtype)
        self._flat = _flatten(self.module, topology.data_parallel_size, dtype, topology.device)
        on_host = config.placement == "cpu"
        held = self._ranges()
        self._hold(self._with_values(held, role, torch.device("cpu") if on_host else topology.device), on_host)
        student.pipeline_stage.accompany(cast(Teacher, self.module), self.prepare)

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring the compute copy up to date before forward passes: one all-gather if it has changed.

        Collective over the stage's data-parallel group: all its ranks must call.
        """
        self.wait()
        if self._changed and self.topology.data_parallel_size > 1:
            # A copy of the own part: gloo does not gather in place.
            own = self._own_part().clone()
            dist.all_gather_into_tensor(self._flat, own, group=self.topology.data_parallel_group)
        self._changed = False

    @torch.no_grad()
    def features(self, batch: Batch, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """See `Teacher.features`: the batch goes through the stages one after the other, and all ranks get the result.

        `features_btd` is read by the first stage. Collective over the pipeline and over the stage: all ranks must call.
        """
        self.prepare()
        teacher = cast(Teacher, self.module)
        return self._through_stages(teacher, teacher.enter, teacher.resume, batch, features_btd, layers)

    @torch.no_grad()
    def features_of_student(self, batch: Batch, layers: list[int]) -> list[Tensor]:
        """As `features`, of the student."""
        student = cast(Student, self.student.module)
        was_training = student.training
        student.eval()
        found = self._through_stages(student, student.enter_whole, student.resume_whole, batch, None, layers)
        student.train(was_training)
        return found

    def _through_stages(
        self,
        network: Layered,
        enter: Callable[[Batch, Tensor | None], Carry],
        resume: Callable[[Batch, Tensor, tuple[Tensor, ...]], Carry],
        batch: Batch,
        features_btd: Tensor | None,
        layers: list[int],
    ) -> list[Tensor]:
        """Outputs of these main blocks of the network whose parts the stages have. `enter` and `resume`: what the first
        block of the first stage and of a later one gets."""
        depth = network.config.backbone.depth
        wanted = {layer % depth for layer in network.check_layers(layers)}
        found: dict[int, Tensor] = {}
        travelling: list[Tensor] = []
        for stage in range(self.topology.pipeline_size):
            outputs: dict[int, Tensor] = {}
            if stage == self.topology.pipeline_rank:
                if stage == 0:
                    carry = enter(batch, features_btd)
                else:
                    states_bsd, *positions = travelling
                    carry = resume(batch, states_bsd, tuple(positions))
                outputs = network.outputs(batch, carry, wanted)
                travelling = [carry.states_rsd, *carry.positions]
            travelling = self._all_from_stage(stage, travelling)
            found |= self._outputs_from_stage(stage, outputs)
        return [found[layer % depth] for layer in layers]

    def _outputs_from_stage(self, stage: int, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        names = [sorted(outputs)]
        dist.broadcast_object_list(names, group=self.topology.pipeline_group, group_src=stage)
        values = {name: self._from_stage(stage, outputs.get(name)) for name in names[0]}
        return {name: value for name, value in values.items() if value is not None}

    def _all_from_stage(self, stage: int, every: list[Tensor]) -> list[Tensor]:
        counts = [len(every)]
        dist.broadcast_object_list(counts, group=self.topology.pipeline_group, group_src=stage)
        own = [*every, *[None] * counts[0]][: counts[0]]
        found = [self._from_stage(stage, x) for x in own]
        return [x for x in found if x is not None]

    def _from_stage(self, stage: int, x: Tensor | None) -> Tensor | None:
        """A tensor, or None, of that stage, on all stages."""
        group = self.topology.pipeline_group
        said: list[Any] = [None if x is None else (tuple(x.shape), x.dtype)]
        dist.broadcast_object_list(said, group=group, group_src=stage)
        if said[0] is None:
            return None
        shape, dtype = said[0]
        if stage == self.topology.pipeline_rank:
            assert x is not None
            value = x.detach().contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=self.topology.device)
        dist.broadcast(value, group=group, group_src=stage)
        return value

    def _own_part(self) -> Tensor:
        size = self._flat.numel() // self.topology.data_parallel_size
        return self._flat.narrow(0, self.topology.data_parallel_rank * size, size)

    def _ranges(self) -> list[HeldRange]:
        """The parts of parameters that lie in this rank's part of the flat tensor."""
        size = self._flat.numel() // self.topology.data_parallel_size
        low = self.topology.data_parallel_rank * size
        parameters = dict(self.student.module.named_parameters())
        ranges, offset = [], 0
        for name, parameter in self.module.named_parameters():
            first, last = max(low, offset), min(low + size, offset + parameter.numel())
            if first < last:
                source = parameters[name].data.view(-1)[first - offset : last - offset]
                ranges.append(HeldRange(name, parameter, first - offset, self._flat[first:last], source))
            offset += parameter.numel()
        return ranges


@torch.no_grad()
def _flatten(module: nn.Module, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Move all parameters into one tensor whose size is a multiple of `parts`; they become views of it."""
    total = sum(parameter.numel() for parameter in module.parameters())
    flat = torch.zeros(-(-total // parts) * parts, dtype=dtype, device=device)
    offset = 0
    for parameter in module.parameters():
        view = flat[offset : offset + parameter.numel()].view(parameter.shape)
        view.copy_(parameter)
        parameter.data = view
        offset += parameter.numel()
    return flat
