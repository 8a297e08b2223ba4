"""The loss of a logged step by data source and by how much of a row was hidden."""

import torch
from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.parallel.groups import Topology

BUCKETS = 4
"""Equal ranges of the masked share of a row."""


class LossBreakdown:
    """Sums and counts of the masked loss per bucket; `figures` divides them over all ranks."""

    def __init__(self, sources: list[str], device: torch.device) -> None:
        """`sources`: the names of all data sources, in an order that all ranks share."""
        self._sources = sources
        self._sums = torch.zeros(2, len(sources) + BUCKETS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, batch: Batch, predictions_nd: Tensor, targets_nd: Tensor, config: LossConfig) -> None:
        """Count one micro-batch. Nothing waits for the device."""
        factor = loss.channel_factor(config, targets_nd.shape[1])
        loss_n = loss.elementwise(predictions_nd, targets_nd, config.beta).sum(dim=1).double() * factor
        # A row's share counts its positions, padding included.
        bucket_r = (batch.masked_rt.double().mean(dim=1) * BUCKETS).long().clamp(max=BUCKETS - 1) + len(self._sources)
        row_n = torch.div(batch.layout.masked_n, batch.masked_rt.shape[1], rounding_mode="floor")
        bucket_n = bucket_r[row_n]
        self._sums[0].index_add_(0, bucket_n, loss_n)
        self._sums[1].index_add_(0, bucket_n, torch.ones_like(loss_n))
        if batch.source in self._sources:
            own = self._sources.index(batch.source)
            self._sums[0, own] += loss_n.sum()
            self._sums[1, own] += loss_n.numel()

    def figures(self, topology: Topology) -> dict[str, Tensor]:
        """`loss/<source>` (where there are several) and `loss/masked_<from>_<to>` in percent, for those that occurred.

        Waits for the device. Collective: all ranks must call.
        """
        topology.sum_over_model(self._sums)
        totals, counts = self._sums.tolist()
        width = 100 // BUCKETS
        names = [*self._sources, *(f"masked_{i * width}_{(i + 1) * width}" for i in range(BUCKETS))]
        skipped = 1 if len(self._sources) == 1 else 0
        found = list(zip(names, totals, counts, strict=True))[skipped:]
        return {f"loss/{name}": torch.tensor(total / count) for name, total, count in found if count}
