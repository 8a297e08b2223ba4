"""Frozen features of labelled samples, one vector a layer and sample."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.model.pooling import mean_over_positions

HiddenStates = Callable[[Batch], list[Tensor]]
"""A batch to the outputs of its layers, each (B, T, D), nothing masked."""
ValidPositions = Callable[[Batch], Tensor | None]
"""A batch to bool (B, T), True where a position is real; None: all are."""


@dataclass(kw_only=True)
class Features:
    """N samples, L layers, width D, on the CPU."""

    layers_lnd: Tensor
    """float32: the mean over valid positions of each layer's output."""
    labels_n: Tensor
    """int64."""
    keys: list[str]
    """The samples' keys in their shards."""

    def last(self, layers: int) -> Tensor:
        """(N, D): see `mean_over_layers`; of the last `layers` layers."""
        return mean_over_layers(self.layers_lnd[-layers:])


@torch.no_grad()
def extract(
    hidden_states: HiddenStates,
    batches: Iterable[tuple[Batch, Tensor]],
    valid_positions: ValidPositions = lambda batch: None,
    device: torch.device | str = "cpu",
) -> Features:
    """Mean-pool `hidden_states` over all `batches` (pairs of a batch and its labels (B,)).

    Under a sharded teacher `hidden_states` is collective: all ranks must call this with as many batches.
    """
    pooled: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    for batch, labels_b in batches:
        moved = batch.to(torch.device(device))
        valid_bt = valid_positions(moved)
        pooled.append(torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in hidden_states(moved)]).cpu())
        labels.append(torch.as_tensor(labels_b, dtype=torch.int64).cpu())
        keys += batch.keys
    return Features(layers_lnd=torch.cat(pooled, dim=1), labels_n=torch.cat(labels), keys=keys)


def mean_over_layers(layers_lnd: Tensor) -> Tensor:
    """(N, D): the mean over layers, each standardised per sample so that none dominates."""
    return torch.nn.functional.layer_norm(layers_lnd, layers_lnd.shape[-1:]).mean(dim=0)
