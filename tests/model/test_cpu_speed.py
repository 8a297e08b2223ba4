"""What is clearly faster is taken, by timings that are given."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2v_scale.model import cpu_ops, cpu_speed
from d2v_scale.model.config import Backbone


class Clock:
    """Time that passes where a way takes some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(cpu_speed.time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_rounds_take_turns_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []

    def way(name: str, seconds: float) -> cpu_speed.Way:
        return lambda: (order.append(name), clock.pass_by(seconds))

    quick = cpu_speed.ratios(way("a", 3.0), way("b", 2.0), limit_s=1000.0)
    assert quick == pytest.approx([1.5] * len(quick))
    assert "".join(order).startswith("baabba")
    slow = cpu_speed.ratios(way("a", 3.0), way("b", 2.0), limit_s=1.0)
    assert 1 < len(slow) < len(quick)


@pytest.mark.parametrize(
    ("found", "clearly"), [([1.3] * 6 + [0.2] * 2, True), ([1.05] * 8, False), ([9.0] * 5 + [0.9] * 3, False)]
)
def test_three_of_four_rounds_decide(found: list[float], clearly: bool) -> None:
    """One that was held up says nothing, and a tie leaves what is usual."""
    assert (cpu_speed.gain(found) >= cpu_speed.CLEARLY) is clearly


@pytest.mark.skipif(not cpu_ops.applies(torch.zeros(1)), reason="this PyTorch has no oneDNN")
def test_the_blas_makes_the_products_that_it_is_clearly_faster_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seconds = {"small neither": 1.5, "middle both": 1.2, "large both": 1.05, "small both": 0.5}
    met: set[str] = set()

    def onednn(a_nk: Tensor, b_mk: Tensor) -> None:
        met.add(cpu_ops.product_class(a_nk, b_mk))
        clock.pass_by(seconds.get(cpu_ops.product_class(a_nk, b_mk), 1.0))

    monkeypatch.setattr(cpu_ops, "onednn_product", onednn)
    monkeypatch.setattr(cpu_ops, "blas_product", lambda a_nk, b_mk: clock.pass_by(1.0))
    assert cpu_speed.faster_by_blas() == ["small neither", "middle both"]
    assert len(met) == cpu_speed.CLASSES


def test_processors_say_whether_they_multiply_bf16(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert not cpu_speed.has_native_bf16(info)
    for flags, native in {
        "flags\t\t: fpu avx512f avx512_bf16 sse": True,
        "flags\t\t: fpu avx512f": False,
        "Features\t: fp asimd bf16": True,
    }.items():
        info.write_text(f"processor\t: 0\nmodel name\t: some\n{flags}\n")
        assert cpu_speed.has_native_bf16(info) is native


@pytest.mark.parametrize(("width", "heads"), [(48, 4), (2560, 20)])
def test_a_block_is_timed_in_both_precisions_and_draws_nothing(
    width: int, heads: int, world_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, int]] = []

    def ratios(usual: cpu_speed.Way, other: cpu_speed.Way, limit_s: float) -> list[float]:
        for way in (usual, other):
            way()
            block, x_rsd, bias = way.args  # type: ignore[attr-defined]
            assert all(one.grad is not None and one.dtype == x_rsd.dtype for one in block.parameters())
            assert x_rsd.shape[1] == 17
            assert bias is None if width == 48 else bias.shape == (1, 10, 17, 17)
            seen.append((x_rsd.dtype, x_rsd.shape[2]))
        return [2.0, 1.5, 3.0, 4.0]

    monkeypatch.setattr(cpu_speed, "ratios", ratios)
    state = torch.get_rng_state()
    backbone = Backbone(width=width, heads=heads, ffn=2 * width, dropout=0.1)
    assert cpu_speed.gain_of_bf16(backbone, 17, biased=width > 48) == 2.0
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [(torch.float32, min(width, 1020)), (torch.bfloat16, min(width, 1020))]
