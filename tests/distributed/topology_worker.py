"""One rank: small models trained through the real step in several topologies (`topology_worker.py CASES.json`).

Each case ends in a checkpoint that also holds the loss and gradient norm of every step.
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tiny_models
import torch
import torch.distributed as dist
from rank_cases import run_cases

from d2v_scale.batch import Batch
from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.data.paired import joined
from d2v_scale.data2vec.config import EmaConfig, LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.evaluation.held_out import HeldOutSet
from d2v_scale.evaluation.views import VIEWS
from d2v_scale.interop.encoder_source import EncoderSource
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Teacher
from d2v_scale.optim import MuonConfig, OptimConfig, set_rates
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.feed import SharedFeed
from d2v_scale.pretraining.engines import build_engines, read_encoder
from d2v_scale.pretraining.step import collapse_statistics, train_step
from d2v_scale.recipe import Recipe
from d2v_scale.spikes import SpikeConfig
from d2v_scale.teacher.config import TeacherConfig

SAMPLES = 8
SHARES = 4
"""Micro-batches of a step over all replicas, the same in every topology."""


def recipe_of(case: dict) -> Recipe:
    name = case["model"]
    model = tiny_models.model(name, depth=4, drop_path=0.2)
    model.activation_checkpointing = case.get("checkpointing", False)
    target = dataclasses.replace(tiny_models.target_of(name), top_k_layers=3, **case.get("target", {}))
    further = [TargetConfig(**one) for one in case.get("further", [])]
    tokens = max(stem.extra_token_count for stem in model.stems.values())
    other = case.get("teacher") == "checkpoint"  # of another width than the CLS term compares
    cls_weight = 0.5 if model.visible_only and tokens and not other else 0.0
    loss = LossConfig(cls_weight=cls_weight, koleo_weight=case.get("koleo", 0.0), koleo_group=SAMPLES // SHARES)
    return Recipe(
        model=model,
        objective=ObjectiveConfig(
            masking=MaskingConfig(kind="random", clones=clones(name)),
            target=target,
            further_targets=further,
            loss=loss,
            ema=EmaConfig(start=0.9, end=0.9),
        ),
        optim=OptimConfig(
            lr=1e-3,
            schedule="constant",
            max_steps=100,
            eps=1e-4,
            clip=0.05,
            lr_scale=case.get("lr_scale"),
            muon=MuonConfig() if case.get("muon") else None,
        ),
        teacher=TeacherConfig(
            kind=case.get("teacher", "ema"),
            model=other_model(name) if other else None,
            placement=case.get("placement", "device"),
        ),
        parallel=groups.ParallelConfig(tensor=case.get("tensor", 1), pipeline=case.get("pipeline", 1)),
        accumulation=case["accumulation"],
    )


def other_model(name: str) -> ModelConfig:
    """A teacher of another width and depth."""
    return tiny_models.model(name, width=48, ffn=64, depth=3)


def other_encoder(name: str) -> dict[str, torch.Tensor]:
    """Its weights, the same in every topology."""
    with undivided():
        module = Teacher(other_model(name), None, TeacherParts())
    initialize(module, seed=7)
    return {key: parameter.detach() for key, parameter in module.named_parameters()}


def clones(name: str) -> int:
    return 2 if name.startswith("v2") else 1


def micro_batches(name: str, step: int, topology: groups.Topology, accumulation: int) -> list[Batch]:
    whole = tiny_models.batch(name, samples=SAMPLES, clones=clones(name), padded="vision" not in name, seed=step)
    return [
        part_of(whole, micro * topology.data_parallel_size + topology.data_parallel_rank)
        for micro in range(accumulation)
    ]


def held_out_batches(name: str, reading: int = 0) -> list[Batch]:
    """Three, which two replicas share unevenly. `reading`: as if under other masks."""
    return [
        tiny_models.batch(
            name, samples=size, clones=clones(name), padded="vision" not in name, seed=50 + size + 100 * reading
        )
        for size in (5, 3, 4)
    ]


def part_of(batch: Batch, index: int) -> Batch:
    share = SAMPLES // SHARES
    if batch.parts:
        own = tuple(part_of_one(part, index) for part in batch.parts)
        return joined(own, batch.modality, source=batch.source)
    rows, samples = share * batch.clones, slice(index * share, (index + 1) * share)
    return dataclasses.replace(
        batch,
        inputs=batch.inputs[samples],
        valid=None if batch.valid is None else batch.valid[samples],
        real_bt=None if batch.real_bt is None else batch.real_bt[samples],
        student_inputs=None if batch.student_inputs is None else batch.student_inputs[samples],
        masked_rt=batch.masked_rt[index * rows : (index + 1) * rows],
        sample_ids=batch.sample_ids[samples],
        layout=None,
    )


def part_of_one(part: Batch, index: int) -> Batch:
    """The same of one stem's part of paired samples, whose layout says what is hidden."""
    assert part.present_b is not None
    assert part.hidden_r is not None
    share = SAMPLES // SHARES
    samples = slice(index * share, (index + 1) * share)
    rows = slice(samples.start * part.clones, samples.stop * part.clones)
    masked_rt = part.masked_rt
    if part.layout.visible_rs is not None:
        masked_rt = torch.ones_like(masked_rt).scatter(1, part.layout.visible_rs, False)
    plain = dataclasses.replace(
        part,
        inputs=part.inputs[samples],
        valid=None if part.valid is None else part.valid[samples],
        student_inputs=None if part.student_inputs is None else part.student_inputs[samples],
        masked_rt=masked_rt[rows],
        real_bt=None,
        sample_ids=part.sample_ids[samples],
        layout=None,
    )
    return tiny_models.part_of_pairs(plain, part.present_b[samples], part.hidden_r[rows])


