"""Targets with state, targets of the input, and targets that users write."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.data2vec.config import ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.targets import TARGETS, Place, State, Target, build, check, check_all, make
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.recipe import Recipe

PLACE = Place(depth=4, width=6, input_width=9)
ONE_TAP = {"top_k_layers": 1, "layer_norm": "none"}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(target: Target, state: State, *raws: Tensor, counted: list[Tensor] | None = None) -> State:
    """The state after a step over these micro-batches."""
    masks = counted or [torch.ones(raw.shape[:2]) for raw in raws]
    said = [target.statistics(raw, mask, state) for raw, mask in zip(raws, masks, strict=True)]
    return target.moved(state, {name: sum(one[name].double() for one in said) for name in said[0]})  # type: ignore[misc]


def test_the_last_layer_is_one_tap() -> None:
    target = build(TargetConfig(kind="last_layer", layer_norm="none"), PLACE)
    assert target.layers == (3,)
    tap = vectors(2, 3, 6)
    assert torch.equal(make(target, target.add(None, tap), None, None, {}).targets_btd, tap)


@pytest.mark.parametrize("kind", ["last_layer", "input"])
def test_layers_for_a_kind_that_has_no_choice_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"objective\.target\.layers"):
        build(TargetConfig(kind=kind, layers=[1]), PLACE)


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_our_kinds_keep_the_contract_that_users_are_held_to(kind: str) -> None:
    named = f"d2v_scale.data2vec.targets:{TARGETS[kind].__name__}"
    assert type(check(TargetConfig(kind=named, top_k_layers=2), PLACE)) is TARGETS[kind]


def test_patches_are_what_the_stem_reads() -> None:
    """In its order: a convolution with one weight for each value gives them back."""
    model, batch = tiny_models.model("v1_vision"), tiny_models.batch("v1_vision")
    stem = modalities.of(model, "vision")
    values = stem.input_values(batch)
    assert values.shape == (3, 16, 48)
    assert stem.input_width == 48
    patches = torch.nn.functional.unfold(batch.inputs, 4, stride=4).transpose(1, 2)
    ours = patches.view(3, 16, 3, 16).transpose(2, 3).reshape(3, 16, 48)
    assert torch.equal(values, ours)


def test_frames_are_the_samples_in_the_middle_of_what_the_convolutions_see() -> None:
    model, batch = tiny_models.model("v1_speech"), tiny_models.batch("v1_speech")
    values = modalities.of(model, "speech").input_values(batch)
    assert values.shape == (3, 19, 320)
    # 400 samples are seen of each frame, 320 apart.
    assert torch.equal(values.flatten(1), batch.inputs[:, 40 : 40 + 19 * 320])


def test_tokens_are_no_values() -> None:
    recipe = Recipe(model=tiny_models.model("v2_text"))
    recipe.objective.target = TargetConfig(kind="input")
    with pytest.raises(ConfigError, match=r"objective\.target\.kind: is 'input'"):
        recipe.target_widths()


def test_inputs_have_mean_0_and_variance_1_at_every_position() -> None:
    target = build(TargetConfig(kind="input"), PLACE)
    made = make(target, None, 5 + 3 * vectors(2, 3, 9), None, {})
    assert (target.width, target.layers) == (9, ())
    assert made.targets_btd.mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(made.targets_btd.var(-1, unbiased=False), torch.ones(2, 3))


def test_whitened_targets_are_so_over_all_that_was_seen() -> None:
    target = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": 0.5}), PLACE)
    scale, shift = torch.tensor([1e-2, 1.0, 5.0, 1.0, 1.0, 1.0]), torch.tensor([100.0, 0.0, -3.0, 0.0, 0.0, 0.0])
    state = target.initial_state()
    assert torch.equal(target.targets(vectors(1, 2, 6), state), vectors(1, 2, 6) * torch.rsqrt(torch.tensor(1 + 1e-5)))
    for number in range(8):
        state = step(target, state, vectors(4, 200, 6, seed=number) * scale + shift)
    torch.testing.assert_close(state["mean"], shift, atol=0.05 * 5, rtol=0)
    torch.testing.assert_close(state["variance"].sqrt(), scale, rtol=0.05, atol=0)
    made = target.targets(vectors(4, 200, 6, seed=9) * scale + shift, state)
    torch.testing.assert_close(made.std((0, 1))[1:], torch.ones(5), rtol=0.06, atol=0)


@settings(max_examples=30, deadline=None)
@given(momentum=st.floats(0, 0.99), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_running_moments_are_the_weighted_moments_of_all_steps(momentum: float, sizes: list[int], seed: int) -> None:
    """Each step weighs `momentum` times what the next one does, however many positions it has."""
    target = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": momentum}), PLACE)
    state, seen = target.initial_state(), []
    for number, size in enumerate(sizes):
        raw = 3 + vectors(size, 4, 6, seed=seed + number)
        seen.append(raw.flatten(0, 1).double())
        state = step(target, state, raw)
    weights = torch.tensor([momentum ** (len(sizes) - 1 - i) for i in range(len(sizes))], dtype=torch.float64)
    weights /= weights.sum()
    mean = sum(w * x.mean(0) for w, x in zip(weights, seen, strict=True))
    square = sum(w * (x - mean).square().mean(0) for w, x in zip(weights, seen, strict=True))
    torch.testing.assert_close(state["mean"].double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state["variance"].double(), square, atol=1e-5, rtol=1e-4)


FULL = {"covariance": "full"}


@settings(max_examples=20, deadline=None)
@given(momentum=st.floats(0, 0.99), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_whole_covariance_is_that_of_a_plain_computation(momentum: float, sizes: list[int], seed: int) -> None:
    """`torch.cov` over all positions of all steps, each step weighing `momentum` times the next one."""
    target = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": momentum, **FULL}), PLACE)
    mixing = vectors(6, 6, seed=seed)
    state, seen, weights = target.initial_state(), [], []
    for number, size in enumerate(sizes):
        raw = 3 + vectors(size, 4, 6, seed=seed + number) @ mixing
        seen.append(raw.flatten(0, 1).double())
        weights.append(torch.full((4 * size,), momentum ** (len(sizes) - 1 - number) / (4 * size), dtype=torch.float64))
        state = step(target, state, raw[:1], raw[1:]) if size > 1 else step(target, state, raw)
    wanted = torch.cov(torch.cat(seen).T, aweights=torch.cat(weights), correction=0)
    torch.testing.assert_close(state["covariance"].double(), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(state["covariance"], state["covariance"].T)
    # A single step without a past gives the diagonal kind's moments.
    alone = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": momentum}), PLACE)
    start = alone.initial_state()
    for x_nd in seen:
        start = step(alone, start, x_nd.float()[None])
    torch.testing.assert_close(state["covariance"].diagonal(), start["variance"], atol=1e-4, rtol=1e-4)


def test_no_channel_of_wholly_whitened_targets_tells_of_another() -> None:
    target = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": 0.0, **FULL}), PLACE)
    nothing = target.targets(vectors(1, 2, 6), target.initial_state())
    torch.testing.assert_close(nothing, vectors(1, 2, 6), atol=1e-4, rtol=1e-4)
    raw = 2 + vectors(4, 100, 6) @ vectors(6, 6, seed=1)
    made = target.targets(raw, step(target, target.initial_state(), raw)).flatten(0, 1)
    torch.testing.assert_close(torch.cov(made.T, correction=0), torch.eye(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(made.mean(0), torch.zeros(6), atol=1e-3, rtol=0)


def test_channels_that_depend_on_each_other_are_whitened_all_the_same() -> None:
    """A layer norm's add up to 0; and a collapsed teacher's have no spread at all."""
    target = build(TargetConfig(kind="whitened", **ONE_TAP, options={"momentum": 0.0, **FULL}), PLACE)
    raw = torch.nn.functional.layer_norm(vectors(4, 100, 6), (6,))
    for x in (raw, 1e4 * raw, torch.ones(4, 100, 6), torch.full((4, 100, 6), 1e6)):
        state = step(target, target.initial_state(), x)
        made = target.targets(x, state)
        assert bool(torch.isfinite(made).all())
        assert float(made.abs().max()) < 20
    spoilt = {**target.initial_state(), "covariance": -torch.eye(6)}
    assert bool(torch.isfinite(target.targets(raw, spoilt)).all())


@pytest.mark.parametrize("kind", ["whitened", "codes"])
def test_padding_and_how_a_step_is_divided_do_not_matter(kind: str) -> None:
    target = build(TargetConfig(kind=kind, **ONE_TAP), PLACE)
    start = step(target, step(target, target.initial_state(), vectors(3, 5, 6)), vectors(3, 5, 6, seed=1))
    whole = vectors(4, 5, 6, seed=2)
    padded = torch.cat((whole, torch.full((1, 5, 6), 1e3)))
    counted = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])[:, None].expand(5, 5)
    wanted = step(target, start, whole)
    for found in (step(target, start, whole[:1], whole[1:]), step(target, start, padded, counted=[counted])):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name])
    nothing = step(target, start, padded, counted=[torch.zeros(5, 5)])
    if kind == "whitened":
        assert all(torch.equal(nothing[name], start[name]) for name in start)
    assert all(bool(torch.isfinite(x).all()) for x in nothing.values())


def clusters(count: int, seed: int) -> Tensor:
    centres = 10 * torch.eye(6)[:count]
    which = torch.randint(count, (8, 16), generator=torch.Generator().manual_seed(seed))
    return centres[which] + 0.1 * vectors(8, 16, 6, seed=seed + 1000)


def learn(target: Target, state: State, count: int, steps: int) -> State:
    for number in range(steps):
        state = step(target, state, clusters(count, number))
    return state


def error(target: Target, state: State, count: int) -> float:
    raw = clusters(count, 999)
    return float((target.targets(raw, state) - raw).square().mean() / raw.var((0, 1)).mean())


def test_a_codebook_grows_while_much_is_unexplained() -> None:
    config = TargetConfig(kind="codes", **ONE_TAP, options={"codes": 32, "momentum": 0.9, "grow_above": 0.02})
    target = build(config, PLACE)
    assert float(target.initial_state()["used"].sum()) == 1
    state = learn(target, target.initial_state(), 3, 60)
    few = float(state["used"].sum())
    assert 3 <= few < 32
    assert error(target, state, 3) < 0.05
    # The vocabulary is open: what comes new gets codes of its own.
    more = learn(target, state, 6, 120)
    assert error(target, state, 6) > 0.2
    assert error(target, more, 6) < 0.05
    assert float(more["used"].sum()) > few


def test_a_codebook_never_has_more_codes_than_it_may_and_gives_up_those_it_does_not_need() -> None:
    target = build(TargetConfig(kind="codes", **ONE_TAP, options={"codes": 4, "momentum": 0.5}), PLACE)
    state = learn(target, target.initial_state(), 4, 30)
    assert float(state["used"].sum()) == 4
    moved = state
    for number in range(40):
        moved = step(target, moved, clusters(1, number))
    # The others were given up, and their places went to halves of the one that is in use.
    centres = moved["sum"][moved["used"] > 0] / moved["count"][moved["used"] > 0][:, None]
    assert float((centres - 10 * torch.eye(6)[0]).abs().max()) < 1


def test_splitting_a_code_keeps_what_was_counted() -> None:
    target = build(TargetConfig(kind="codes", **ONE_TAP, options={"codes": 8, "momentum": 0.5}), PLACE)
    raw = vectors(4, 50, 6)
    state = step(target, target.initial_state(), raw)
    assert float(state["used"].sum()) == 2
    torch.testing.assert_close(state["count"].sum(), torch.tensor(100.0))
    torch.testing.assert_close(state["sum"].sum(0), 0.5 * raw.sum((0, 1)), atol=1e-3, rtol=1e-4)


class Projected(Target):
    """A user's kind: a fixed projection to three channels, and how many positions there were."""

    defaults: ClassVar = {"gain": 1.0}

    def __init__(self, config: TargetConfig, place: Place) -> None:
        super().__init__(config, place)
        self.width = 3

    def targets(self, raw_btd: Tensor, state: State) -> Tensor:
        return self.options["gain"] * raw_btd[..., :3]

    def initial_state(self) -> State:
        return {"positions": torch.zeros(())}

    def statistics(self, raw_btd: Tensor, counted_bt: Tensor, state: State) -> dict[str, Tensor]:
        return {"positions": counted_bt.sum()}

    def moved(self, state: State, sums: dict[str, Tensor]) -> State:
        return {"positions": state["positions"] + sums["positions"].float()}


