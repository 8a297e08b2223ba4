"""The CPU's own versions compute what PyTorch's operators do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.modalities.speech import conv_rows
from d2v_scale.model import cpu_ops, norm_gelu

pytestmark = pytest.mark.skipif(not cpu_ops.applies(torch.zeros(1)), reason="this PyTorch has no oneDNN")


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_same(ours: list[Tensor], reference: list[Tensor]) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == theirs.shape
        largest = theirs.abs().amax() if theirs.numel() else 0.0
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * max(float(largest), 1e-3))


@pytest.mark.parametrize("shape", [(5, 7, 24), (1, 24), (0, 24)])
def test_linear(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape), torch.randn(10, 24), torch.randn(10)
    for kept in (2, 3):
        assert_same(gradients(cpu_ops.linear, *inputs[:kept]), gradients(F.linear, *inputs[:kept]))


def test_products_are_made_by_the_library_that_their_class_is_given_to(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def by_onednn(a_nk: Tensor, b_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
        made.append(cpu_ops.product_class(a_nk, b_mk))
        return F.linear(a_nk, b_mk, bias_m)

    monkeypatch.setattr(cpu_ops, "onednn_product", by_onednn)
    monkeypatch.setattr(cpu_ops, "_by_blas", frozenset())
    inputs = torch.randn(5, 7, 24), torch.randn(10, 24), torch.randn(10)
    reference = gradients(F.linear, *inputs)
    for by_blas, others in (
        ([], ["small neither", "small second", "small both"]),
        (["small second", "large both"], ["small neither", "small both"]),
        (["small neither", "small second", "small both"], []),
    ):
        made.clear()
        cpu_ops.multiply_by_blas(by_blas)
        assert_same(gradients(cpu_ops.linear, *inputs), reference)
        assert made == others
    wide = cpu_ops.product_class(torch.empty(7, 32).t(), torch.empty(7, 24).t())
    assert wide == "small both wide"
    sizes = [(64, 64, 256), (256, 96, 384), (512, 384, 1536)]
    classes = [cpu_ops.product_class(torch.empty(n, k), torch.empty(m, k)) for n, k, m in sizes]
    assert classes == ["small neither", "middle neither", "large neither"]


def test_linear_of_rows_that_are_a_view_with_gaps() -> None:
    x, weight = torch.randn(4, 9, 24)[:, 2:5], torch.randn(10, 24)
    assert_same([cpu_ops.linear(x, weight)], [F.linear(x, weight)])


@pytest.mark.parametrize(("kernel", "groups"), [(5, 1), (5, 4), (4, 2)])
def test_convolution_of_sequences(kernel: int, groups: int) -> None:
    conv = cpu_ops.SequenceConv(8, 12, kernel, padding=kernel // 2, groups=groups)
    # A view with gaps, as the rows without an extra token are.
    x = torch.randn(3, 11, 8)[:, 1:]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel // 2, groups=groups).transpose(1, 2)

    parameters = (conv.weight.detach(), conv.bias.detach())  # type: ignore[union-attr]
    assert_same(gradients(ours, x, *parameters), gradients(plain, x, *parameters))


def test_dropout_drops_its_share_scales_the_rest_and_repeats_with_the_seed() -> None:
    x = torch.ones(1000, 1001)
    torch.manual_seed(3)
    dropped = cpu_ops.dropout(x, 0.1, True)
    assert abs((dropped == 0).float().mean().item() - 0.1) < 2e-3
    assert abs(dropped.mean().item() - 1) < 2e-3
    # No column or row is treated otherwise than the others.
    assert (dropped == 0).float().mean(0).std() < 0.012
    torch.manual_seed(3)
    assert torch.equal(cpu_ops.dropout(x, 0.1, True), dropped)
    assert torch.equal(cpu_ops.dropout(x, 0.1, False), x)
    assert cpu_ops.dropout(x, 0.0, True) is x or torch.equal(cpu_ops.dropout(x, 0.0, True), x)


def test_norm_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "PIECE_ROWS", 8)
    x, weight, bias = torch.randn(3, 7, 24), torch.randn(24), torch.randn(24)

    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.gelu(F.layer_norm(x, (24,), weight, bias, 1e-5))

    assert_same(gradients(lambda *a: norm_gelu.norm_gelu(*a, 1e-5), x, weight, bias), gradients(plain, x, weight, bias))
    assert_same(gradients(lambda x: norm_gelu.norm_gelu(x, None, None, 1e-5), x), gradients(plain, x))


@pytest.mark.parametrize("rows", [1, 2])
def test_gelu_of_rows_whose_channels_lie_apart_is_written(rows: int) -> None:
    """PyTorch's GELU leaves an output that is given to it with other strides than its own unwritten."""
    x = torch.randn(rows, 32, 64).transpose(1, 2)
    memory = torch.full((rows, 64, 32), float("nan"))
    del memory
    found = gradients(lambda x: norm_gelu.norm_gelu(x, None, None, 1e-5), x)
    assert_same(found, gradients(lambda x: F.gelu(F.layer_norm(x, (32,))), x))


@pytest.mark.parametrize(
    ("layers", "samples"),
    [
        ([(8, 10, 5), *[(8, 3, 2)] * 4, *[(8, 2, 2)] * 2], 3001),
        ([(6, 10, 5), (8, 4, 2), (4, 5, 2), (4, 2, 2)], 1001),
        ([(8, 3, 3), (4, 1, 1), (4, 2, 3)], 300),
    ],
)
def test_convolutions_over_rows(layers: list, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "PIECE_ROWS", 50)
    convs, inputs = nn.ModuleList(), 1
    for outputs, kernel, stride in layers:
        convs.append(conv_rows.FrameConv(inputs, outputs, kernel, stride, bias=False))
        inputs = outputs
    wave = torch.randn(3, samples)

    def over_rows(*weights: Tensor) -> Tensor:
        x, rows, frames = conv_rows.to_rows(wave, convs)
        for conv, weight in zip(convs, weights, strict=True):
            x = conv_rows._Conv.apply(x, weight, conv.stride[0])
        return x.view(3, rows, -1)[:, :frames]

    def over_channels(*weights: Tensor) -> Tensor:
        x = wave[:, None]
        for conv, weight in zip(convs, weights, strict=True):
            x = F.conv1d(x, weight, stride=conv.stride)
        return x.transpose(1, 2)

    weights = [conv.weight for conv in convs]
    assert_same(gradients(over_rows, *weights), gradients(over_channels, *weights))


def test_narrow_convolutions_are_pytorchs() -> None:
    wave = torch.zeros(1, 100)
    for channels, over_rows in ((64, False), (128, True)):
        assert conv_rows.applies(wave, nn.ModuleList([conv_rows.FrameConv(1, channels, 3, 2)])) is over_rows
    assert not conv_rows.applies(wave.double(), nn.ModuleList([conv_rows.FrameConv(1, 128, 3, 2)]))


def test_wide_convolutions_over_rows_are_close_to_double_precision() -> None:
    torch.manual_seed(0)
    convs = nn.ModuleList(
        [conv_rows.FrameConv(1, 512, 10, 5, bias=False), conv_rows.FrameConv(512, 512, 3, 2, bias=False)]
    )
    wave = torch.randn(2, 800)
    exact = convs.double()[1](convs[0](wave.double()[:, None])).transpose(1, 2)
    convs.float()
    x, rows, frames = conv_rows.to_rows(wave, convs)
    for conv in convs:
        x = conv(x)
    assert (x.view(2, rows, -1)[:, :frames] - exact).abs().amax() < 1e-5 * exact.abs().amax()
