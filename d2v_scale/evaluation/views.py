"""Several views of each held-out sample, as the student sees them: for LiDAR.

A view is the sample under one of its masks, which are drawn as in training, once and for all. Crops would be views of
images alone, and of a network that never trained to tell what crops share; the clones of a sample are what the
objective asks to be seen alike, in every modality. So that recipes with few clones and with many get the same measure,
there are `VIEWS` of each sample whatever the recipe's clones are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.model.block import Block
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.networks.stack import Student
from d2v_scale.parallel.groups import Topology

VIEWS = 4
"""Of each sample,"""
VIEWED = 128
"""of so many samples at most, in whole batches."""


class ViewProbe:
    """The student's last main block under masks: means over the visible positions, one for every view."""

    def __init__(self, student: nn.Module, topology: Topology) -> None:
        """`student`: a `Student`, or the section of it that is here."""
        self._student, self._topology = cast(Student, student), topology

    @contextmanager
    def watching(self, batches: Sequence[Batch]) -> Iterator[list[Tensor]]:
        """What the forward passes inside, which must be of these batches in their order, make of them: (B, M, D) of
        each; nothing on a stage of a pipeline that the last main block is not on. Local."""
        found: list[Tensor] = []
        last = self._student.blocks[-1] if len(self._student.blocks) else None

        def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            found.append(self._pooled(batches[len(found)], output[0].detach()))

        handle = last.register_forward_hook(keep) if isinstance(last, Block) else None
        try:
            yield found
        finally:
            if handle is not None:
                handle.remove()

    def _pooled(self, batch: Batch, states_rsd: Tensor) -> Tensor:
        valid_bt = self._student.valid_positions(batch)
        weight_rs = None if valid_bt is None else valid_bt.repeat_interleave(batch.clones, dim=0)
        if self._student.config.visible_only:
            visible_rs = batch.layout.visible_rs
            assert visible_rs is not None
            weight_rs = None if weight_rs is None else weight_rs.gather(1, visible_rs)
            length = visible_rs.shape[1]
        else:
            weight_rs = ~batch.masked_rt if weight_rs is None else weight_rs & ~batch.masked_rt
            length = batch.masked_rt.shape[1]
        pooled_rd = mean_over_positions(states_rsd[:, states_rsd.shape[1] - length :], weight_rs)
        return pooled_rd.unflatten(0, (-1, batch.clones))

    def together(self, readings: Sequence[Sequence[tuple[int, Tensor]]], samples: int) -> Tensor:
        """(N, V, D): the views of all samples. `readings`: what this rank found at each reading of them, with the
        number of the first sample of each. Collective: all ranks must call; all get the same."""
        backbone, device = self._student.config.backbone, self._topology.device
        views_nvd = torch.zeros(samples, VIEWS, backbone.width, device=device)
        for number, found in enumerate(readings):
            for first, found_bmd in found:
                place = number * found_bmd.shape[1]
                chosen_bvd = found_bmd[:, : VIEWS - place]
                views_nvd[first : first + len(found_bmd), place : place + chosen_bvd.shape[1]] = chosen_bvd
        self._topology.sum_over_model(views_nvd)
        return views_nvd
