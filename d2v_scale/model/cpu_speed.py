"""How this processor multiplies, measured in about a second: what a run decides by at its start.

One way is clearly faster than another if it was by `CLEARLY` in three of four rounds, which take turns. So a run takes
the usual way where there is no difference, and where others have the processor's time.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from d2v_scale.model import cpu_ops
from d2v_scale.model.block import Block
from d2v_scale.model.config import Backbone
from d2v_scale.model.init import InitRule, initialize
from d2v_scale.model.parallel_linear import undivided

CLEARLY = 1.1
_ROUNDS, _FEWEST = 16, 5
"""Rounds of a measurement, and how many there are at least where they take long."""
_SIZES = {"small": (64, 64, 256), "middle": (256, 96, 384), "large": (512, 384, 1536)}
"""N, K and M of the product that stands for all of its size."""
CLASSES = 4 * len(_SIZES)
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Names in /proc/cpuinfo: of x86 and, the last, of ARM."""
_POSITIONS, _FEWEST_POSITIONS, _WIDEST = 1024, 64, 1024
"""Positions that go through a block, and its width, at most; so many positions at least, however wide it is."""
_WEIGHTED = 1 << 24
"""Positions times the square of the width, at most: with that a round takes milliseconds."""

Way = Callable[[], object]


def ratios(usual: Way, other: Way, limit_s: float) -> list[float]:
    """Time of the one over that of the other, of each round after the first. Above 1 the other is faster. No round
    begins after `limit_s`, beside the fewest that there are."""
    found: list[float] = []
    begin = time.perf_counter()
    for number in range(1 + _ROUNDS):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (usual, other)[which]()
            seconds[which] = time.perf_counter() - start
        if number:
            found.append(seconds[0] / seconds[1])
        if len(found) >= _FEWEST and time.perf_counter() - begin > limit_s:
            break
    return found


def gain(found: list[float]) -> float:
    """What three of four rounds reach: the lower quartile of `ratios`."""
    return sorted(found)[len(found) // 4]


def faster_by_blas(limit_s: float = 0.03) -> list[str]:
    """The classes of fp32 products (`cpu_ops.product_class`) that the BLAS makes clearly faster than oneDNN."""
    found = []
    for rows, inputs, outputs in _SIZES.values():
        x_nk, weight_mk, grad_nm = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(rows, outputs)
        both = grad_nm.t(), x_nk.t()
        for a, b in ((x_nk, weight_mk), (grad_nm, weight_mk.t()), both, both[::-1]):
            if not cpu_ops.applies(a):
                return []
            usual, other = (partial(way, a, b) for way in (cpu_ops.onednn_product, cpu_ops.blas_product))
            if gain(ratios(usual, other, limit_s)) >= CLEARLY:
                found.append(cpu_ops.product_class(a, b))
    return found


def has_native_bf16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 itself, as far as Linux says so."""
    if not cpu_info.exists():
        return False
    lines = cpu_info.read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not _NATIVE_BF16.isdisjoint(flags)


def gain_of_bf16(backbone: Backbone, length: int, *, biased: bool, limit_s: float = 0.25) -> float:
    """`gain` of a block of this backbone, on sequences so long, in bf16: forward as a teacher's and as a student's,
    and backward. `biased`: attention has a position bias that learns, which decides what PyTorch computes it with.
    Torch's global generator stays as it is."""
    if backbone.width > _WIDEST:
        share = backbone.width // _WIDEST
        heads, ffn = max(1, backbone.heads // share), backbone.ffn // share
        backbone = dataclasses.replace(backbone, width=heads * (_WIDEST // heads), heads=heads, ffn=ffn)
    positions = max(_FEWEST_POSITIONS, min(_POSITIONS, _WEIGHTED // backbone.width**2))
    length = min(length, positions)
    with torch.random.fork_rng(devices=[]), undivided():
        block = Block(backbone, rule=InitRule("normal", 0.02))
        initialize(block, seed=0)
        x_rsd = torch.randn(max(1, positions // length), length, backbone.width)
        bias = torch.zeros(1, backbone.heads, length, length, requires_grad=True) if biased else None
        usual, other = (
            partial(_passes, copy.deepcopy(block).to(dtype), x_rsd.to(dtype), None if bias is None else bias.to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        )
        return gain(ratios(usual, other, limit_s))


def _passes(block: Block, x_rsd: torch.Tensor, bias_1hss: torch.Tensor | None) -> None:
    with torch.no_grad():
        block.eval()(x_rsd, bias_1hss, None)
    learned = None if bias_1hss is None else bias_1hss.detach().requires_grad_()
    out_rsd, _ = block.train()(x_rsd.detach().requires_grad_(), learned, None)
    block.zero_grad()
    out_rsd.backward(x_rsd)
