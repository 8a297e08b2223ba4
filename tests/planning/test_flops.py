"""FLOPs on paper against FLOPs counted in real forward and backward passes."""

from math import prod

import pytest
import tiny_models
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2v_scale import command_line
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.modalities import published_parts
from d2v_scale.modalities.costs import Lengths
from d2v_scale.model import cpu_ops
from d2v_scale.model.stack import Draw, Student, Teacher
from d2v_scale.planning import flops
from d2v_scale.recipe import Recipe

pytestmark = pytest.mark.usefixtures("world_of_one")


def recipe_of(name: str) -> Recipe:
    return command_line.parse([f"--recipe={name}"])[0]


def conv_backward_flops(
    grad_out_shape,
    x_shape,
    w_shape,
    _bias,
    _stride,
    _padding,
    _dilation,
    transposed,
    _output_padding,
    groups,
    mask,
    *_,
    **__,
) -> int:
    """torch's own formula takes every output channel of a grouped convolution to read every input channel."""
    assert not transposed
    del groups
    once = 2 * x_shape[0] * prod(grad_out_shape[2:]) * prod(w_shape)
    return once * (int(mask[0]) + int(mask[1]))


def counted(run) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops})
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_flops_on_paper_are_those_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter knows torch's own operators only.
    monkeypatch.setattr(cpu_ops, "applies", lambda x: False)
    samples = 2
    clones = 3 if name.startswith("v2") else 1
    batch = tiny_models.batch(name, samples=samples, clones=clones)
    model, modality = tiny_models.model(name), tiny_models.modality_of(name)
    parts = published_parts(model)
    student, teacher = Student(model), Teacher(model, tiny_models.target_of(name), parts)
    for parameter in [*student.parameters(), *teacher.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    rows, length = batch.masked_rt.shape
    masked = float(batch.masked_rt.sum()) / rows
    lengths = Lengths(
        inputs=batch.inputs.shape[-1],
        grid=batch.extents,
        kept=length - round(masked) if model.visible_only else length,
        masked=masked,
        extra=batch.extra_tokens,
        clones=clones,
    )
    cost = flops.sample_cost(model, modality, lengths, parts)

    # The fused CPU kernel is not in the counter's table; the plain one is two batched products.
    with sdpa_kernel(SDPBackend.MATH):
        forward = counted(lambda: student(batch, Draw(0, 0)))
        output = student(batch, Draw(0, 0))
        backward = counted(output.predictions_nd.square().sum().backward)
        targets = counted(lambda: teacher(batch, output.features_btd))

    assert forward == pytest.approx(samples * sum(one.forward for one in cost.layers), rel=0.01)
    assert backward == pytest.approx(samples * sum(one.backward for one in cost.layers), rel=0.01)
    assert targets == pytest.approx(samples * sum(one.teacher for one in cost.layers), rel=0.01)
    assert cost.total == pytest.approx(sum(one.total for one in cost.layers))


def test_known_cost_of_a_base_image_encoder() -> None:
    """ViT-B/16 at 224 pixels is 17.6 GMAC a forward pass (DeiT's table, with the classifier's 0.8 M)."""
    cost = flops.cost_of(recipe_of("d2v2_vision_base"), "vision")
    patches = next(one.teacher for one in cost.layers if one.layer.kind == "features")
    assert (cost.teacher + patches) / 2 == pytest.approx(17.58e9, rel=0.01)


def test_the_shared_stem_counts_once_and_clones_share_the_teacher() -> None:
    recipe = recipe_of("d2v2_speech_base")
    cost = flops.cost_of(recipe, "speech", 10 * SAMPLE_RATE)
    features = next(one for one in cost.layers if one.layer.kind == "features")
    assert features.teacher == 0
    recipe.objective.masking.clones *= 2
    doubled = flops.cost_of(recipe, "speech", 10 * SAMPLE_RATE)
    assert doubled.teacher == cost.teacher
    assert doubled.student == 2 * cost.student
    assert doubled.decoder == 2 * cost.decoder


def test_utilisation_is_useful_work_over_the_peak() -> None:
    cost = flops.cost_of(recipe_of("d2v2_vision_base"), "vision")
    used = flops.mfu(cost, samples_per_second=8 * 1e12 / cost.total, devices=8, peak_flops=4e12)
    assert used.total == pytest.approx(0.25)
    assert used.student_only == pytest.approx(0.25 * cost.student_only / cost.total)