class WrongWidth(Target):
    def __init__(self, config: TargetConfig, place: Place) -> None:
        super().__init__(config, place)
        self.width = 3


class HalfState(Projected):
    def initial_state(self) -> State:
        return {"positions": torch.zeros((), dtype=torch.bfloat16)}


class GrowingState(Projected):
    def moved(self, state: State, sums: dict[str, Tensor]) -> State:
        return {"positions": torch.zeros(2)}


class Silent(Projected):
    def statistics(self, raw_btd: Tensor, counted_bt: Tensor, state: State) -> dict[str, Tensor]:
        return {}


class Raises(Target):
    def targets(self, raw_btd: Tensor, state: State) -> Tensor:
        raise RuntimeError("no such thing")


class NotFinite(Target):
    def targets(self, raw_btd: Tensor, state: State) -> Tensor:
        return raw_btd / 0


class Shorter(Target):
    def add(self, running_btd: Tensor | None, tap_btd: Tensor) -> Tensor:
        return tap_btd.float()[..., :2]


class Leaves(Target):
    def __init__(self, config: TargetConfig, place: Place) -> None:
        raise SystemExit(3)


class ManyLines(Target):
    def __init__(self, config: TargetConfig, place: Place) -> None:
        raise RuntimeError("first\n  second")


