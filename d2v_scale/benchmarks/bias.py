"""What a position bias costs attention: forward and backward, as ratios to PyTorch's kernel without a bias.

`added`: a bias that does not learn, in PyTorch's kernel. `learned`: one that does, there. `pieces`: one whose scale
learns from groups of rows (`model.learned_bias`). `attend`: the student's own way on a CPU (`model.cpu_attention`).
`folded`: the learned bias as more channels of queries and keys, exactly. `built`: making the bias, which is done once
for all blocks, and would be once more for each if it were not kept.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.model import cpu_attention, learned_bias
from d2v_scale.model.learned_bias import LearnedBias, pieces_of
from d2v_scale.model.position_bias import AlibiBias, RelativeBias, distances
from d2v_scale.parallel import groups

_DIM = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py bias`."""
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (samples times clones)")


def run(options: argparse.Namespace) -> int:
    """Print a row for the bias of speech 2.0 and one for that of vision 1.0."""
    torch.set_num_threads(options.threads)
    device = groups.single_process().device
    torch.set_num_threads(options.threads)
    print("CPU" if device.type == "cpu" else torch.cuda.get_device_name())
    alibi = AlibiBias(4).to(device)
    positions_rs = torch.stack([torch.randperm(249)[:124].sort().values for _ in range(options.rows)]).to(device)
    relative = RelativeBias((14, 14), 6).to(device)
    with torch.no_grad():
        alibi.scale.fill_(1.0)
        relative.table.normal_(0, 0.02)
    in_pieces = LearnedBias(alibi(positions_rs).detach(), alibi.slopes(), distances(positions_rs), 1)
    in_pieces = in_pieces._replace(pieces=pieces_of(options.rows, in_pieces.added_rhss))
    print(compare("speech 2.0, ALiBi", lambda: alibi(positions_rs), options.rows, options.rounds, in_pieces))
    print(compare("vision 1.0, relative", relative, options.rows, options.rounds))
    groups.shutdown()
    return 0


def compare(
    name: str, build: Callable[[], Tensor], rows: int, rounds: int, in_pieces: LearnedBias | None = None
) -> str:
    """One line: fastest round of each way over that of attention without a bias, taken in turns.

    `in_pieces`: what `build` makes, where the bias has a scale that learns.
    """
    learned = build()
    heads, length = learned.shape[1:3]
    device = learned.device
    qkv = torch.randn(rows, length, heads * 3 * _DIM, device=device, requires_grad=True)
    leaf = learned.detach().requires_grad_()
    fixed = learned.detach()

    def timed(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def both() -> None:
            q, k, v = qkv.view(rows, length, heads, 3, _DIM).permute(3, 0, 2, 1, 4).unbind(0)
            attend(q, k, v).sum().backward(retain_graph=in_pieces is not None)

        return both

    def plain(bias: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    ways: dict[str, Callable[[], None]] = {
        "none": timed(plain(None)),
        "added": timed(plain(fixed)),
        "learned": timed(plain(leaf)),
        "folded": timed(lambda q, k, v: folded(q, k, v, leaf)),
        "built": lambda: build().sum().backward(),
    }
    if in_pieces is not None:
        ways["pieces"] = timed(lambda q, k, v: learned_bias.attend(q, k, v, in_pieces, 0.0))
    qkv_rsh3d = qkv.view(rows, length, heads, 3, _DIM)
    if cpu_attention.applies(cpu_attention.parts(qkv_rsh3d)[0], leaf, 0.0):
        ways["attend"] = lambda: cpu_attention.attend(qkv_rsh3d, leaf, 0.0).sum().backward(retain_graph=True)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for way, function in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[way] = min(best[way], time.perf_counter() - begin)
    ratios = "  ".join(f"{way} {seconds / best['none']:.2f}x" for way, seconds in best.items() if way != "none")
    return f"{name:21s} ({rows}, {heads}, {length}, {_DIM})  {ratios}"


def folded(q_rhsd: Tensor, k_rhsd: Tensor, v_rhsd: Tensor, bias: Tensor) -> Tensor:
    """Attention with the bias (R or 1, H, S, S) as S more channels: neither of our biases has a low rank."""
    rows, heads, length, dim = q_rhsd.shape
    places = torch.eye(length, device=q_rhsd.device, dtype=q_rhsd.dtype) * dim**0.5
    q = torch.cat((q_rhsd, places.expand(rows, heads, -1, -1)), -1)
    k = torch.cat((k_rhsd, bias.transpose(2, 3).expand(rows, heads, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v_rhsd, scale=dim**-0.5)
