"""FLOPs on paper against FLOPs counted in real forward and backward passes."""

from math import prod

import pytest
import tiny_models
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2v_scale import command_line, modalities
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets import Target, build_all, widths
from d2v_scale.modalities import published_parts, target_place
from d2v_scale.modalities.costs import Lengths
from d2v_scale.model import cpu_ops
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
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


NAMES = [*tiny_models.NAMES, *tiny_models.ARRAYS, *tiny_models.PAIRS, "v1_vision+2", "v2_speech+2", "v2_text+1"]


@pytest.mark.parametrize("name", NAMES)
def test_flops_on_paper_are_those_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter knows torch's own operators only.
    monkeypatch.setattr(cpu_ops, "applies", lambda x: False)
    samples = 2
    clones = 3 if name.startswith("v2") else 1
    batch = tiny_models.whole_batch(name, samples, clones)
    model, modality = tiny_models.model(name), tiny_models.modality_of(name)
    parts = published_parts(model)
    student, teacher = Student(model), Teacher(model, tiny_models.target_of(name), parts)
    for parameter in [*student.parameters(), *teacher.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    lengths = tiny_models.lengths_of(model, batch)
    # Of paired samples every part has targets.
    cost = flops.sample_cost(model, modality, lengths, parts, teacher.targets)

    # The fused CPU kernel is not in the counter's table; the plain one is two batched products.
    with sdpa_kernel(SDPBackend.MATH):
        forward = counted(lambda: student(batch, Draw(0, 0), only_read=True))
        output = student(batch, Draw(0, 0), only_read=True)
        squares = torch.stack([found.square().sum() for found in output.predictions])
        backward = counted(squares.sum().backward)
        targets = counted(lambda: teacher.make(batch, output.features_btd, only_read=True))

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


@pytest.mark.parametrize("name", ["v1_text", "v2_vision", "v2_text"])
def test_heads_and_comparisons_with_codes_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What further targets add, on paper and by the counter: two heads, and the work of a codebook and moments."""
    monkeypatch.setattr(cpu_ops, "applies", lambda x: False)
    clones = 2 if name.startswith("v2") else 1
    batch, model = tiny_models.batch(name, samples=2, clones=clones), tiny_models.model(name)
    modality = tiny_models.modality_of(name)
    place = modalities.target_place(model, modality)
    configs = [TargetConfig(top_k_layers=2), TargetConfig(kind="codes", top_k_layers=1, options={"codes": 5})]
    configs.append(TargetConfig(kind="whitened", top_k_layers=1, options={"covariance": "full"}))
    every = build_all(configs, place)
    rows, length = batch.masked_rt.shape
    masked = float(batch.masked_rt.sum()) / rows
    kept = length - round(masked) if model.visible_only else length
    lengths = Lengths(inputs=0, grid=batch.extents, kept=kept, masked=masked, extra=batch.extra_tokens, clones=clones)
    parts = published_parts(model)
    alone, several = (
        flops.sample_cost(model, modality, lengths, parts, some).layers[-1] for some in (every[:1], every)
    )

    def forward(some: tuple[Target, ...]) -> float:
        student = Student(model, target_widths={modality: widths(some)})
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        with sdpa_kernel(SDPBackend.MATH):
            return counted(lambda: student(batch, Draw(0, 0)))

    added = forward(every) - forward(every[:1])
    assert added == pytest.approx(2 * (several.forward - alone.forward), rel=0.01)
    assert alone.teacher == 0
    raw_btd, there_bt = torch.randn(2, length, 32), torch.ones(2, length)

    def work(target: Target) -> float:
        state = target.initial_state()
        return counted(lambda: (target.targets(raw_btd, state), target.statistics(raw_btd, there_bt, state)))

    codes, whitened = (work(target) for target in every[1:])
    assert codes == pytest.approx(2 * length * every[1].flops(), rel=0.05)
    # The counter knows no triangular solve.
    assert whitened == pytest.approx(2 * length * every[2].flops() * 2 / 3, rel=0.05)
    assert several.teacher == length * (every[1].flops() + every[2].flops())


def test_what_another_stem_is_taught_does_not_change_a_stems_cost() -> None:
    """A joint 1.0 model: targets of single positions let the teacher's last block be narrow, for their stem alone."""
    model = tiny_models.model("v1_text")
    batch = tiny_models.whole_batch("v1_text", 2, 1)
    lengths, parts = tiny_models.lengths_of(model, batch), published_parts(model)
    narrow, whole = (
        build_all([TargetConfig(top_k_layers=2, layer_norm=norm, final_norm="layer")], target_place(model, "text"))
        for norm in ("layer", "instance")
    )
    alone = flops.sample_cost(model, "text", lengths, parts, {"text": narrow})
    beside = flops.sample_cost(model, "text", lengths, parts, {"text": narrow, "speech": whole})
    assert beside.total == alone.total < flops.sample_cost(model, "text", lengths, parts, {"text": whole}).total
