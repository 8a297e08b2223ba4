"""Gradients of attention against PyTorch's math kernel in fp32, on values that have shown a kernel's fault.

In one half of the rows every logit is about -120, so that the log-sum-exp is far below -88.7, and all lengths are 64
modulo 128: with something added to the logits, cuDNN's NaN needs no more (`model/attention_kernels.py`). The other half
is ordinary.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_scale.model import attention_kernels

LENGTHS = (192, 320, 704)
KINDS = ("no mask", "padding", "constant bias", "learned bias")
TOLERANCE = 0.05
"""Largest norm of a gradient's difference over that of the gradient, bf16."""
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_DIM = 64
_LOGIT = -120.0

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def inputs(kind: str, length: int, device: torch.device, rows: int = 2, heads: int = 4) -> list[Tensor]:
    """bf16 q, k, v (R, H, S, d), and what `kind` adds to the logits; a bool mask keeps more than half of the keys."""
    generator = torch.Generator().manual_seed(length)
    shape = (rows, heads, length, _DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    low = slice(0, rows // 2)
    q[low] *= 0.1
    k[low] *= 0.1
    q[low, ..., 0], k[low, ..., 0] = 1.0, _LOGIT * math.sqrt(_DIM)
    leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v)]
    if kind == "padding":
        valid_rs = torch.arange(length)[None] < torch.linspace(0.6, 1.0, rows)[:, None] * length
        leaves.append(valid_rs[:, None, None].to(device))
    elif kind != "no mask":
        places = torch.arange(length)
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        bias = -(places[:, None] - places).abs() * slopes[:, None, None]
        bias = bias.expand(rows, -1, -1, -1).to(device, torch.bfloat16).contiguous()
        leaves.append(bias.requires_grad_(kind == "learned bias"))
    return leaves


def differences(kind: str, length: int, device: torch.device, attend: Attend) -> dict[str, float]:
    """By input that has a gradient: the norm of its difference from the math kernel's in fp32, over the latter's norm;
    infinite where a gradient is not finite. Of queries and keys without the channel that makes the logits low."""
    found = _gradients(inputs(kind, length, device), attend)
    exact = [x.detach() if x.dtype == torch.bool else _in_fp32(x) for x in inputs(kind, length, device)]
    with sdpa_kernel(SDPBackend.MATH):
        reference = _gradients(exact, plain)
    result = {}
    for name, ours, right in zip(("q", "k", "v", "bias"), found, reference, strict=False):
        if name in "qk":
            ours, right = ours[..., 1:], right[..., 1:]
        finite = bool(torch.isfinite(ours).all())
        result[name] = float((ours.float() - right).norm() / right.norm()) if finite else math.inf
    return result


def _in_fp32(x: Tensor) -> Tensor:
    return x.detach().float().requires_grad_(x.requires_grad)


def plain(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """Whatever kernel PyTorch chooses."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def ours(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """The kernel that a block chooses."""
    return attention_kernels.attend(q, k, v, added, 0.0)


def _gradients(leaves: list[Tensor], attend: Attend) -> list[Tensor]:
    q, k, v, *added = leaves
    out = attend(q, k, v, added[0] if added else None)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, out.dtype)
    return list(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], weights))


def measure(device: torch.device) -> dict[str, Any]:
    """By kind, length and kernel: the worst difference, `None` where that kernel refuses the call; and the time of
    both passes over that of our choice, at the longest length. `failed`: what our choice computes wrong."""
    calls = []
    for kind in KINDS:
        for length in LENGTHS:
            row: dict[str, Any] = {"kind": kind, "length": length}
            row["chosen"] = max(differences(kind, length, device, ours).values())
            row |= {name: _forced(kind, length, device, kernel) for name, kernel in KERNELS.items()}
            calls.append(row)
        if device.type == "cuda":
            calls[-1]["time"] = _times(kind, LENGTHS[-1], device)
    failed = [f"{one['kind']} at {one['length']}" for one in calls if not one["chosen"] <= TOLERANCE]
    return {"calls": calls, "failed": failed}


def _forced(kind: str, length: int, device: torch.device, kernel: SDPBackend) -> float | None:
    try:
        with sdpa_kernel(kernel):
            return max(differences(kind, length, device, plain).values())
    except RuntimeError:
        return None


def _times(kind: str, length: int, device: torch.device) -> dict[str, float]:
    leaves = inputs(kind, length, device, rows=16, heads=16)

    def seconds(attend: Attend, repetitions: int = 5) -> float:
        _gradients(leaves, attend)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repetitions):
            _gradients(leaves, attend)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repetitions

    chosen, found = seconds(ours), {}
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                found[name] = seconds(plain) / chosen
        except RuntimeError:
            continue
    return found


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each kind and length."""
    names = ("chosen", *KERNELS)
    lines = ["Gradients of attention: the worst difference from the math kernel in fp32, in parts of the gradient.", ""]
    lines += [f"| call | length | {' | '.join(names)} | time over the chosen |", "|---" * (len(names) + 3) + "|"]
    for call in measured["calls"]:
        cells = ["refused" if call[name] is None else f"{call[name]:.3g}" for name in names]
        times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in call.get("time", {}).items())
        lines.append(f"| {call['kind']} | {call['length']} | {' | '.join(cells)} | {times} |")
    return "\n".join(lines) + "\n"
