"""Which of PyTorch's attention kernels each kind of call is allowed, and that none of them gives a wrong gradient."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.benchmarks import device_gradients
from d2v_scale.modalities import published_parts
from d2v_scale.model import attention_kernels, cpu_attention
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import groups

Q = torch.randn(2, 3, 8, 16)
BIAS = torch.zeros(2, 3, 8, 8)
ADDED: dict[str, Tensor | None] = {
    "nothing": None,
    "padding": torch.ones(2, 1, 1, 8, dtype=torch.bool),
    "constant": BIAS,
    "learned": BIAS.clone().requires_grad_(),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is added to the logits of each call, and whether cuDNN is allowed; every tensor is taken for a GPU's."""
    calls: list[tuple[str, bool]] = []
    real = F.scaled_dot_product_attention

    def record(*args: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is None:
            kind = "nothing"
        elif attn_mask.dtype == torch.bool:
            kind = "padding"
        else:
            kind = "learned" if attn_mask.requires_grad else "constant"
        calls.append((kind, torch.backends.cuda.cudnn_sdp_enabled()))
        return real(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(attention_kernels, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(cpu_attention, "applies", lambda *_: False)
    return calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ADDED)
def test_cudnn_is_asked_only_where_nothing_is_added(kind: str, grad: bool, asked: list[tuple[str, bool]]) -> None:
    with torch.set_grad_enabled(grad):
        attention_kernels.attend(Q, Q, Q, ADDED[kind], 0.0)
    assert asked == [(kind, kind == "nothing")]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_tested_cudnn_may_have_a_mask_but_never_a_bias_that_learns(
    asked: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_IS_CUDNN_TESTED", True)
    for added in ADDED.values():
        attention_kernels.attend(Q, Q, Q, added, 0.0)
    assert dict(asked) == {"nothing": True, "padding": True, "constant": True, "learned": False}


def test_no_cudnn_known_to_be_faulty_counts_as_tested() -> None:
    """9.26 is the first that is said to be mended."""
    assert all(version >= 92600 for version in attention_kernels.CUDNN_TESTED_WITH_MASK)


def test_what_a_user_switched_off_stays_off_and_an_error_leaves_the_switch_as_it_was(
    asked: list[tuple[str, bool]],
) -> None:
    with pytest.raises(RuntimeError):
        attention_kernels.attend(Q, Q, Q, torch.zeros(5, 5), 0.0)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        attention_kernels.attend(Q, Q, Q, BIAS, 0.0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


EXPECTED = {
    # Student's calls, teacher's: the teacher's bias does not learn.
    ("v1_vision", False): {("learned", False), ("constant", False)},
    ("v2_speech", False): {("learned", False), ("constant", False)},
    ("v2_speech", True): {("learned", False), ("constant", False)},
    ("v1_text", True): {("padding", False)},
    ("v1_text", False): {("nothing", True)},
    ("v2_vision", False): {("nothing", True)},
    ("v1_speech", True): {("padding", False)},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "padded"), EXPECTED)
def test_a_whole_model_asks_for_the_same_kernels_when_it_computes_again(
    name: str, padded: bool, checkpointing: bool, asked: list[tuple[str, bool]]
) -> None:
    groups.single_process()
    config = tiny_models.model(name)
    config.activation_checkpointing = checkpointing
    student, teacher = Student(config), Teacher(config, tiny_models.TAPS, published_parts(config))
    for stack in (student, teacher):
        initialize(stack, 1)
    batch = tiny_models.batch(name, 2, 2 if name.startswith("v2") else 1, padded)
    output = student(batch, Draw(1, 0))
    forward = len(asked)
    teacher(batch, output.features_btd)
    between = len(asked)
    output.predictions_nd.sum().backward()
    assert set(asked) == EXPECTED[name, padded]
    assert sorted(asked[between:]) == (sorted(asked[:forward]) if checkpointing else [])


def calls_of(function: Callable[[], object]) -> int:
    """Python and C calls."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_choosing_costs_a_block_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sdpa_kernel` around each block's call costs 70."""
    monkeypatch.setattr(attention_kernels, "_is_on_gpu", lambda _: True)
    bare = calls_of(lambda: F.scaled_dot_product_attention(Q, Q, Q, attn_mask=BIAS))
    assert calls_of(lambda: attention_kernels.attend(Q, Q, Q, None, 0.0)) <= bare + 2
    assert calls_of(lambda: attention_kernels.attend(Q, Q, Q, BIAS, 0.0)) <= bare + 14


def test_a_compiled_call_is_one_graph_with_the_allowed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU what is left of the allowed ones is the math kernel."""
    found: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    for on_gpu in (False, True):
        monkeypatch.setattr(attention_kernels, "_is_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        torch._dynamo.reset()
        found.clear()
        attend = torch.compile(attention_kernels.attend, fullgraph=True, backend=backend)
        out = attend(Q.clone().requires_grad_(), Q, Q, BIAS, 0.0)
        out.sum().backward()
        assert torch.allclose(out, F.scaled_dot_product_attention(Q, Q, Q, attn_mask=BIAS), atol=1e-6)
        assert any("flash" in name for name in found) != on_gpu
    torch._dynamo.reset()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_log_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    line = attention_kernels.describe("NVIDIA H100")
    assert "NVIDIA H100 (cuDNN 9.20.0)" in line
    assert "constant mask or bias memory-efficient or math (cuDNN is not tested with one)" in line
    monkeypatch.setattr(attention_kernels, "_IS_CUDNN_TESTED", True)
    assert "constant mask or bias cuDNN, memory-efficient or math; " in attention_kernels.describe("NVIDIA H100")


@pytest.mark.parametrize("kind", device_gradients.KINDS)
def test_values_that_show_the_fault_have_all_its_conditions(kind: str) -> None:
    for length in device_gradients.LENGTHS:
        q, k, _, *added = device_gradients.inputs(kind, length, torch.device("cpu"))
        logits = (q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5)[0]
        assert length % 128 == 64
        assert float(torch.logsumexp(logits, -1).detach().max()) < -88.8
        assert bool(added) == (kind != "no mask")


@pytest.mark.parametrize("kind", device_gradients.KINDS)
def test_gradients_are_the_math_kernels_and_what_is_not_finite_is_found(kind: str) -> None:
    device = torch.device("cpu")
    found = device_gradients.differences(kind, 192, device, device_gradients.ours)
    assert len(found) == (4 if kind == "learned bias" else 3)
    assert max(found.values()) <= device_gradients.TOLERANCE, found

    def broken(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        q.register_hook(lambda grad: torch.where(torch.rand_like(grad) < 0.01, torch.nan, grad))
        return device_gradients.plain(q * 1, k, v, added)

    assert device_gradients.differences(kind, 192, device, broken)["q"] == float("inf")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", device_gradients.LENGTHS)
@pytest.mark.parametrize("kind", device_gradients.KINDS)
def test_gradients_are_finite_and_the_math_kernels_on_a_gpu(kind: str, length: int) -> None:
    """A mask, a length of 64 modulo 128 and a log-sum-exp below -88.7: cuDNN's gradient of the queries was NaN."""
    found = device_gradients.differences(kind, length, torch.device("cuda"), device_gradients.ours)
    assert max(found.values()) <= device_gradients.TOLERANCE, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cudnn_that_counts_as_tested_has_right_gradients_on_this_gpu() -> None:
    version = torch.backends.cudnn.version()
    if version not in attention_kernels.CUDNN_TESTED_WITH_MASK:
        pytest.skip(f"cuDNN {version} is not of CUDNN_TESTED_WITH_MASK")
    for call in device_gradients.measure(torch.device("cuda"))["calls"]:
        assert call["cudnn"] is None or call["cudnn"] <= device_gradients.TOLERANCE, call
