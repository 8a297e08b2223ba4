"""2.0 decoders along one, two and three axes: what they compute, and what planning says of them."""

import dataclasses
import math

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from d2v_scale.command_line import parse
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.costs import Lengths, Setting
from d2v_scale.modalities.vision.modality import Vision
from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.stem_config import OwnPredictor
from d2v_scale.networks import predictor
from d2v_scale.planning import activations, flops, stages

GRIDS = {1: (24,), 2: (4, 6), 3: (2, 3, 4)}
ROWS, WIDTH = 3, tiny_models.POST["width"]


def decoder_of(axes: int, kind: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple:
    """A decoder of positions along so many axes, and its model."""
    monkeypatch.setattr(Vision, "axes", axes)
    model = tiny_models.model("v2_vision")
    model.predictor = dataclasses.replace(model.predictor, kind=kind, **changes)
    one = model.of("vision")
    module = predictor.ConvPredictor(one, "vision", one.backbone.width, {})
    initialize(module, 1)
    return model, module


def inputs_of(grid: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """States of visible positions, where they are, masked positions, noise."""
    torch.manual_seed(0)
    length = math.prod(grid)
    order_rt = torch.stack([torch.randperm(length) for _ in range(ROWS)])
    visible_rs = order_rt[:, : length // 3].sort().values
    masked_rt = torch.ones(ROWS, length, dtype=torch.bool).scatter(1, visible_rs, False)
    masked_n = masked_rt.flatten().nonzero().squeeze(1)
    states_rsd = torch.randn(ROWS, length // 3, WIDTH, requires_grad=True)
    return states_rsd, visible_rs, masked_n, torch.randn(len(masked_n), WIDTH)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4])
def test_a_decoder_convolves_along_the_axes_of_its_stem(
    axes: int, kernel: int, monkeypatch: pytest.MonkeyPatch, world_of_one: None
) -> None:
    grid = GRIDS[axes]
    model, module = decoder_of(axes, "conv", monkeypatch, kernel=kernel)
    states_rsd, visible_rs, masked_n, noise_nd = inputs_of(grid)
    (found,) = module(states_rsd, visible_rs, masked_n, noise_nd, grid, ())

    length = math.prod(grid)
    x_rtd = torch.zeros(ROWS * length, WIDTH).index_copy(0, masked_n, noise_nd).view(ROWS, length, WIDTH)
    x_rtd = x_rtd.scatter(1, visible_rs[..., None].expand(-1, -1, WIDTH), states_rsd)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    x = x_rtd.transpose(1, 2).reshape(ROWS, WIDTH, *grid)
    for conv in module.convs:
        out = convolve(x, conv.weight, conv.bias, padding=kernel // 2, groups=model.predictor.groups)  # type: ignore[operator]
        out = out[(..., *map(slice, grid))]
        out = F.gelu(F.layer_norm(out.movedim(1, -1), out.shape[1:2])).movedim(-1, 1)
        x = out + x if out.shape == x.shape else out
    expected = module.proj(x.flatten(2).transpose(1, 2).reshape(ROWS * length, -1)[masked_n])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in module.parameters())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_planning_counts_what_a_decoder_of_any_dimension_does(
    axes: int, monkeypatch: pytest.MonkeyPatch, world_of_one: None
) -> None:
    """FLOPs, weights and saved bytes on paper against those of a forward pass."""
    monkeypatch.setattr(cpu_ops, "applies", lambda x: False)
    grid = GRIDS[axes]
    model, module = decoder_of(axes, "conv", monkeypatch)
    states_rsd, visible_rs, masked_n, noise_nd = inputs_of(grid)
    length = math.prod(grid)
    lengths = Lengths(inputs=16, grid=grid, kept=length // 3, masked=length - length // 3, extra=0, clones=1)

    with FlopCounterMode(display=False) as counter:
        module(states_rsd, visible_rs, masked_n, noise_nd, grid, ())
    assert ROWS * sum(flops._predictor(model, "vision", lengths, [WIDTH])) == counter.get_total_flops()

    [layer] = [layer for _, layer, _ in stages._distinct_layers(model) if layer.kind == "predictor"]
    kernels = sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))
    assert stages._parameters(model, layer, "vision") == kernels

    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.setdefault(tensor.untyped_storage().data_ptr(), tensor), tensor)[1], lambda tensor: tensor
    ):
        module(states_rsd, visible_rs, masked_n, noise_nd, grid, ())
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)
    planned = activations._predictor(model.of("vision"), lengths, Setting(samples=ROWS, itemsize=4, kernels="cpu"))
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "axes", "dimensions"),
    [
        ("conv1d", 1, 1),
        ("conv1d", 3, 1),
        ("conv1d", 4, 1),
        ("conv2d", 2, 2),
        ("conv3d", 3, 3),
        ("conv", 1, 1),
        ("conv", 3, 3),
    ],
)
def test_kernels_extend_along_the_axes_that_the_kind_says(kind: str, axes: int, dimensions: int) -> None:
    model = tiny_models.model("v2_vision")
    model.predictor.kind = kind  # type: ignore[assignment]
    assert model.decoder_dimensions("vision", axes) == dimensions


@pytest.mark.parametrize(
    ("kind", "axes", "said"),
    [
        ("conv2d", 1, "'conv2d', but positions of vision lie along 1 axis. Give conv,"),
        ("conv3d", 2, "'conv3d', but positions of vision lie along 2 axes. Give conv,"),
        ("conv2d", 3, "'conv2d', but positions of vision lie along 3 axes. Give conv,"),
        ("conv", 4, "'conv', but positions of vision lie along 4 axes. Give conv1d"),
    ],
)
def test_kernels_of_other_axes_than_the_stem_has_are_refused(kind: str, axes: int, said: str) -> None:
    model = tiny_models.model("v2_vision")
    assert model.vision is not None
    model.vision.predictor = OwnPredictor(kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        model.decoder_dimensions("vision", axes)
    assert error.value.key == "model.vision.predictor.kind"
    assert said in str(error.value)


def test_a_planar_decoder_of_recordings_was_silently_one_of_a_line() -> None:
    recipe, _ = parse(["--recipe", "tiny2_speech", "--data", "x.tar", "--model.predictor.kind", "conv2d"])
    with pytest.raises(ConfigError, match="positions of speech lie along 1 axis"):
        recipe.check(1)
    recipe, _ = parse(["--recipe", "tiny2_speech", "--data", "x.tar", "--model.predictor.kind", "conv"])
    recipe.check(1)


@pytest.mark.parametrize("kind", ["conv", "conv2d", "conv3d"])
def test_a_decoder_that_stems_share_is_one_of_a_line(kind: str) -> None:
    model: ModelConfig = tiny_models.model("v2_vision")
    model.predictor.kind, model.predictor.shared = kind, True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="stems of a line share it"):
        model.check()


@pytest.mark.parametrize("name", ["v2_vision", "v2_speech"])
def test_conv_is_the_published_decoder_of_its_stem(name: str, world_of_one: None) -> None:
    """Bitwise the same predictions as by the published kind."""
    model, modality = tiny_models.model(name), tiny_models.modality_of(name)
    outputs = []
    for kind in (model.predictor.kind, "conv"):
        model.predictor.kind = kind
        module = predictor.ConvPredictor(model.of(modality), modality, WIDTH, {})
        initialize(module, 1)
        grid = GRIDS[2 if modality == "vision" else 1]
        outputs += module(*inputs_of(grid), grid, ())
    assert torch.equal(*outputs)
