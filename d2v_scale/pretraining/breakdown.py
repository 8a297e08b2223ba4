"""The loss of single steps by data source, by how much of a row was hidden and by target; of each source the spread of
its states, and how much of its rows is hidden."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data2vec import statistics
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.data2vec.loss import Compared
from d2v_scale.parallel.groups import Topology

OF_A_SOURCE = ("loss", "target_std", "prediction_std", "masked_share")
"""Figures that are recorded as `<figure>/<source>`."""
BUCKETS = 4
"""Equal ranges of the masked share of a row."""


class LossBreakdown:
    """Sums and counts of the masked loss per bucket; `figures` divides them over all ranks."""

    def __init__(
        self,
        sources: list[str],
        device: torch.device,
        widths: Mapping[str, tuple[int, int]] | None = None,
        targets: Sequence[str] = (),
    ) -> None:
        """`sources`: the names of all data sources, in an order that all ranks share. `widths`: by what `spread_name`
        says, channels of the raw targets and of the predictions of which the spread is looked at. `targets`: names of
        those that are told apart."""
        self._sources, self._targets = sources, list(targets)
        self._spread = list(widths or {})
        # Of each its raw targets, then its predictions: count, sum and sum of squares over the channels.
        self._sizes = [1 + 2 * width for pair in (widths or {}).values() for width in pair]
        self._moments = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        # Losses and how many, of sources, buckets and targets; behind them of each source the positions that are masked
        # and those that hold something.
        self._masked_at = len(sources) + BUCKETS + len(self._targets)
        self._sums = torch.zeros(2, self._masked_at + len(sources), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, batch: Batch, compared: Sequence[Compared], raw: Sequence[Tensor], config: LossConfig) -> None:
        """Count one micro-batch. `raw`: each target (N, D) before any state entered. Nothing waits for the device."""
        each = [one.losses(config) for one in compared]
        loss_n = sum(
            (one.weight * x_n for one, x_n in zip(compared[1:], each[1:], strict=True)), each[0] * compared[0].weight
        )
        for one, x_n in zip(compared, each, strict=True):
            if one.name in self._targets:
                place = len(self._sources) + BUCKETS + self._targets.index(one.name)
                self._sums[0, place] += x_n.sum()
                self._sums[1, place] += x_n.numel()
        # A row's share counts its positions, padding included.
        bucket_r = (batch.masked_rt.double().mean(dim=1) * BUCKETS).long().clamp(max=BUCKETS - 1) + len(self._sources)
        row_n = torch.div(batch.layout.predicted_n, batch.masked_rt.shape[1], rounding_mode="floor")
        bucket_n = bucket_r[row_n]
        self._sums[0].index_add_(0, bucket_n, loss_n)
        self._sums[1].index_add_(0, bucket_n, torch.ones_like(loss_n))
        if batch.source in self._sources:
            own = self._sources.index(batch.source)
            self._sums[0, own] += loss_n.sum()
            self._sums[1, own] += loss_n.numel()
            if batch.layout.predictions > 0:
                real = batch.valid if batch.real_bt is None else batch.real_bt
                share = 1.0 if real is None else real.double().mean()
                self._sums[0, self._masked_at + own] += batch.layout.predictions
                self._sums[1, self._masked_at + own] += batch.masked_rt.numel() * share
        rows = self._moments.split(self._sizes)
        for number, (raw_nd, one) in enumerate(zip(raw, compared, strict=True)):
            name = spread_name(batch.source, one.name, number, several=len(self._sources) > 1)
            if name in self._spread:
                place = 2 * self._spread.index(name)
                for row, x_nd in zip(rows[place : place + 2], (raw_nd, one.predictions_nd), strict=True):
                    count, total_d, square_d = statistics.moments(x_nd)
                    row += torch.cat((count[None], total_d, square_d))

    def figures(self, topology: Topology) -> dict[str, Tensor]:
        """`loss/<source>` (where there are several), `loss/masked_<from>_<to>` in percent and `loss/target_<name>` (of
        those that are told apart, without their weight), for those that occurred; `masked_share`, of the positions that
        hold something, as `masked_share/<source>` where there are several; with `widths` also `target_std/<name>` and
        `prediction_std/<name>` of each.

        Waits for the device. Collective: all ranks must call.
        """
        topology.sum_over_model(self._sums)
        totals, counts = self._sums.tolist()
        width = 100 // BUCKETS
        names = [*self._sources, *(f"masked_{i * width}_{(i + 1) * width}" for i in range(BUCKETS))]
        names += [f"target_{name}" for name in self._targets]
        skipped = 1 if len(self._sources) == 1 else 0
        found = list(zip(names, totals[: self._masked_at], counts[: self._masked_at], strict=True))[skipped:]
        figures = {f"loss/{name}": torch.tensor(total / count) for name, total, count in found if count}
        hidden = zip(self._sources, totals[self._masked_at :], counts[self._masked_at :], strict=True)
        # Where all samples are lost nothing is masked, and there is no share.
        shares = {
            "masked_share" if len(self._sources) == 1 else f"masked_share/{source}": torch.tensor(masked / real)
            for source, masked, real in hidden
            if masked
        }
        return figures | shares | self._spreads(topology)

    def _spreads(self, topology: Topology) -> dict[str, Tensor]:
        if not self._sizes:
            return {}
        topology.sum_over_model(self._moments)
        names = [f"{figure}/{name}" for name in self._spread for figure in ("target_std", "prediction_std")]
        figures = {}
        for name, row in zip(names, self._moments.cpu().split(self._sizes), strict=True):
            # One vector has no spread.
            if row[0] > 1:
                sum_d, square_d = row[1:].chunk(2)
                figures[name] = statistics.std_from_moments(row[0], sum_d, square_d)
        return figures


def spread_name(source: str, target: str, number: int, *, several: bool) -> str:
    """What the spread of a source's target of this number is recorded under: of `several` sources their names, of
    targets after the first `target_<name>`; empty: it is that of all."""
    words = [source] if several else []
    return "/".join([*words, f"target_{target}"] if number else words)
