"""What student and teacher do with a batch, whatever the modality."""

import dataclasses
import math

import pytest
import tiny_models
import torch
from torch import Tensor

from d2v_scale.batch import Batch, Layout
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.errors import DataError
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.layers import StudentOutput
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")
DRAW = Draw(seed=5, step=7)


def build(config: ModelConfig, name: str) -> tuple[Student, Teacher]:
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), published_parts(config))
    for stack in (student, teacher):
        initialize(stack, 1)
    with torch.no_grad():
        # Away from zero biases and tables, and larger than N(0, .02), so that every path shows.
        generator = torch.Generator().manual_seed(2)
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student, teacher


def masked_targets(batch: Batch, targets_btd: Tensor) -> Tensor:
    return targets_btd.repeat_interleave(batch.clones, dim=0).flatten(0, 1)[batch.layout.masked_n]


def loss_of(batch: Batch, out: StudentOutput, targets_btd: Tensor) -> Tensor:
    width = targets_btd.shape[-1]
    total = loss.masked_loss_sum(out.predictions_nd, masked_targets(batch, targets_btd), LossConfig(), width)
    if out.cls_rd is not None:
        total = total + loss.cls_loss_sum(out.cls_rd, targets_btd, LossConfig(cls_weight=0.1), width)
    return total


def gradients(student: Student, batch: Batch, teacher: Teacher) -> tuple[Tensor, dict[str, Tensor]]:
    student.zero_grad()
    out = student(batch, DRAW)
    value = loss_of(batch, out, teacher(batch, out.features_btd))
    value.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in student.named_parameters()}
    return value.detach(), grads


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("clones", [1, 2])
@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_every_trained_parameter_gets_a_gradient(name: str, clones: int, padded: bool) -> None:
    if name == "v1_text" and clones > 1:
        pytest.skip("1.0 text masks its input tokens: one clone per sample")
    config = tiny_models.model(name)
    student, teacher = build(config, name)
    batch = tiny_models.batch(name, clones=clones, padded=padded)
    out = student(batch, DRAW)
    targets_btd = teacher(batch, out.features_btd)
    assert out.predictions_nd.shape == (int(batch.masked_rt.sum()), 32)
    assert targets_btd.shape == (3, batch.masked_rt.shape[1], 32)
    assert targets_btd.dtype == torch.float32
    loss_of(batch, out, targets_btd).backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_recomputed_blocks_give_the_same_loss_and_gradients(name: str) -> None:
    config = tiny_models.model(name, dropout=0.1, attention_dropout=0.1, drop_path=0.3)
    student, teacher = build(config, name)
    batch = tiny_models.batch(name)
    torch.manual_seed(3)
    value, plain = gradients(student, batch, teacher)
    config.activation_checkpointing = True
    torch.manual_seed(3)
    again, recomputed = gradients(student, batch, teacher)
    assert torch.equal(value, again)
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


@pytest.mark.parametrize("name", ["v2_vision", "v2_speech", "v2_text"])
def test_the_order_of_visible_tokens_does_not_matter(name: str) -> None:
    student, _ = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name, clones=2)
    reference = student(batch, DRAW)
    assert batch.layout.visible_rs is not None
    order = torch.randperm(batch.layout.visible_rs.shape[1])
    shuffled = dataclasses.replace(
        batch, layout=Layout(masked_n=batch.layout.masked_n, visible_rs=batch.layout.visible_rs[:, order])
    )
    out = student(shuffled, DRAW)
    assert torch.allclose(out.predictions_nd, reference.predictions_nd, atol=2e-5)
    assert torch.allclose(out.encoder_rsd, reference.encoder_rsd[:, order], atol=2e-5)


@pytest.mark.parametrize("name", ["v2_vision", "v2_speech", "v2_text"])
def test_clones_share_one_teacher_pass_and_its_targets(name: str) -> None:
    _, teacher = build(tiny_models.model(name), name)
    student, _ = build(tiny_models.model(name), name)
    seen: list[int] = []
    teacher.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    one, many = tiny_models.batch(name, clones=1), tiny_models.batch(name, clones=4)
    assert many.masked_rt.shape[0] == 12
    targets = [teacher(batch, student(batch, DRAW).features_btd) for batch in (one, many)]
    assert seen == [3, 3]
    assert torch.equal(targets[0], targets[1])


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_the_teacher_has_no_gradient_stays_in_eval_and_is_deterministic(name: str) -> None:
    config = tiny_models.model(name, dropout=0.5, attention_dropout=0.5, drop_path=0.5, layer_drop=0.9)
    student, teacher = build(config, name)
    student.eval()
    batch = tiny_models.batch(name)
    features = student.stem_features(batch)
    before = teacher(batch, features)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    after = teacher(batch, features)
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_no_attention_mask_where_none_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Tensor, attn_mask: Tensor | None = None, **kwargs: float) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    student, teacher = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name)
    teacher(batch, student(batch, DRAW).features_btd)
    biased = name in ("v1_vision", "v2_speech")
    assert all((mask is not None) == biased for mask in masks)
    if name == "v1_vision":
        assert all(mask is not None and mask.shape[0] == 1 for mask in masks)


