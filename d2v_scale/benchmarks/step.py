"""One pretraining step against a peer: student, teacher, loss, backward, clipping, optimizer and EMA.

All sides start from the same weights and get the same batches and masks; their losses without dropout must agree
before anything is timed. Rounds alternate between the sides; medians are shown. First comes what the figures stand on:
GFLOP/s of `F.linear`, of oneDNN and of a bare product at the size of the student's widest linear. `ceiling`: the peer's
time over the time of its matrix products and convolutions alone, which is what nobody gains who computes the same.
`optimizer`: our optimizer phase against the peer's, and against the peer with torch's fused AdamW. Above 1 means faster
than the peer. Where `F.linear` is slow, most of a gain may be that: `--peer_products onednn` gives the peer the same
products as ours, so that a ratio means the same on every machine. As a run at its start, the process measures what
makes its products; that a run keeps freed memory (`process.host_memory`) is left out, since all sides would.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from d2v_scale.batch import Batch
from d2v_scale.benchmarks import cases, products
from d2v_scale.benchmarks.cases import Case
from d2v_scale.benchmarks.huggingface_peer import HuggingFacePeer
from d2v_scale.benchmarks.sides import PHASES, Naive, Ours, Side
from d2v_scale.errors import UserError
from d2v_scale.model import cpu_ops, cpu_speed
from d2v_scale.parallel import groups
from d2v_scale.parallel.groups import Topology
from d2v_scale.process.profiling import profiler, seconds_of_parts

_AGREE = 1e-4
"""Largest relative difference of the losses, fp32."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_linear", "scaled_dot_product")
_LIBRARIES = ("aten::", "mkldnn::")
_BATCHES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py step`."""
    parser.add_argument("--recipe", default="v1_vision", help=f"{', '.join(cases.NAMES)}, or any recipe")
    parser.add_argument("--all", action="store_true", help=f"all of {', '.join(cases.NAMES)}")
    parser.add_argument(
        "--peer", choices=("hf", "naive", "adamw"), default="hf", help="adamw: our step of the same recipe without Muon"
    )
    parser.add_argument(
        "--peer_products", choices=("blas", "onednn"), default="blas", help="what multiplies in the peer's linears"
    )
    parser.add_argument("--samples", type=int, help="samples of a step")
    parser.add_argument("--length", type=int, help="audio samples or tokens of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our side")


def run(options: argparse.Namespace) -> int:
    """Print one row a case."""
    torch.set_num_threads(options.threads)
    topology = groups.single_process()
    torch.set_num_threads(options.threads)
    names = cases.NAMES if options.all else (options.recipe,)
    if topology.device.type == "cpu":
        by_blas = cpu_speed.faster_by_blas()
        cpu_ops.multiply_by_blas(by_blas)
        print(f"{options.threads} CPU threads; products by the BLAS: {', '.join(by_blas) or 'none'}")
    else:
        print(torch.cuda.get_device_name())
    try:
        for name in names:
            measure(cases.case(name, options.samples, options.length, options.overrides), topology, options)
    finally:
        cpu_ops.multiply_by_blas(())
    groups.shutdown()
    return 0


def measure(case: Case, topology: Topology, options: argparse.Namespace) -> None:
    """Time one case and print its rows."""
    device = topology.device
    sides: dict[str, Side] = {"ours": Ours(case, topology, options.precision)}
    if options.peer == "hf":
        onednn = options.peer_products == "onednn"
        sides["peer"] = HuggingFacePeer(case, device, onednn=onednn)
        sides["fused"] = HuggingFacePeer(case, device, fused=True, onednn=onednn)
    else:
        if options.peer_products == "onednn":
            raise UserError(f"The peer {options.peer} has our products already.", "Leave --peer_products out.")
        sides["peer"] = (
            Naive(case, device) if options.peer == "naive" else Ours(_without_muon(case), topology, options.precision)
        )
    batches = [case.batch(step).to(device) for step in range(_BATCHES)]
    check_losses(case, sides, batches[0], exact=options.precision == "fp32")
    size = products.sizes(case, batches[0])
    rates = products.gigaflops(*size, device)
    said = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    print(f"  {case.name} GFLOP/s at {' x '.join(map(str, size))}: {said}", flush=True)
    # The peer with the fused optimizer differs in its optimizer alone, which takes few rounds to see.
    timed = {name: side for name, side in sides.items() if name != "fused"}
    phases = alternate(timed, batches, options.warmup, options.rounds)
    whole = {name: statistics.median(sum(one.values()) for one in rounds) for name, rounds in phases.items()}
    for name, rounds in phases.items():
        medians = {phase: statistics.median(one[phase] for one in rounds) for phase in PHASES}
        shares = "  ".join(f"{phase} {medians[phase] / whole[name]:4.0%}" for phase in PHASES)
        print(f"  {case.name} {name:5s} {shares}", flush=True)
    optimizer = {name: statistics.median(one["optimizer"] for one in rounds) for name, rounds in phases.items()}
    row = f"{case.name:10s} optimizer {optimizer['peer'] / optimizer['ours']:.2f}"
    if "fused" in sides:
        few = alternate({"fused": sides["fused"], "ours": sides["ours"]}, batches, 1, max(1, options.rounds // 4))
        seconds = {name: statistics.median(one["optimizer"] for one in rounds) for name, rounds in few.items()}
        row += f" (peer with fused AdamW {seconds['fused'] / seconds['ours']:.2f})"
    ratio, ceiling = whole["peer"] / whole["ours"], 1 / share_of_products(sides["peer"], batches)
    gained = f"  {(ratio - 1) / (ceiling - 1):.0%} of the gain to it" if ceiling > 1 else ""
    peer = options.peer if options.peer_products == "blas" else f"{options.peer} through oneDNN"
    print(f"{row}  ceiling {ceiling:.2f}{gained}  step against {peer} {ratio:.2f}x", flush=True)
    for side in sides.values():
        side.close()


def _without_muon(case: Case) -> Case:
    optim = case.recipe.optim
    if optim.muon is None:
        raise UserError(f"{case.name} has AdamW for everything already.", "Give --optim.muon.momentum 0.95.")
    return replace(case, recipe=replace(case.recipe, optim=replace(optim, muon=None)))


def check_losses(case: Case, sides: dict[str, Side], batch: Batch, *, exact: bool) -> None:
    """Assert that all sides compute the same loss from the same weights, masks and decoder noise."""
    rows, length = batch.masked_rt.shape
    noise_rtd = torch.randn(rows, length, case.recipe.model.backbone.width, device=batch.inputs.device) * 0.01
    losses = {name: side.loss(batch, noise_rtd) for name, side in sides.items()}
    limit = _AGREE if exact else 0.02
    agree = all(abs(loss - losses["peer"]) <= limit * abs(losses["peer"]) for loss in losses.values())
    assert agree, f"{case.name}: losses differ: {losses}"


def alternate(
    sides: dict[str, Side], batches: list[Batch], warmup: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every phase of every round of every side; `other` is what no phase covers."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            seconds = _timed(sides[name], batches[number % len(batches)], number)
            if number >= warmup:
                found[name].append(seconds)
    return found


def _timed(side: Side, batch: Batch, number: int) -> dict[str, float]:
    with seconds_of_parts() as seconds:
        begin = time.perf_counter()
        side.step(batch, number)
        total = time.perf_counter() - begin
        found = dict(seconds)
    return {**found, "other": total - sum(found.values())}


def share_of_products(side: Side, batches: list[Batch], rounds: int = 3) -> float:
    """Share of a step that its matrix products, attention kernels and convolutions take, forward and backward."""
    on_device = torch.cuda.is_available() and batches[0].inputs.is_cuda
    products, whole = 0.0, 0.0
    for number in range(rounds):
        with profiler() as profile:
            begin = time.perf_counter()
            side.step(batches[number % len(batches)], number)
            if on_device:
                torch.cuda.synchronize()
            whole += time.perf_counter() - begin
        for average in profile.key_averages():
            # Kernels of a device have other names than the operators that own their time.
            if average.key.startswith(_LIBRARIES) and any(product in average.key for product in _PRODUCTS):
                own = average.self_device_time_total if on_device else average.self_cpu_time_total
                products += own / 1e6
    return products / whole
