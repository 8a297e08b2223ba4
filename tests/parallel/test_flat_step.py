"""A step without copies is DeepSpeed's, bit by bit, and whoever reads gradients beside the masters finds them."""

import logging
from typing import Any

import pytest
import tiny_models
import torch

from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.optim import MuonConfig, OptimConfig, make_optimizer, parameter_groups
from d2v_scale.parallel import ds_config, flat_step, gradient_norm, groups
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.parallel.zero import StudentEngine, build_student
from d2v_scale.pretraining.diagnostics import StepDiagnostics

pytestmark = pytest.mark.usefixtures("world_of_one")


def engine(stage: int, precision: str, clip: float, *, muon: bool = False, offload: bool = False) -> StudentEngine:
    numbers = ds_config.RecipeNumbers(precision=precision, accumulation=2, clip=clip)  # type: ignore[arg-type]
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = ds_config.resolve({"zero_optimization": zero}, numbers, ParallelConfig(), 1)
    optim = OptimConfig(decay_on="matrices", lr=1e-2, muon=MuonConfig() if muon else None)
    return build_student(
        lambda: Student(tiny_models.model("v1_speech")),
        config,
        lambda named: make_optimizer(parameter_groups(named, optim), optim),
        groups.single_process(),
        lambda module: initialize(module, 1),
    )


def trained(
    student: StudentEngine, losses: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> tuple[list[torch.Tensor], list[Any]]:
    """Weights and moments after steps whose losses have these factors; the norms and figures of each."""
    diagnostics = StepDiagnostics(student, depth=2)
    said: list[Any] = []
    batch = tiny_models.batch("v1_speech")
    for number, factor in enumerate(losses):
        if number == 1:
            diagnostics.arm()
        for _ in range(2):
            student.backward(student(batch, Draw(1, number)).predictions_nd.float().square().mean() * factor)
        result = student.step()
        assert result.applied is (factor < float("inf"))
        said.append(result.grad_norm)
        if number == 1 and result.applied:
            said.append({name: float(value) for name, value in diagnostics.figures(result.grad_norm).items()})
    states = [value for master in student.masters() for value in (master, *student.optimizer.state[master].values())]
    found = [value.detach().clone() for value in [*states, *student.module.parameters()]]
    student.destroy()
    return found, said


CASES: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    ({"stage": 1, "precision": "fp32", "clip": 0.01}, (1.0, 1.0, 1.0)),
    ({"stage": 1, "precision": "fp32", "clip": 1e6}, (1.0, float("inf"), 1.0)),
    ({"stage": 2, "precision": "fp32", "clip": 0.01}, (1.0, 1.0, 1.0)),
    ({"stage": 1, "precision": "fp32", "clip": 0.01, "muon": True}, (1.0, 1.0, 1.0)),
    ({"stage": 1, "precision": "bf16", "clip": 0.01}, (1.0, float("inf"), 1.0)),
    ({"stage": 2, "precision": "bf16", "clip": 0.01}, (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(("options", "losses"), CASES, ids=str)
def test_weights_moments_and_figures_are_those_of_deepspeeds_step(
    options: dict[str, Any], losses: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    its = flat_step._fused
    monkeypatch.setattr(flat_step, "_fused", lambda *given: called.append(1) or its(*given))  # type: ignore[func-returns-value]
    found, said = trained(engine(**options), losses)
    assert called
    monkeypatch.setattr(flat_step, "bind", lambda _: None)
    monkeypatch.setattr(gradient_norm, "bind", lambda _: None)
    expected, its_said = trained(engine(**options), losses)
    assert said == its_said
    assert len(found) == len(expected)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


def test_pieces_that_cut_a_vector_are_stepped_as_the_whole() -> None:
    """Sizes that are no multiple of the kernel's vectors."""
    student = engine(1, "fp32", 0.0)
    master, group = student.masters()[0], student.optimizer.param_groups[0]
    group = {**group, "lr": 1e-2}
    gradient = torch.randn(master.numel(), generator=torch.Generator().manual_seed(0))
    sizes, left = [16, 3, 2, 200, 0, 37, 1, 31, 64], master.numel()
    pieces = gradient.split([*sizes, left - sum(sizes)])
    before = master.detach().clone()
    whole, moments = before.clone(), [torch.zeros_like(before) for _ in range(2)]
    flat_step._fused((whole, *moments), [(0, gradient)], torch.tensor(1.0), group)
    step = flat_step._FlatStep(student)
    flat_step._begin(student.optimizer.state[master], master.data)
    with torch.no_grad():
        step._step_pieces(master, master.data, list(pieces), None, group)
    assert all(flat_n.numel() % 16 == 0 for _, flat_n in flat_step._uncut(list(pieces), left)[:-1])
    assert torch.equal(master.data, whole)
    state = student.optimizer.state[master]
    assert torch.equal(state["exp_avg"], moments[0])
    assert torch.equal(state["exp_avg_sq"], moments[1])
    student.destroy()


def test_masters_in_fp32_are_the_weights_and_others_their_own() -> None:
    for precision, offload, shared in (("fp32", False, True), ("fp32", True, False), ("bf16", False, False)):
        student = engine(1, precision, 0.0, offload=offload)
        weights = {parameter.untyped_storage().data_ptr() for parameter in student.module.parameters()}
        masters = {master.untyped_storage().data_ptr() for master in student.masters()}
        assert (masters <= weights) is shared
        student.destroy()


def test_another_deepspeed_steps_by_itself_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flat_step, "_EXPECTED", {**flat_step._EXPECTED, "step": "of another version"})
    monkeypatch.setattr(flat_step, "_warned", False)
    monkeypatch.setattr(flat_step, "_fused", lambda *_: pytest.fail("is not asked"))
    with caplog.at_level(logging.WARNING, logger="d2v_scale.train"):
        _, said = trained(engine(1, "fp32", 0.01))
        trained(engine(1, "fp32", 0.01))
    assert said[0] > 0
    assert sum("for which its step on a CPU was replaced" in record.message for record in caplog.records) == 1
