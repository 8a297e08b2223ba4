"""What the parts of a step cost on a device: products, what the host issues, collectives, hops, updates.

Measured on the machine at hand (`planning/calibration.py`), or assumed for a device with published peaks (`assumed`).
Small parts have floors: a layer costs the host its operations however few FLOPs it has, and a collective the steps of
its ring however few bytes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from d2v_scale.planning.hardware import BANDWIDTH_REACHED, Hardware

ADAM_BYTES = 32
"""Bytes that AdamW moves for each element: master, both moments and gradient read, three written, and the weight."""
EMA_BYTES = 16
"""Bytes that the teacher's update moves for each element: both read, one written, and the compute copy."""
BLOCK_KERNELS = 40
"""Kernels of a block and micro-batch: 10 of the student's forward pass, 20 of its backward pass, 10 of the teacher's.
Counted, of blocks without position biases and layer scales, which have up to 33 more."""
STEM_KERNELS = 250
"""Kernels of a micro-batch that are no block's: stem, decoder, targets and loss, of a 2.0 model. Counted; a few more or
less by kind of stem."""
RECOMPUTED = 0.25
"""Share of a block's kernels that activation checkpointing runs once more: the student's forward pass."""

BESIDE = 0.25
"""Share of a block's kernels that are of the teacher's forward pass."""

# Assumed of every host; nobody has measured them beside a GPU.
_KERNEL = 10e-6
"""Seconds that the host takes for a kernel, with PyTorch's dispatch and autograd."""
_CALL = 0.1e-6
"""Seconds of a call in Python, of which DeepSpeed's hooks consist."""
_LAYER_CALLS = {1: 5_800, 3: 18_600}
"""Calls of a block by ZeRO stage; counted over a fake process group (BENCHMARKS.md, "What grows with the world")."""
_STEP_CALLS = {1: 10_000, 3: 25_000}
"""Calls of a step that are no block's; likewise."""

# NCCL's own model of a ring of its protocol "simple" (nccl/src/graph/tuning.cc, baseLat and hwLat), in seconds.
_RING, _RING_LINK, _RING_NETWORK = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True, kw_only=True)
class Rate:
    """FLOP/s of a kind of layers by the model's width: what is between two widths is interpolated over their
    logarithms, what is beyond has the last one's."""

    widths: tuple[int, ...]
    flops: tuple[float, ...]

    def at(self, width: int) -> float:
        """FLOP/s of a model of this width."""
        return float(np.exp(np.interp(np.log(width), np.log(self.widths), np.log(self.flops))))


@dataclass(frozen=True, kw_only=True)
class Host:
    """Seconds of the host, which issues the operations of a step, and of the updates, under one engine."""

    step: float
    """Once a step: verdict, optimizer, teacher's update, counts."""
    micro: float
    """For each micro-batch: stem, decoder, targets, loss."""
    layer: float
    """For each block and micro-batch: student forward and backward, teacher forward."""
    update_rate: float
    """Bytes/s of `ADAM_BYTES` and `EMA_BYTES`."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Seconds of one collective beside its bytes: a ring of d ranks on n nodes takes d - n steps over links and n - 1
    over the network, an all-reduce twice as many."""

    start: float
    link_step: float
    network_step: float

    def seconds(self, passes: int, group: int, on_node: int) -> float:
        """Of one collective; `passes`: 2 of an all-reduce, else 1; `on_node`: its ranks that share a node."""
        nodes = -(-group // on_node)
        return self.start + passes * ((group - nodes) * self.link_step + (nodes - 1) * self.network_step)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a step is made of, on one kind of device."""

    source: str
    """Where the figures are from, for whom reads the plan."""
    precision: Literal["fp32", "bf16"]
    """Of the products."""
    blocks: Rate
    """Of the student's blocks forward and backward with the teacher's forward, all that is in them."""
    others: Rate
    """Of stem and decoder."""
    crowded: float
    """Times as long that a rank computes while all ranks of its node do; 1 where devices share nothing."""
    zero_1: Host
    """Under ZeRO-1 and 2, and in a pipeline."""
    zero_3: Host
    ring: Ring
    link: float
    """Bytes/s of one device in one direction, between devices of a node."""
    network: float
    """Likewise between nodes."""
    hop: float
    """Seconds from a pipeline stage to the next, beside the bytes, with what the engine does for it."""
    waits: bool
    """The host computes itself: neither its work nor any transfer hides behind products."""

    def host(self, stage: int) -> Host:
        """Of an engine at this ZeRO stage."""
        return self.zero_3 if stage == 3 else self.zero_1

    def crowding(self, on_node: int) -> float:
        """`crowded` where several ranks share a node."""
        return self.crowded if on_node > 1 else 1.0


def assumed(device: Hardware, utilisation: float) -> Costs:
    """Of a device with published peaks. `utilisation`: share of the peak that layers reach at any width; what the host
    needs and what a ring's steps take is assumed."""

    def host(stage: int) -> Host:
        return Host(
            step=_STEP_CALLS[stage] * _CALL,
            micro=STEM_KERNELS * _KERNEL,
            layer=BLOCK_KERNELS * _KERNEL + _LAYER_CALLS[stage] * _CALL,
            update_rate=device.memory_bandwidth * BANDWIDTH_REACHED,
        )

    rate = Rate(widths=(1,), flops=(device.bf16_flops * utilisation,))
    return Costs(
        source=f"published peaks of {device.name}, of which {utilisation:.0%} in products and {BANDWIDTH_REACHED:.0%} "
        f"of bandwidths are assumed to be reached; {_KERNEL * 1e6:.0f} us a kernel and {_CALL * 1e6:.1f} us a call "
        "of Python assumed; rings as NCCL's model has them",
        precision="bf16",
        blocks=rate,
        others=rate,
        crowded=1.0,
        zero_1=host(1),
        zero_3=host(3),
        ring=Ring(start=_RING, link_step=_RING_LINK, network_step=_RING_NETWORK),
        link=device.link_bandwidth * BANDWIDTH_REACHED,
        network=device.network_bandwidth * BANDWIDTH_REACHED,
        hop=_RING + 10 * _KERNEL,
        waits=False,
    )
