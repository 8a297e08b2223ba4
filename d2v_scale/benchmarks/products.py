"""How fast this machine multiplies matrices, in the ways that a step may: what a benchmark of steps stands on."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.benchmarks.cases import Case
from d2v_scale.model import cpu_ops
from d2v_scale.model.layers import states_shape

_ROUNDS = 9


def sizes(case: Case, batch: Batch) -> tuple[int, int, int]:
    """(N, K, M) of the student's widest linear: positions of all rows, the model's width and the FFN's."""
    rows, length, width = states_shape(case.recipe.model, batch, masked=True)
    return rows * length, width, case.recipe.model.backbone.ffn


def gigaflops(rows: int, inputs: int, outputs: int, device: torch.device) -> dict[str, float]:
    """GFLOP/s of (N, K) times (K, M) in fp32 by `F.linear` with a bias, by oneDNN with a bias (missing where there is
    none), and by `torch.mm` into memory that is there; medians of alternating rounds."""
    x_nk = torch.randn(rows, inputs, device=device)
    weight_mk, bias_m = torch.randn(outputs, inputs, device=device), torch.randn(outputs, device=device)
    out_nm = torch.empty(rows, outputs, device=device)
    ways: dict[str, Callable[[], Tensor]] = {"F.linear": lambda: F.linear(x_nk, weight_mk, bias_m)}
    if cpu_ops.applies(x_nk):
        ways["oneDNN"] = lambda: cpu_ops.product(x_nk, weight_mk, bias_m)
    ways["bare"] = lambda: torch.mm(x_nk, weight_mk.t(), out=out_nm)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + _ROUNDS):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: 2 * rows * inputs * outputs / statistics.median(one) / 1e9 for name, one in seconds.items()}


def multiply_through(module: nn.Module, *, onednn: bool) -> None:
    """Make every linear inside multiply as the project's do, or all as PyTorch's. Its parameters stay the same."""
    for inner in module.modules():
        if type(inner) in (nn.Linear, cpu_ops.Linear):
            inner.__class__ = cpu_ops.Linear if onednn else nn.Linear
