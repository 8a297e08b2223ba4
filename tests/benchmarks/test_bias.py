"""The ways to add a bias compute the same, and each gets a ratio."""

import pytest
import torch
import torch.nn.functional as F

from d2v_scale.benchmarks import bias


def test_folded_bias_is_exact() -> None:
    q, k, v = torch.randn(3, 2, 3, 10, 8)
    added = torch.randn(1, 3, 10, 10)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    assert torch.allclose(bias.folded(q, k, v, added), expected, atol=1e-5)


def test_every_way_gets_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias.cpu_attention, "SHORTEST_WITHOUT_DROPOUT", 8)
    scale = torch.ones((), requires_grad=True)
    row = bias.compare("test", lambda: torch.randn(1, 2, 8, 8) * scale, 2, 1)
    for way in ("added", "learned", "folded", "built"):
        assert f" {way} " in row
    assert row.count("x") >= 4