@pytest.mark.parametrize("name", ["v1_text", "v2_text"])
def test_a_padded_row_is_encoded_as_if_it_were_alone_and_unpadded(name: str) -> None:
    student, _ = build(tiny_models.model(name), name)
    padded = tiny_models.batch(name, padded=True)
    assert padded.valid is not None
    out = student(padded, DRAW)
    row, length = 1, int(padded.valid[1].sum())
    assert length < padded.valid.shape[1]
    alone = dataclasses.replace(
        padded,
        inputs=padded.inputs[row : row + 1, :length],
        valid=None,
        student_inputs=None if padded.student_inputs is None else padded.student_inputs[row : row + 1, :length],
        masked_rt=padded.masked_rt[row : row + 1, :length],
        sample_ids=padded.sample_ids[row : row + 1],
        layout=None,
    )
    single = student(alone, DRAW).encoder_rsd[0]
    # Positions are ascending and padding comes last.
    assert torch.allclose(out.encoder_rsd[row, : single.shape[0]], single, atol=1e-5)


@pytest.mark.parametrize("name", ["v1_speech", "v2_speech"])
def test_frames_of_padding_follow_the_conv_formula_and_are_no_attention_keys(name: str) -> None:
    student, _ = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name, padded=True)
    assert batch.valid is not None
    valid_bt = student.valid_positions(batch)
    assert valid_bt is not None
    for row in range(3):
        frames = int(batch.valid[row].sum())
        for _, kernel, stride in tiny_models.CONVS:
            frames = (frames - kernel) // stride + 1
        assert valid_bt[row].tolist() == [True] * frames + [False] * (19 - frames)
    keys: list[Tensor] = []
    student.requires_grad_(False)  # so that the bias is one tensor
    for block in student.blocks:
        block.register_forward_pre_hook(lambda module, args: keys.append(args[1]))
    student(batch, DRAW)
    visible = batch.layout.visible_rs
    expected = valid_bt if name == "v1_speech" or visible is None else valid_bt.gather(1, visible)
    for mask in keys:
        seen = mask if mask.dtype == torch.bool else mask > -math.inf
        assert torch.equal(seen[:, 0, 0], expected)


@pytest.mark.parametrize("name", ["v2_vision", "v2_speech", "v2_text"])
def test_clones_with_the_same_mask_get_their_own_noise(name: str) -> None:
    student, _ = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name, samples=1, clones=2)
    batch = dataclasses.replace(batch, masked_rt=batch.masked_rt[:1].expand(2, -1), layout=None)
    first, second = student(batch, DRAW).predictions_nd.chunk(2)
    assert not torch.allclose(first, second, atol=1e-5)
    noise = torch.zeros(2, batch.masked_rt.shape[1], 32)
    first, second = student(batch, DRAW, noise).predictions_nd.chunk(2)
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_a_row_does_not_depend_on_its_neighbours_even_with_drop_path_and_noise(name: str) -> None:
    student, _ = build(tiny_models.model(name, drop_path=0.4), name)
    batch = tiny_models.batch(name, samples=4)
    whole = student(batch, DRAW).predictions_nd
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        part = dataclasses.replace(
            batch,
            inputs=batch.inputs[half],
            student_inputs=None if batch.student_inputs is None else batch.student_inputs[half],
            masked_rt=batch.masked_rt[half],
            sample_ids=batch.sample_ids[half],
            layout=None,
        )
        parts.append(student(part, DRAW).predictions_nd)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    other = student(batch, Draw(seed=5, step=8)).predictions_nd
    assert not torch.allclose(whole, other, atol=1e-3)


def test_drop_path_keeps_the_expectation_and_is_off_in_eval() -> None:
    config = tiny_models.model("v1_vision", drop_path=0.5)
    student, _ = build(config, "v1_vision")
    batch = tiny_models.batch("v1_vision", samples=2)
    wide = dataclasses.replace(
        batch,
        inputs=batch.inputs[:1].expand(4000, -1, -1, -1),
        masked_rt=batch.masked_rt[:1].expand(4000, -1),
        sample_ids=torch.arange(4000),
        layout=None,
    )
    scales = student._branch_scales(wide, DRAW)
    assert scales is not None
    assert torch.equal(scales[0], torch.ones_like(scales[0]))
    assert set(scales[2].unique().tolist()) == {0.0, 2.0}
    assert scales.mean(dim=2).flatten().tolist() == pytest.approx([1.0] * 6, abs=0.08)
    student.eval()
    assert student._branch_scales(wide, DRAW) is None


