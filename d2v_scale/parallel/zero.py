"""The student inside a DeepSpeed ZeRO engine, and the verdict on every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.data2vec.stateless import key
from d2v_scale.data2vec.targets import Made
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import flat_step, gradient_norm, rank_loops
from d2v_scale.parallel.absent_gradients import absent_gradients
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.layout_check import check_layout
from d2v_scale.parallel.objective import Objective
from d2v_scale.parallel.shards import MOMENTS, Shard, global_shapes, student_shards
from d2v_scale.parallel.spike_watch import SpikeWatch
from d2v_scale.parallel.whole_matrices import WholeMatrices, bind
from d2v_scale.process import faults
from d2v_scale.process.profiling import part
from d2v_scale.spikes import Spike, SpikeConfig

if TYPE_CHECKING:
    from d2v_scale.networks.stack import Student

NamedParameters = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step. The same on every rank."""

    applied: bool
    """False: the loss or a gradient was not finite somewhere, or a spike, and no rank changed anything."""
    norm: Tensor | float
    """`grad_norm` where DeepSpeed keeps it: on the device."""
    spike: Spike | None = None
    """Why the step was not applied, where it is that (`optim.spikes`)."""

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping; inf when it was not finite. Waits for the device."""
        return float(self.norm)


class StudentEngine:
    """A DeepSpeed engine over the student, at ZeRO stage 1, 2 or 3.

    One optimizer step is `backward` for each of the accumulated micro-batches, then `step`; `train_batches` is one of
    a student beside its teacher. DeepSpeed divides the gradient by the accumulation and by the data-parallel size.
    """

    def __init__(self, engine: Any, ds_config: dict[str, Any], topology: Topology) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        """The torch optimizer; its `param_groups` carry the learning rate of the next update."""
        self.topology = topology
        self.stage = int(ds_config["zero_optimization"]["stage"])
        self.precision: Literal["fp32", "bf16"] = "bf16" if ds_config["bf16"]["enabled"] else "fp32"
        self.accumulation = int(ds_config["gradient_accumulation_steps"])
        self.completed_updates = 0
        """Optimizer steps that were applied."""
        self.skipped_updates = 0
        """Optimizer steps that were not applied because something was not finite."""
        self.skipped_in_a_row = 0
        self.before_step: list[Callable[[], None]] = []
        """Called before the weights change; who still reads them waits here until it is done."""
        self.make_targets: Callable[..., tuple[Made, ...]] | None = None
        """The `make` of the teacher that follows this student, which sets it."""
        self.idle_shares: list[float] = []
        """By pipeline stage: the share of the last measured step's passes that it waited for others; [] without."""
        self.matrices: WholeMatrices | None = None
        """What `whole_matrices.bind` sets where Muon steps some of the masters."""
        self.spikes: SpikeWatch | None = None
        """Set by `watch_spikes`."""
        self.whole_gradients = False
        """Whether every master has its flat gradient, clipped, beside it while the optimizer steps, to be read."""
        self._micro_batches = 0
        self._absent = absent_gradients(engine.optimizer, self.stage)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The student's forward pass. Collective at stage 3: every rank must run the same modules in the same order."""
        faults.point("forward")
        return self.engine(*args, **kwargs)

    def train_batches(self, batches: list[Batch], draw: Draw, objective: Objective, *, measure: bool) -> StepResult:
        """One optimizer step of the student, beside its teacher, on all micro-batches: on every rank, or on none.

        Dropout is seeded for every micro-batch. `measure` also sets `idle_shares`, for which the host waits for the
        device. Collective.
        """
        del measure
        assert self.make_targets is not None, "no teacher follows this student"
        for micro, batch in enumerate(batches):
            torch.manual_seed(key(draw.seed, "dropout", draw.step, self.topology.data_parallel_rank, micro) >> 1)
            with part("student"):
                output = self(batch, draw, only_read=not objective.reads_states)
                means = self._means(batch, output.encoder_rsd, objective)
            objective.entered(batch, output.features_btd)
            with part("teacher"):
                made = self.make_targets(batch, output.features_btd, only_read=True)
            share = objective.share(batch, output.predictions, output.cls, made, means)
            with part("backward"):
                self.backward(share)
        with part("optimizer"):
            return self.step()

    def _means(self, batch: Batch, encoder_rsd: Tensor, objective: Objective) -> tuple[Tensor, ...]:
        """The student's mean states, if the objective reads them."""
        return cast("Student", self.module).mean_states(batch, encoder_rsd) if objective.reads_states else ()

    @torch.no_grad()
    def forward_batches(self, batches: list[Batch], draw: Draw, objective: Objective) -> None:
        """The student and its teacher on these micro-batches without training, at all positions, which hooks may look
        at. Collective: all ranks must call, with equal numbers of micro-batches."""
        assert self.make_targets is not None, "no teacher follows this student"
        for batch in batches:
            output = self.module(batch, draw)
            objective.entered(batch, output.features_btd)
            made = self.make_targets(batch, output.features_btd)
            means = self._means(batch, output.encoder_rsd, objective)
            objective.share(batch, output.predictions, output.cls, made, means)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch. Collective.

        The host waits for the device at stage 3 (once, at the end) and with `overlap_comm` at stages 1 and 2 (for every
        bucket): DeepSpeed frees then what it has reduced.
        """
        faults.point("backward")
        assert self._micro_batches < self.accumulation, "more micro-batches than gradient_accumulation_steps"
        self.engine.backward(poisoned(loss))
        self._micro_batches += 1
        if self._micro_batches == 1:
            self._absent.after_first_backward()
        if self._micro_batches < self.accumulation:
            self.engine.step()

    def step(self) -> StepResult:
        """Clip and step on every rank, or on none. Collective.

        DeepSpeed asks the device for the verdict before it steps: the host waits here, and at stage 3 once more for the
        parameters that stay gathered.
        """
        assert self._micro_batches == self.accumulation, "fewer micro-batches than gradient_accumulation_steps"
        faults.point("optimizer")
        for wait in self.before_step:
            wait()
        self._micro_batches = 0
        self._absent.before_step()
        self.engine.step()
        return self._verdict()

    def watch_spikes(self, config: SpikeConfig) -> None:
        """Apply no step that is a spike from now on, where the configuration says that they are looked for."""
        if config.on_spike is not None:
            self.spikes = SpikeWatch(config, self.engine.optimizer, self.stage, self.topology)

    def add_loss_in(self, loss: Tensor) -> None:
        """The next step's loss, this rank's share of it, is added up in this tensor (float64, 0-dim) before the weights
        change: spikes are judged by it, too."""
        if self.spikes is not None:
            self.spikes.loss = loss

    def _verdict(self) -> StepResult:
        """What became of the step that DeepSpeed has just taken."""
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.completed_updates += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped_updates += 1
            self.skipped_in_a_row += 1
            self._forget_gradients()
        spike = None if self.spikes is None else self.spikes.take()
        return StepResult(applied, self.engine.get_global_grad_norm() if spike is None else spike.norm, spike)

    def _forget_gradients(self) -> None:
        """Drop what a skipped step has accumulated.

        DeepSpeed 0.19 forgets to at stages 1 and 2 with offload and fp32 accumulation: the next step would add its
        gradient to the one that was not finite, and be skipped too, for ever.
        """
        if self.stage < 3:
            gradients = self.engine.optimizer.averaged_gradients
            for group in gradients:
                gradients[group] = None

    def over_stages(self, part: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The union of what every pipeline stage gives; there is one stage here."""
        return part

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all of the student's parameters as one process would have them. Collective in a pipeline."""
        return self.over_stages(self.local_shapes())

    def local_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters of this pipeline stage, as one process would have them. Local."""
        return global_shapes(self.module, self.topology.tensor_size)

    def shards(self) -> list[Shard]:
        """The ranges of fp32 weights (and moments) this rank holds. Local."""
        place = self.topology
        return student_shards(
            self.module,
            self.engine.optimizer,
            self.stage,
            place.data_parallel_rank,
            place.tensor_rank,
            place.tensor_size,
        )

    def check_layout(self) -> None:
        """Raises ConfigError when DeepSpeed does not keep the weights where `shards` say. Collective; once built."""
        check_layout(self.module, self.shards(), self.engine.optimizer, self.stage, self.topology)

    def begin_loading(self) -> None:
        """Make room for Adam moments that have not been stepped yet, so that `shards` can be written. Local."""
        for group in self.masters():
            state = self.optimizer.state[group]
            for moment in self.moments_of(group):
                state.setdefault(moment, torch.zeros_like(group.data))
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=group.device))

    @torch.no_grad()
    def finish_loading(self, completed_updates: int, skipped_updates: int = 0) -> None:
        """Make the compute weights follow the fp32 masters that were written through `shards`. Collective."""
        self.completed_updates, self.skipped_updates = completed_updates, skipped_updates
        for group in self.masters():
            self.optimizer.state[group]["step"].fill_(completed_updates)
        zero = self.engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        # Persistent parameters would keep serving the gathered old values.
        zero.checkpoint_event_prologue()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.checkpoint_event_epilogue()

    def adam_steps(self) -> set[int]:
        """The step counts inside the optimizer on this rank; {completed_updates} when all is well."""
        states = [self.optimizer.state.get(group, {}) for group in self.masters()]
        return {int(state["step"]) for state in states if "step" in state} or {0}

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and buffers."""
        self.engine.destroy()

    def moments_of(self, master: nn.Parameter) -> tuple[str, ...]:
        """The moments that the optimizer keeps of a flat master. Muon's momentum goes by the name of Adam's first."""
        return MOMENTS[:1] if self.matrices is not None and self.matrices.holds(master) else MOMENTS

    def masters(self) -> list[nn.Parameter]:
        """The flat fp32 tensors of this rank that DeepSpeed steps, in its order."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups


def poisoned(loss: Tensor) -> Tensor:
    """The loss, whose whole gradient is NaN where it is not finite itself.

    Even a loss like a constant NaN, whose own gradient is finite, then shows in the gradient norm that DeepSpeed
    reduces anyway: the verdict needs nothing else.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def construct(
    make: Callable[[], nn.Module],
    ds_config: dict[str, Any],
    topology: Topology,
    whole: tuple[type[nn.Module], ...] = (),
) -> nn.Module:
    """Build a module; at stage 3 partitioned as it is built, so that no rank ever holds all of it. Collective.

    `whole`: modules that are gathered at once, instead of one by one what is inside, which costs the host more time.
    """
    import deepspeed

    if int(ds_config["zero_optimization"]["stage"]) < 3:
        return make()
    rank_loops.replace()
    with deepspeed.zero.Init(
        config_dict_or_path=ds_config, data_parallel_group=topology.data_parallel_group, mpu=topology.mpu
    ):
        module = make()
    for inner in module.modules():
        # No hook of ZeRO-3 may lie inside what is compiled.
        if isinstance(inner, whole) or getattr(inner, "compiled", False):
            deepspeed.utils.set_z3_leaf_module(inner, True)
    return module


def build_student(
    make: Callable[[], nn.Module],
    ds_config: dict[str, Any],
    make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
    topology: Topology,
    initialize: Callable[[nn.Module], None] | None = None,
) -> StudentEngine:
    """Build the student and its engine from a resolved DeepSpeed configuration (`ds_config.resolve`). Collective.

    `make` builds the module; `initialize` then sets the weights (it must work on partitioned parameters);
    `make_optimizer` gets (name, parameter) of everything that trains. Shapes of partitioned parameters are read with
    `shards.full_shape`.
    """
    import deepspeed

    module = construct(make, ds_config, topology)
    if initialize is not None:
        initialize(module)
    optimizer = make_optimizer([(name, p) for name, p in module.named_parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=ds_config, mpu=topology.mpu, dist_init_required=False
    )
    student = StudentEngine(engine, ds_config, topology)
    flat_step.bind(student)
    student.check_layout()
    gradient_norm.bind(engine.optimizer)
    bind(student)
    return student
