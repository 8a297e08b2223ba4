"""Models of plain layers, and the same ones of megatron-core's at one rank."""

import copy

import pytest
import tiny_models
import torch

from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import WholeLinear, undivided
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Student, Teacher


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_an_undivided_model_has_the_same_values(name: str) -> None:
    """The same parameters by name, order and shape; of the same initial weights the same features, bit by bit."""
    config, batch = tiny_models.model(name), tiny_models.batch(name, padded=not name.endswith("vision"))
    divided = Teacher(copy.deepcopy(config), None, TeacherParts())
    with undivided():
        whole = Teacher(config, None, TeacherParts())
        student = Student(config)
    assert not any(isinstance(module, WholeLinear) for module in divided.modules())
    assert any(isinstance(module, WholeLinear) for module in whole.modules())
    assert not any(hasattr(parameter, "tensor_model_parallel") for parameter in student.parameters())
    for model in (divided, whole):
        initialize(model, 3)
    ours, theirs = dict(whole.named_parameters()), dict(divided.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    layers = list(range(config.backbone.depth))
    found = zip(whole.features(batch, None, layers), divided.features(batch, None, layers), strict=True)
    assert all(torch.equal(one, other) for one, other in found)