def test_a_dropped_layer_changes_nothing_and_has_a_zero_gradient() -> None:
    config = tiny_models.model("v1_speech", layer_drop=1.0)
    student, _ = build(config, "v1_speech")
    out = student(tiny_models.batch("v1_speech"), DRAW)
    out.predictions_nd.square().sum().backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.any()) != key.startswith("blocks."), key
    student.blocks = torch.nn.ModuleList()
    student.config.backbone.depth = 0
    student.layers = {"speech": [layer for layer in student.layers["speech"] if layer.kind != "block"]}
    assert torch.equal(student(tiny_models.batch("v1_speech"), DRAW).encoder_rsd, out.encoder_rsd)


def test_layer_drop_follows_seed_and_step_only() -> None:
    config = tiny_models.model("v1_speech", layer_drop=0.5, depth=8)
    student, _ = build(config, "v1_speech")
    run: list[int] = []
    for i, block in enumerate(student.blocks):
        # A skipped block still sees one position, for its gradient of zero.
        block.register_forward_hook(lambda module, args, out, i=i: run.append(i) if args[0].shape[1] > 1 else None)
    patterns = set()
    for step in range(6):
        for sample_seed in (0, 1):
            student(tiny_models.batch("v1_speech", seed=sample_seed), Draw(seed=1, step=step))
            patterns.add((step, tuple(run)))
            run.clear()
    assert len(patterns) == 6
    assert len({pattern for _, pattern in patterns}) > 2


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_features_are_the_outputs_of_the_named_blocks(name: str) -> None:
    student, teacher = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name, padded=True)
    student.eval()
    stem = student.stem_features(batch)
    last, first = teacher.features(batch, stem, [-1, 0])
    assert last.shape == first.shape == (3, batch.masked_rt.shape[1], 32)
    outputs: dict[int, Tensor] = {}
    for i, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: outputs.__setitem__(i, out[0]))
    teacher(batch, stem)
    assert torch.equal(last, outputs[2][:, -last.shape[1] :])
    assert torch.equal(first, outputs[0][:, -first.shape[1] :])
    valid = teacher.valid_positions(batch)
    assert (valid is None) == (name.endswith("vision"))


def test_one_run_may_have_several_stems() -> None:
    config = tiny_models.model("v2_vision")
    config.speech, config.text = tiny_models.speech(alibi=True), tiny_models.text()
    config.predictor = tiny_models.decoder("conv1d")
    config.backbone.prenet_depth = 1
    student, teacher = build(config, "v2_vision")
    for name in ("v2_vision", "v2_speech", "v2_text"):
        batch = tiny_models.batch(name, clones=2)
        out = student(batch, DRAW)
        assert torch.isfinite(loss_of(batch, out, teacher(batch, out.features_btd)))
    assert config.modalities == ["vision", "speech", "text"]


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_nothing_masked_gives_no_predictions_and_zero_gradients(name: str) -> None:
    student, teacher = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name)
    batch = dataclasses.replace(batch, masked_rt=torch.zeros_like(batch.masked_rt), layout=None)
    out = student(batch, DRAW)
    assert out.predictions_nd.shape == (0, 32)
    targets_nd = masked_targets(batch, teacher(batch, out.features_btd))
    total = loss.masked_loss_sum(out.predictions_nd, targets_nd, LossConfig(), 32)
    total.backward()
    assert float(total.detach()) == 0
    for key, parameter in student.named_parameters():
        # Zero, not absent: under ZeRO-3 an absent gradient is the one of an earlier step.
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


def test_a_text_longer_than_the_position_table_is_named() -> None:
    student, _ = build(tiny_models.model("v2_text"), "v2_text")
    batch = tiny_models.batch("v2_text")
    batch = dataclasses.replace(batch, inputs=batch.inputs.repeat(1, 2))
    with pytest.raises(DataError, match=r"40 tokens .*max_positions 24"):
        student.stem_features(batch)


@pytest.mark.parametrize("name", ["v1_speech", "v2_text"])
def test_a_teacher_in_fp32_takes_features_of_a_student_in_bf16(name: str) -> None:
    student, teacher = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name)
    exact = teacher(batch, student(batch, DRAW).features_btd)
    low = teacher(batch, student.bfloat16()(batch, DRAW).features_btd)
    assert low.dtype == torch.float32
    assert (low - exact).abs().mean() < 0.05


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_bf16_runs_and_stays_near_fp32(name: str) -> None:
    student, teacher = build(tiny_models.model(name), name)
    batch = tiny_models.batch(name, padded=True)
    reference = student(batch, DRAW)
    targets = teacher(batch, reference.features_btd)
    student.bfloat16(), teacher.bfloat16()
    out = student(batch, DRAW)
    low = teacher(batch, out.features_btd)
    assert out.predictions_nd.dtype == torch.bfloat16
    assert low.dtype == torch.float32
    assert (out.predictions_nd.float() - reference.predictions_nd).abs().mean() < 0.05 * reference.predictions_nd.std()
    assert (low - targets).abs().mean() < 0.1
    loss_of(batch, out, low).backward()
