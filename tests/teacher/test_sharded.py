"""The teacher beside its student, both in their engines."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch

from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import EmaTeacher, ShardedTeacher


def engines(
    name: str, stage: int, precision: str, topology: groups.Topology, teacher: TeacherConfig | None = None
) -> tuple[StudentEngine, EmaTeacher]:
    recipe = Recipe(
        model=tiny_models.model(name),
        objective=ObjectiveConfig(target=tiny_models.target_of(name)),
        teacher=teacher or TeacherConfig(),
    )
    numbers = ds_config.RecipeNumbers(precision=precision)
    config = ds_config.resolve({"zero_optimization": {"stage": stage}}, numbers, recipe.parallel, 1)
    return build_engines(recipe, config, topology)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["v1_vision", "v2_vision", "v2_speech"])
def test_tables_are_not_rounded_while_zero3_builds_in_bf16(name: str, stage: int) -> None:
    """Positions were computed in bf16 at stage 3: the teacher's, and at stages 1 and 2 not the student's."""
    student, teacher = engines(name, stage, "bf16", groups.single_process())
    plain = dict(Student(tiny_models.model(name)).named_buffers())
    assert plain
    for module in (student.module, teacher.module):
        found = dict(module.named_buffers())
        assert found.keys() <= plain.keys()
        assert all(torch.equal(table.cpu(), plain[name].to(table.dtype)) for name, table in found.items())
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
def test_gathers_wait_for_every_update_but_not_for_the_students_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `overlap_comm` the gathers waited for all that the student had queued; with it, for no update."""
    placed = TeacherConfig(placement="cpu")  # ZeRO-3 moves the parameters here, so there is an engine in a world of one
    student, teacher = engines("v1_text", 1, "fp32", groups.single_process(), placed)
    assert isinstance(teacher, ShardedTeacher)
    assert teacher._engine is not None
    assert teacher._gather_stream is None, "a CPU has no streams"
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the default stream")
    teacher._gather_stream = SimpleNamespace(wait_stream=waits.append)
    batch = tiny_models.batch("v1_text", 2, 2, padded=True)
    for passes in (1, 2):
        teacher.features(batch, None, [-1])
        assert waits == ["the default stream"], f"{passes} passes after one writing"
    student.completed_updates += 1
    teacher.update(0.5)
    teacher.features(batch, None, [-1])
    teacher.finish_loading(1)
    teacher.features(batch, None, [-1])
    assert len(waits) == 3
    teacher._gather_stream = None
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_data_parallel_rank_has_a_teacher_without_zero3(precision: str) -> None:
    """In a world of one ZeRO-3 had the host wait for the device before every module of the teacher."""
    student, teacher = engines("v1_vision", 3, precision, groups.single_process())
    assert isinstance(teacher, ShardedTeacher)
    assert teacher._engine is None
    before = {name: parameter.detach().clone() for name, parameter in teacher.module.named_parameters()}
    assert all(parameter.numel() and not hasattr(parameter, "ds_id") for parameter in teacher.module.parameters())
    with torch.no_grad():
        for shard in student.shards():
            shard.weight.add_(1.0)
    student.completed_updates += 1
    teacher.update(0.75)
    for name, parameter in teacher.module.named_parameters():
        torch.testing.assert_close(
            parameter, before[name] + 0.25, rtol=1e-2 if precision == "bf16" else 1e-6, atol=1e-6
        )
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
def test_an_offloaded_optimizers_values_come_in_groups() -> None:
    """A teacher on a GPU copied them parameter by parameter, and the host waited for each."""
    student, teacher = engines("v1_text", 3, "fp32", groups.single_process())
    groups_of: list[int] = []  # their sizes

    def bring(group: list[torch.Tensor]) -> list[torch.Tensor]:
        groups_of.append(len(group))
        return [values + 1 for values in group]

    teacher._host_source = SimpleNamespace(bring=bring)  # type: ignore[assignment]
    before = {name: parameter.detach().clone() for name, parameter in teacher.module.named_parameters()}
    teacher.measure()
    student.completed_updates += 1
    teacher.update(0.75)
    averaged, averaged_again, copied = groups_of
    assert averaged == averaged_again == len(before) - copied
    for shard in teacher.shards():
        moved = 0.25 if shard.averaged else 1.0
        torch.testing.assert_close(shard.values, before[shard.name].flatten() + moved)
    assert teacher.health()["teacher_update_norm"] > 0
    teacher.destroy()
    student.destroy()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("placement", ["device", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forward_pass_waits_for_a_slow_update(
    precision: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 gathered the teacher's weights on a stream that did not wait for their update."""
    # As with more ranks: alone the teacher needs no engine.
    monkeypatch.setattr("d2v_scale.teacher.sharded._needs_engine", lambda *_: True)
    topology = groups.single_process()
    student, teacher = engines("v1_text", 1, precision, topology, TeacherConfig(placement=placement))
    batch = tiny_models.batch("v1_text", 2, 2, padded=True).to(topology.device)
    for _ in range(3):  # until DeepSpeed knows what comes next, and fetches ahead
        teacher.features(batch, None, [-1])
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.mul_(1.5)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    student.completed_updates = 1
    teacher.update(0.0)
    at_once = teacher.features(batch, None, [-1])[0].clone()
    torch.cuda.synchronize()
    assert torch.equal(at_once, teacher.features(batch, None, [-1])[0])
    teacher.destroy()
    student.destroy()
