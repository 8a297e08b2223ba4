"""Norms that are taken without copies are the same, and so is the step."""

import pytest
import tiny_models
import torch

from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.optim import OptimConfig, make_optimizer, parameter_groups
from d2v_scale.parallel import ds_config, gradient_norm, groups
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.parallel.zero import StudentEngine, build_student

pytestmark = pytest.mark.usefixtures("world_of_one")


def engine(stage: int, precision: str, clip: float) -> StudentEngine:
    topology = groups.single_process()
    numbers = ds_config.RecipeNumbers(precision=precision, accumulation=2, clip=clip)  # type: ignore[arg-type]
    config = ds_config.resolve({"zero_optimization": {"stage": stage}}, numbers, ParallelConfig(), topology.world_size)
    optim = OptimConfig(decay_on="matrices", lr=1e-2)
    return build_student(
        lambda: Student(tiny_models.model("v1_text")),
        config,
        lambda named: make_optimizer(parameter_groups(named, optim), optim),
        topology,
        lambda module: initialize(module, 1),
    )


def stepped(student: StudentEngine) -> tuple[list[torch.Tensor], list[float]]:
    """Weights and moments after three steps, and the norms of their gradients."""
    batch, norms = tiny_models.batch("v1_text"), []
    for number in range(3):
        for _ in range(2):
            student.backward(student(batch, Draw(1, number)).predictions_nd.float().square().mean())
        result = student.step()
        assert result.applied
        norms.append(result.grad_norm)
    states = [value for master in student.masters() for value in (master, *student.optimizer.state[master].values())]
    found = [value.detach().clone() for value in [*states, *student.module.parameters()]]
    student.destroy()
    return found, norms


@pytest.mark.parametrize(("stage", "precision", "clip"), [(1, "fp32", 0.01), (2, "fp32", 1e3), (1, "bf16", 0.01)])
def test_the_step_is_the_one_with_gradients_copied_to_doubles(
    stage: int, precision: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    its = gradient_norm.filled
    monkeypatch.setattr(gradient_norm, "filled", lambda *given: measured.append(1) or its(*given))  # type: ignore[func-returns-value]
    found, norms = stepped(engine(stage, precision, clip))
    assert measured
    assert clip != 0.01 or max(norms) > clip
    monkeypatch.setattr(gradient_norm, "bind", lambda _: None)
    expected, its_norms = stepped(engine(stage, precision, clip))
    assert norms == its_norms
    assert len(found) == len(expected)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "sizes", [[], [0, 1], [7, 3 * gradient_norm.CHUNK + 5, 9], [gradient_norm.CHUNK, 64 * 200 + 3]]
)
def test_squares_are_those_in_double_precision(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) * 1e-3 for size in sizes]
    expected = sum((x.double().square().sum() for x in gradients), torch.zeros((), dtype=torch.float64))
    for exact, difference in ((True, 1e-13), (False, 1e-7)):
        found = gradient_norm._Squares(exact=exact).sum(gradients)
        torch.testing.assert_close(found, expected, rtol=difference, atol=0)
        assert gradient_norm._Squares(exact=exact).sum([torch.full((64 * 128,), float("inf"))]) == float("inf")


def test_a_step_that_is_not_finite_leaves_nothing_for_the_next() -> None:
    student = engine(1, "fp32", 0.01)
    batch = tiny_models.batch("v1_text")
    for factor, applied in ((1.0, True), (float("inf"), False), (1.0, True)):
        for _ in range(2):
            student.backward(student(batch, Draw(1, 0)).predictions_nd.square().mean() * factor)
        before = [parameter.detach().clone() for parameter in student.module.parameters()]
        assert student.step().applied is applied
        changed = any(not torch.equal(x, p) for x, p in zip(before, student.module.parameters(), strict=True))
        assert changed is applied
        assert all(parameter.isfinite().all() for parameter in student.module.parameters())
    assert student.adam_steps() == {2}
    student.destroy()


def test_another_deepspeed_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_norm, "digest", lambda _: "of a later version")
    monkeypatch.setattr(gradient_norm, "_Squares", lambda **_: pytest.fail("is not asked"))
    _, norms = stepped(engine(1, "fp32", 0.01))
    assert min(norms) > 0
