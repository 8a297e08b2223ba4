"""Probes of every position, on states of which the answer is known."""

import torch
from torch import Tensor

from d2v_scale.data.labels import Vocabulary
from d2v_scale.evaluation.position_probes import PositionLinear, States, attentive_accuracy, predictions, train_probe
from d2v_scale.finetuning.decoding import greedy
from d2v_scale.finetuning.step import ctc_loss_sum


def marked(batches: int, seed: int) -> list[States]:
    """The class is the sign of one channel at the one position that another channel marks; the mean says little."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        states_btd = torch.randn(32, 12, 16, generator=generator)
        states_btd[..., 0] = -4.0
        at_b = torch.randint(0, 10, (32,), generator=generator)
        labels_b = torch.randint(0, 2, (32,), generator=generator)
        rows = torch.arange(32)
        states_btd[rows, at_b, 0] = 4.0
        states_btd[rows, at_b, 1] = 2.0 * labels_b - 1.0
        valid_bt = torch.arange(12)[None].expand(32, -1) < 10
        # What padding says is wrong.
        states_btd[:, 10:, 0] = 9.0
        found.append(States(states_btd.half(), valid_bt, labels_b))
    return found


def test_attention_finds_what_the_mean_hides_and_never_looks_at_padding() -> None:
    train, test = marked(10, 0), marked(4, 1)
    assert attentive_accuracy(train, test) > 0.95


def test_a_ctc_head_learns_what_the_frames_say() -> None:
    vocabulary = Vocabulary("ab")
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(10):
        characters_bu = torch.randint(5, 7, (8, 3), generator=generator)
        # Each character lasts two frames, then comes silence.
        frames_bt = torch.stack((characters_bu, characters_bu, torch.zeros_like(characters_bu)), dim=2).flatten(1)
        states_btd = torch.nn.functional.one_hot(frames_bt, 8).float()
        batches.append(States(states_btd.half(), torch.ones(8, 9, dtype=torch.bool), characters_bu))

    def loss(logits_btc: Tensor, states: States) -> Tensor:
        return ctc_loss_sum(logits_btc, states.labels, states.valid_bt.sum(dim=1))

    head, _ = train_probe(lambda: PositionLinear(8, len(vocabulary)), batches, loss, rates=(1e-2, 1e-1))
    for logits_btc, states in zip(predictions(head, batches, "cpu"), batches, strict=True):
        for row, characters_u in zip(logits_btc, states.labels.tolist(), strict=True):
            assert greedy(row.log_softmax(-1).numpy()) == characters_u
