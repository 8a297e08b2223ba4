import pytest
import torch
import torch.nn.functional as F

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets import Place, build, make_targets, tapped_layers
from d2v_scale.errors import ConfigError

PLACE = Place(depth=12, width=5, input_width=None)


def taps(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 7, 5, generator=generator) * 3 + 1 for _ in range(count)]


def test_instance_norm_of_each_tap_is_over_time() -> None:
    expected = sum(F.instance_norm(t.transpose(1, 2)).transpose(1, 2) for t in taps()) / 3
    torch.testing.assert_close(make_targets(taps(), TargetConfig(top_k_layers=3)), expected)


def test_layer_norms_before_and_after_the_mean_are_those_of_vision() -> None:
    expected = F.layer_norm(sum(F.layer_norm(t, (5,)) for t in taps()) / 3, (5,))
    config = TargetConfig(top_k_layers=3, layer_norm="layer", final_norm="layer")
    torch.testing.assert_close(make_targets(taps(), config), expected)


def test_norms_apply_left_to_right() -> None:
    tap = taps(1)
    config = TargetConfig(top_k_layers=1, layer_norm="instance+layer")
    expected = F.layer_norm(F.instance_norm(tap[0].transpose(1, 2)).transpose(1, 2), (5,))
    torch.testing.assert_close(make_targets(tap, config), expected)


def test_batch_norm_uses_batch_statistics() -> None:
    tap = taps(1)
    expected = F.batch_norm(tap[0].transpose(1, 2), None, None, training=True).transpose(1, 2)
    torch.testing.assert_close(make_targets(tap, TargetConfig(top_k_layers=1, layer_norm="batch")), expected)


def test_taps_are_not_written_to() -> None:
    inputs, untouched = taps(), taps()
    make_targets(inputs, TargetConfig(top_k_layers=3, layer_norm="none"))
    for tap, before in zip(inputs, untouched, strict=True):
        assert torch.equal(tap, before)


def test_targets_are_fp32_and_without_gradient_whatever_the_taps_are() -> None:
    inputs = [t.bfloat16().requires_grad_() for t in taps()]
    targets = make_targets(inputs, TargetConfig(top_k_layers=3))
    assert targets.dtype == torch.float32
    assert not targets.requires_grad


def test_a_sum_continued_elsewhere_gives_the_same_targets() -> None:
    config = TargetConfig(top_k_layers=3, final_norm="layer")
    first, second = build(config, PLACE), build(config, PLACE)
    running = first.add(None, taps()[0])
    for tap in taps()[1:]:
        running = second.add(running, tap)
    torch.testing.assert_close(second.targets(second.raw(running, None), {}), make_targets(taps(), config))


def test_a_wrong_number_of_taps_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 taps instead of 2"):
        make_targets(taps(3), TargetConfig(top_k_layers=2))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (TargetConfig(layer_norm="instanse"), "objective.target.layer_norm"),
        (TargetConfig(final_norm="layer+nome"), "objective.target.final_norm"),
        (TargetConfig(kind="logits"), "objective.target.kind"),
    ],
)
def test_an_unknown_name_is_a_config_error_with_its_key(config: TargetConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build(config, PLACE)


def test_more_layers_than_the_model_has_is_a_config_error() -> None:
    assert tapped_layers(TargetConfig(top_k_layers=8), 12) == tuple(range(4, 12))
    with pytest.raises(ConfigError, match="top_k_layers"):
        tapped_layers(TargetConfig(top_k_layers=13), 12)


def test_any_layers_can_be_tapped() -> None:
    assert tapped_layers(TargetConfig(layers=[3, 1]), 5) == (1, 3)
    for wrong in ([], [5], [-1], [2, 2]):
        with pytest.raises(ConfigError, match=r"objective\.target\.layers"):
            tapped_layers(TargetConfig(layers=wrong), 5)