class NoTarget:
    pass


def test_a_users_target_is_built_by_its_name() -> None:
    target = check(TargetConfig(kind=f"{__name__}:Projected", top_k_layers=2, options={"gain": 2.0}), PLACE)
    assert (target.width, target.raw_width, target.layers) == (3, 6, (2, 3))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nowhere.to_be:Found", "ModuleNotFoundError"),
        ("NoTarget:", "cannot be imported"),
        (f"{__name__}:Absent", "AttributeError"),
        (f"{__name__}:NoTarget", "no subclass"),
        (f"{__name__}:WrongWidth", "targets gives (2, 3, 6) of torch.float32 instead of (2, 3, 3)"),
        (f"{__name__}:HalfState", "initial_state gives 'positions'"),
        (f"{__name__}:GrowingState", "moved gives {'positions': (2,)}"),
        (f"{__name__}:Silent", "must both be empty"),
        (f"{__name__}:Raises", "RuntimeError: no such thing"),
        (f"{__name__}:Leaves", "failed (SystemExit: 3)"),
        (f"{__name__}:ManyLines", "RuntimeError: first second"),
        (f"{__name__}:NotFinite", "not finite"),
        (f"{__name__}:Shorter", "add gives (2, 3, 2)"),
        ("logits", "unknown target"),
    ],
)
def test_what_breaks_the_contract_is_refused_before_anything_is_built(kind: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(TargetConfig(kind=kind, top_k_layers=2), PLACE)
    assert error.value.key == "objective.target.kind"
    assert said in str(error.value)


def test_a_module_that_ends_the_program_when_imported_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without a guard: the run ended with the script's exit code and no word."""
    (tmp_path / "script_without_guard.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported \(SystemExit: 0\)"):
        check(TargetConfig(kind="script_without_guard:Mine"), PLACE)


@pytest.mark.parametrize("kind", ["", "script:"])
def test_a_kind_without_a_name_is_refused_as_a_kind(kind: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_all([TargetConfig(kind="last_layer"), TargetConfig(kind=kind)], PLACE)
    assert error.value.key == "objective.further_targets.0.kind"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("average_top_k", {"momentum": 0.9}, "has no option 'momentum'"),
        ("whitened", {"codes": 3}, "It has momentum"),
        ("whitened", {"momentum": 1.5}, "momentum"),
        ("whitened", {"covariance": "whole"}, "Choose one of diagonal, full"),
        ("whitened", {"covariance": 1.0}, "Choose one of diagonal, full"),
        ("whitened", {"momentum": "full"}, "finite number"),
        ("whitened", {"momentum": math.nan}, "finite"),
        ("codes", {"codes": 2.5}, "whole number"),
        ("codes", {"codes": 0}, "whole number"),
        ("codes", {"grow_above": -1}, "grow_above"),
    ],
)
def test_options_that_mean_nothing_are_refused(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        check(TargetConfig(kind=kind, top_k_layers=2, options=options), PLACE)
    assert said in str(error.value)


def test_a_target_wider_than_the_cls_output_is_refused_with_its_loss() -> None:
    recipe = Recipe(model=tiny_models.model("v2_vision"), objective=ObjectiveConfig(target=TargetConfig(kind="input")))
    recipe.objective.masking.kind, recipe.objective.masking.prob, recipe.objective.loss.cls_weight = "random", 0.5, 1.0
    with pytest.raises(ConfigError, match=r"objective\.loss\.cls_weight: compares an output of width 32.*width 48"):
        recipe.check(1)
