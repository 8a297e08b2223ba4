"""A recipe on some processes with a DeepSpeed configuration: the numbers that memory, traffic and time are made of."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from d2v_scale.data.config import SAMPLE_RATE, SourceConfig
from d2v_scale.modalities.costs import Lengths
from d2v_scale.networks.layers import describe
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.config import ParallelConfig, data_parallel_size
from d2v_scale.parallel.shards import global_shapes
from d2v_scale.planning import flops, legal, stages
from d2v_scale.recipe import Recipe


@dataclass(frozen=True)
class TensorSize:
    """One parameter."""

    name: str
    numel: int
    """Of the whole tensor."""
    sliced: bool
    """Divided over the tensor-parallel ranks."""

    def local(self, tensor: int) -> int:
        """Elements on each of `tensor` ranks."""
        return self.numel // tensor if self.sliced else self.numel


@dataclass(frozen=True)
class ModelSizes:
    """The parameters of a recipe's student and teacher, in the order of the modules."""

    student: tuple[TensorSize, ...]
    teacher: tuple[TensorSize, ...]
    decayed: frozenset[str]
    """Names of the student's matrices, which the optimizer may keep in a group of their own."""

    @classmethod
    def of(cls, recipe: Recipe) -> "ModelSizes":
        """Read from modules on the meta device, which hold no values. Process groups must be formed."""
        with torch.device("meta"):
            student = Student(recipe.model, target_widths=recipe.target_widths())
            teacher = Teacher(recipe.teacher.model_beside(recipe.model), recipe.targets(), recipe.parts())
        return cls(_sizes(student), _sizes(teacher), frozenset(n for n, p in student.named_parameters() if p.dim() > 1))


