"""Probes that see every position of a frozen encoder's last block: attentive pooling, and characters by CTC."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.evaluation.features import HiddenStates, ValidPositions

EPOCHS = 30
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates, of which the one is taken that does best on a part of the training set."""


@dataclass
class States:
    """One batch, on the CPU."""

    states_btd: Tensor
    """float16: the last block's output, each position standardised over its channels."""
    valid_bt: Tensor
    """True where a position is real."""
    labels: Tensor


@torch.no_grad()
def extract_states(
    hidden_states: HiddenStates,
    batches: Iterable[tuple[Batch, Tensor]],
    valid_positions: ValidPositions,
    device: torch.device | str = "cpu",
) -> list[States]:
    """States of all `batches`, kept in memory: 2 bytes x samples x positions x width."""
    found = []
    for batch, labels in batches:
        moved = batch.to(torch.device(device))
        states_btd = hidden_states(moved)[-1].float()
        valid_bt = valid_positions(moved)
        if valid_bt is None:
            valid_bt = torch.ones(states_btd.shape[:2], dtype=torch.bool)
        normed_btd = F.layer_norm(states_btd, states_btd.shape[-1:])
        found.append(States(normed_btd.half().cpu(), valid_bt.cpu(), labels))
    return found


class AttentivePooling(nn.Module):
    """One learned query attends to all positions; then norm, linear (the convention of I-JEPA and its successors)."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, classes)

    def forward(self, states_btd: Tensor, valid_bt: Tensor) -> Tensor:
        """(B, T, D) to (B, classes)."""
        query_b1d = self.query.expand(states_btd.shape[0], -1, -1)
        pooled_b1d, _ = self.attention(query_b1d, states_btd, states_btd, key_padding_mask=~valid_bt)
        return self.out(self.norm(pooled_b1d[:, 0]))


class PositionLinear(nn.Module):
    """A linear layer at every position."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, outputs)

    def forward(self, states_btd: Tensor, valid_bt: Tensor) -> Tensor:
        """(B, T, D) to (B, T, outputs)."""
        del valid_bt
        return self.out(states_btd)


Loss = Callable[[Tensor, States], Tensor]
"""(logits of a batch, the batch) to the sum of its rows' losses."""


def classification_loss(logits_bc: Tensor, states: States) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits_bc, states.labels.to(logits_bc.device), reduction="sum")


def train_probe(
    make: Callable[[], nn.Module],
    batches: list[States],
    loss: Loss,
    *,
    device: torch.device | str = "cpu",
    epochs: int = EPOCHS,
    rates: tuple[float, ...] = RATES,
    seed: int = 0,
) -> tuple[nn.Module, float]:
    """The trained probe and its learning rate, which does best on a fifth of the batches; it is refitted on all.

    AdamW, cosine schedule. Batches stay as they are and come in random order.
    """
    held = batches[::5] if len(batches) >= 5 else batches
    rest = [batch for k, batch in enumerate(batches) if k % 5] if len(batches) >= 5 else batches
    scores = []
    for rate in rates:
        probe = _fitted(make, rest, loss, rate, device, epochs, seed)
        scores.append((_total(probe, held, loss, device), rate))
    best = min(scores)[1]
    return _fitted(make, batches, loss, best, device, epochs, seed), best


def _fitted(
    make: Callable[[], nn.Module],
    batches: list[States],
    loss: Loss,
    rate: float,
    device: torch.device | str,
    epochs: int,
    seed: int,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = make().to(device).train()
        optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.05)
        total = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / total)))
        for _ in range(epochs):
            for number in torch.randperm(len(batches)).tolist():
                batch = batches[number]
                optimizer.zero_grad()
                (loss(_logits(probe, batch, device), batch) / len(batch.states_btd)).backward()
                optimizer.step()
                schedule.step()
    return copy.deepcopy(probe).eval()


@torch.no_grad()
def _total(probe: nn.Module, batches: list[States], loss: Loss, device: torch.device | str) -> float:
    return sum(float(loss(_logits(probe, batch, device), batch)) for batch in batches)


def _logits(probe: nn.Module, batch: States, device: torch.device | str) -> Tensor:
    return probe(batch.states_btd.to(device).float(), batch.valid_bt.to(device))


@torch.no_grad()
def predictions(probe: nn.Module, batches: list[States], device: torch.device | str = "cpu") -> list[Tensor]:
    """Logits of every batch, on the CPU."""
    return [_logits(probe, batch, device).cpu() for batch in batches]


def attentive_accuracy(train: list[States], test: list[States], device: torch.device | str = "cpu") -> float:
    """Accuracy in [0, 1] of attentive pooling on held-out samples."""
    width = train[0].states_btd.shape[-1]
    classes = int(max(batch.labels.max() for batch in [*train, *test])) + 1
    heads = max(count for count in (1, 2, 4, 8, 12, 16) if (width % count == 0 and width // count >= 16) or count == 1)
    probe, _ = train_probe(lambda: AttentivePooling(width, classes, heads), train, classification_loss, device=device)
    guessed = torch.cat([logits_bc.argmax(dim=-1) for logits_bc in predictions(probe, test, device)])
    return float((guessed == torch.cat([batch.labels for batch in test])).float().mean())