def run(case: dict, topology: groups.Topology) -> None:
    recipe = recipe_of(case)
    assert topology.data_parallel_size * recipe.accumulation == SHARES, case
    precision = case.get("precision", "fp32")
    numbers = ds_config.RecipeNumbers(precision=precision, accumulation=recipe.accumulation, clip=recipe.optim.clip)
    raw = {"zero_optimization": {"stage": case.get("stage", 1), **case.get("zero", {})}}
    config = ds_config.resolve(raw, numbers, recipe.parallel, topology.world_size)
    student, teacher = build_engines(recipe, config, topology)
    if recipe.teacher.kind == "checkpoint":
        read_encoder(teacher, EncoderSource(Path("other"), recipe, other_encoder(case["model"]).get))
    if "load" in case:
        training.restore(Checkpoint.open(case["load"]), student, teacher)
    student.watch_spikes(SpikeConfig(on_spike="skip"))
    student.module.train()
    first, last = case["steps"]
    steps = (micro_batches(case["model"], step, topology, recipe.accumulation) for step in range(first, last))
    # Who does not read gets its batches from the rank that does.
    reads = topology.model_size == 1 or dist.get_rank(topology.model_group) == 0
    feed = SharedFeed(steps if reads else iter(()), topology)
    held_out = None
    if case["model"] not in tiny_models.PAIRS:
        targets = recipe.built_targets()[tiny_models.modality_of(case["model"])]
        held_out = HeldOutSet(
            held_out_batches(case["model"]), student, teacher, recipe.objective.loss, targets,
            redrawn=[held_out_batches(case["model"], n) for n in range(1, VIEWS // clones(case["model"]))],
        )  # fmt: skip
    losses, norms, figures, held_out_figures = [], [], {}, {}
    for step in range(first, last):
        if step == last - 1 and held_out is not None:  # not after it: training goes on as if nothing had been measured
            held_out_figures = held_out.figures()
        set_rates(student.optimizer, recipe.optim, student.completed_updates)
        batches = next(feed)
        if step == case.get("poisoned_step") and topology.data_parallel_rank == 0:
            batches[-1].of_stems[0].inputs.fill_(float("nan"))
        if "sleeps" in case and step == last - 1:
            delay_passes(student.pipeline_stage, case["sleeps"][topology.pipeline_rank])
        result, seen = train_step(student, teacher, batches, recipe.objective, Draw(1, step), observe=True)
        assert result.applied == (step != case.get("poisoned_step")), f"step {step}: {result}"
        if not result.applied:
            continue
        figures = {name: float(value) for name, value in collapse_statistics(seen, topology).items()}
        losses.append(figures.pop("loss"))
        norms.append(result.grad_norm)
    figures |= held_out_figures | {name: float(value) for name, value in teacher.health().items()}
    figures |= {
        f"feature {i}": float(x.double().square().sum()) for i, x in enumerate(evaluate(student, teacher, case))
    }
    replicated_parameters_agree(case, student, topology)
    spikes_are_judged_alike(student, losses, norms)
    extra = {"losses": losses, "norms": norms, "figures": figures, "idle_shares": getattr(student, "idle_shares", [])}
    writer = CheckpointWriter.create(Path(case["out"]), CheckpointConfig(peer_timeout=30))
    writer.save(last, training.pieces(student, teacher), training.state(student, teacher), extra)
    assert writer.finish(), writer.poll()
    teacher.destroy()
    student.destroy()


def spikes_are_judged_alike(student, losses: list[float], norms: list[float]) -> None:
    """Every rank of any topology judges by the step's whole loss and norm, and bit for bit by the same."""
    if not losses:
        return  # a run that only reads a checkpoint
    (known,) = student.spikes.rule.state_dict().values()
    np.testing.assert_allclose(known["loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(known["gradient norm"], norms, rtol=1e-6)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, known)
    assert all(one == known for one in everyone), everyone


def delay_passes(stage, seconds: float) -> None:
    """Make every forward pass of this stage take that much longer."""
    run_micro_batch = stage._run

    def slowly(*args):
        time.sleep(seconds)
        return run_micro_batch(*args)

    stage._run = slowly


def evaluate(student, teacher, case: dict) -> list[torch.Tensor]:
    """Hidden states of an evaluation batch, as the in-training probe asks for them."""
    batch = tiny_models.batch(case["model"], samples=2, seed=99)
    shared = None
    owned = all(teacher.module.owns_features(part.modality) for part in batch.of_stems)
    if teacher.module.section.starts and not owned:
        student.module.eval()
        with torch.no_grad():
            shared = student.module.stem_features(batch)
        student.module.train()
    return teacher.encoder_features(batch, shared, [0, -1])


def replicated_parameters_agree(case: dict, student, topology: groups.Topology) -> None:
    """Bitwise over the tensor-parallel ranks: a missing gradient reduction lets copies drift apart unseen."""
    if topology.tensor_size == 1 or student.stage == 3:
        return
    for name, parameter in student.module.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            copies = [torch.empty_like(parameter.data) for _ in range(topology.tensor_size)]
            dist.all_gather(copies, parameter.data.contiguous(), group=topology.mpu.get_tensor_model_parallel_group())
            assert all(torch.equal(copies[0], other) for other in copies), f"{case['name']}: {name} drifts apart"


if __name__ == "__main__":
    run_cases(run)