def _sizes(module: torch.nn.Module) -> tuple[TensorSize, ...]:
    from megatron.core import parallel_state

    shapes = global_shapes(module, parallel_state.get_tensor_model_parallel_world_size())
    sliced = {n for n, p in module.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    return tuple(TensorSize(name, torch.Size(shape).numel(), name in sliced) for name, shape in shapes.items())


@dataclass(frozen=True)
class Job:
    """One way to run a recipe. Only legal ones can be made (`Job.of`)."""

    recipe: Recipe
    world_size: int
    config: dict[str, Any]
    """As DeepSpeed gets it (`ds_config.resolve`)."""
    sizes: ModelSizes
    split: stages.StageSplit
    costs: dict[str, flops.SampleCost]
    lengths: dict[str, Lengths]
    stage_tensors: tuple[tuple[tuple[TensorSize, ...], tuple[TensorSize, ...]], ...]
    """For each pipeline stage the student's parameters and the teacher's."""
    stage_layers: dict[str, tuple[tuple[int, ...], ...]]
    """For each pipeline stage the positions of its layers in `describe`."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        raw: dict[str, Any],
        world_size: int,
        sizes: ModelSizes,
        *,
        auto: Literal["fp32", "bf16"] = "bf16",
    ) -> "Job":
        """Check and complete a combination as training does. `raw`: the DeepSpeed JSON; `auto`: what `precision: auto`
        stands for. Raises ConfigError."""
        config = legal.deepspeed_config(recipe, raw, world_size, auto=auto)
        split = stages.stage_blocks(recipe, recipe.parallel.pipeline, recipe.parallel.tensor)
        costs = {modality: flops.cost_of(recipe, modality) for modality in recipe.sequences}
        lengths = {modality: flops.lengths_of(recipe, modality) for modality in recipe.sequences}

        def in_stage(tensors: tuple[TensorSize, ...], index: int) -> tuple[TensorSize, ...]:
            # One that is another model has its own number of blocks, and no pipeline.
            alone = recipe.parallel.pipeline == 1
            return tensors if alone else tuple(one for one in tensors if split.stage_of(one.name) == index)

        def layers_of(modality: str, index: int) -> tuple[int, ...]:
            layers = enumerate(describe(recipe.model, modality))
            return tuple(position for position, layer in layers if split.stage_of(layer.name) == index)

        indices = range(recipe.parallel.pipeline)
        held = tuple((in_stage(sizes.student, index), in_stage(sizes.teacher, index)) for index in indices)
        run = {modality: tuple(layers_of(modality, index) for index in indices) for modality in costs}
        return cls(recipe, world_size, config, sizes, split, costs, lengths, held, run)

    def varied(self, *, accumulation: int, checkpointing: bool, placement: Literal["device", "cpu"]) -> "Job":
        """The same with another number of micro-batches, other activations kept, the teacher elsewhere. Raises
        ConfigError where it does not fit the batch."""
        recipe = dataclasses.replace(
            self.recipe,
            accumulation=accumulation,
            model=dataclasses.replace(self.recipe.model, activation_checkpointing=checkpointing),
            teacher=dataclasses.replace(self.recipe.teacher, placement=placement),
        )
        recipe.check(self.world_size)
        config = {**self.config, "gradient_accumulation_steps": accumulation}
        return dataclasses.replace(self, recipe=recipe, config=config)

    @property
    def parallel(self) -> ParallelConfig:
        """How the world is divided."""
        return self.recipe.parallel

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return data_parallel_size(self.parallel, self.world_size)

    @property
    def zero(self) -> dict[str, Any]:
        """The ZeRO section of DeepSpeed's configuration."""
        section: dict[str, Any] = self.config["zero_optimization"]
        return section

    @property
    def stage(self) -> int:
        """ZeRO stage of the student."""
        return int(self.zero["stage"])

    @property
    def itemsize(self) -> int:
        """Bytes of a compute weight."""
        return 2 if self.config["bf16"]["enabled"] else 4

    @property
    def teacher_itemsize(self) -> int:
        """Bytes of a weight that the teacher computes with."""
        dtype: Literal["auto", "fp32", "bf16"] = self.recipe.teacher.dtype
        return {"auto": self.itemsize, "fp32": 4, "bf16": 2}[dtype]

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether DeepSpeed keeps the optimizer or the weights in host memory."""
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    @property
    def steps(self) -> dict[str, tuple[str, ...]]:
        """The kinds of steps by name, and the modalities that each reads: one, or with data.mixing together all."""
        if self.recipe.data.mixing == "alternate":
            return {modality: (modality,) for modality in self.costs}
        read = {source.modality for source in self.recipe.data.sources}
        found = tuple(modality for modality in self.costs if modality in read or not read)
        return {" + ".join(found): found}

    def step_samples(self, modality: str) -> float:
        """Samples of the longest length of this modality that are in one optimizer step which reads it."""
        return step_samples(self.recipe, modality, self.lengths[modality])

    def micro_batch(self, modality: str) -> float:
        """Samples of one micro-batch on one data-parallel rank, of the modality's largest source."""
        largest = max(source_samples(self.recipe, modality, self.lengths[modality]))
        return largest / (self.data * self.recipe.rounds)


def source_samples(recipe: Recipe, modality: str, lengths: Lengths) -> list[float]:
    """Samples of the longest length in a step of each of the modality's sources."""
    sources = [source for source in recipe.data.sources if source.modality == modality] or [SourceConfig()]
    sizes = [(one.batch_size or recipe.global_batch_size, one.batch_unit or recipe.batch_unit) for one in sources]
    of_one = {"samples": 1.0, "seconds": lengths.inputs / SAMPLE_RATE, "tokens": float(lengths.inputs)}
    return [size / of_one[unit] for size, unit in sizes]


def step_samples(recipe: Recipe, modality: str, lengths: Lengths) -> float:
    """Samples of the longest length of this modality that are in one optimizer step which reads it."""
    found = source_samples(recipe, modality, lengths)
    return sum(found) if recipe.data.mixing == "together" else max(found)
