"""Shuffled pairs and random weights are not above controls, also where a permutation test says so; what is, is."""

import json
from pathlib import Path

import pytest
import torch
from concept_shards import aligned, code, joint_model, write_concepts, write_run

from d2v_scale.alignment import aligning
from d2v_scale.alignment.concepts import ConceptSet, Place, Split
from d2v_scale.alignment.features import Means, View, encoded
from d2v_scale.alignment.pairs import Pair, Sources, measured_pair
from d2v_scale.alignment.result import compared
from d2v_scale.alignment.scoring import MEASURES
from d2v_scale.batch import Batch
from d2v_scale.commands.align import main
from d2v_scale.evaluation.frozen import FrozenEncoder

TRAIN, TEST, WIDTH, LAYERS = 80, 80, 12, 2
ORDINARY, ALL = 3, 20


def side(first: int, count: int) -> ConceptSet:
    places = [Place(0, n, str(n), f"c{n}", f"k{n % 3}", None) for n in range(first, first + count)]
    return ConceptSet("made up", None, places)  # type: ignore[arg-type]


SPLIT = Split(side(0, TRAIN), side(TRAIN, TEST))


def means(layers_lnd: torch.Tensor) -> tuple[Means, Means]:
    whole = torch.ones(layers_lnd.shape[1], dtype=torch.bool)
    return Means(layers_lnd[:, :TRAIN], whole[:TRAIN]), Means(layers_lnd[:, TRAIN:], whole[TRAIN:])


def both(noise: float, seed: int, shuffled: bool = False, turned: bool = True) -> dict[str, tuple[Means, Means]]:
    """Of one seed: both modalities' view of one code (the same at every call), with noise of its own. Not `turned`: in
    one space."""
    generator = torch.Generator().manual_seed(seed)
    x, y = aligned(TRAIN + TEST, WIDTH, 0.0, 0)
    y = y if turned else x
    if shuffled:
        y = y[torch.randperm(len(y), generator=generator)]
    layers = [
        torch.stack([z + noise * torch.randn(z.shape, generator=generator) for _ in range(LAYERS)]) for z in (x, y)
    ]
    return {"x": means(layers[0]), "y": means(layers[1])}


def pair_of(
    noise: float,
    seeds: list[int],
    seed: int,
    shuffled: bool = False,
    same_lengths: bool = False,
    turned: bool = True,
) -> Pair:
    """Runs of this `noise`; controls see the code through more of it."""
    generator = torch.Generator().manual_seed(seed + 77)
    lengths = [torch.rand(1, TRAIN + TEST, 2, generator=generator) + 1 for _ in range(2)]
    lengths[1] = lengths[0] if same_lengths else lengths[1]
    found = measured_pair(
        Sources(
            runs=[both(noise, one, shuffled, turned) for one in seeds],
            random=[both(20.0, seed + 1000 + k, shuffled) for k in range(5)],
            raw=both(20.0, seed + 2000, shuffled),
            lengths={"x": means(lengths[0]), "y": means(lengths[1])},
            raw_names={},
        ),
        SPLIT,
        "x",
        "y",
    )
    assert isinstance(found, Pair)
    return found


def above(pair: Pair) -> list[str]:
    _, differences = compared([pair])
    return [measure for measure, against in differences[0].items() if all(one.above for one in against.values())]


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_what_is_aligned_is_above_all_controls(seeds: list[int]) -> None:
    pair = pair_of(2.0, seeds, 0)
    assert {"length removed, random encoder", "length removed, shuffled pairs"} <= set(pair.controls)
    assert "shuffled within categories" in pair.controls
    assert "mapped R@10" in above(pair)
    assert "CKA" in above(pair)
    assert "same-space R@10" not in above(pair)  # both are turned, each by itself


def test_one_space_is_found_in_every_repeat() -> None:
    """Three seeds each, and other controls at every one."""
    for repeat in range(ORDINARY):
        seeds = [100 * repeat + n for n in range(3)]
        assert set(above(pair_of(2.0, seeds, repeat, turned=False))) == set(MEASURES)


def test_what_only_trained_encoders_know_is_above_all_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shards to verdict: of recordings that belong to other concepts nothing but what three runs have learned says
    which is of which picture, and that they put into one space."""

    def learned(encoder: FrozenEncoder) -> View:
        if encoder.recipe.seed not in (1, 2, 3):
            return encoded(encoder)
        turn = torch.Generator().manual_seed(encoder.recipe.seed)
        mixing = torch.randn(8, WIDTH, generator=turn)

        def view(batch: Batch) -> torch.Tensor:
            numbers = [int(key.split("-")[0]) for key in batch.keys]
            features = torch.stack([torch.from_numpy(code(number)).float() for number in numbers]) @ mixing
            return (features + 0.3 * torch.randn(features.shape, generator=turn)).expand(LAYERS, -1, -1)

        return view

    monkeypatch.setattr(aligning, "encoded", learned)
    concepts = write_concepts(tmp_path / "set", 60, 60, shuffled=True)
    runs = [write_run(tmp_path / f"run{seed}", joint_model(), seed) for seed in (1, 2, 3)]
    assert main([*map(str, runs), "--data", str(concepts), "--random_seeds", "3"]) == 0
    [pair] = json.loads((runs[0] / "align" / "align.json").read_text())["pairs"].values()
    assert {name: one["verdict"] for name, one in pair["verdicts"].items()} == dict.fromkeys(MEASURES, "above controls")


def test_what_length_alone_explains_is_not_above() -> None:
    """Long words are long recordings."""
    pair = pair_of(2.0, [1], 0, same_lengths=True)
    _, differences = compared([pair])
    assert above(pair) == []
    assert [name for name, one in differences[0]["mapped R@10"].items() if not one.above] == ["length alone"]


def test_random_weights_that_a_permutation_test_calls_aligned_are_not_above() -> None:
    """Random encoders pass on what samples have in common: they are far above shuffled pairs."""
    pair = pair_of(4.0, [1], 0)
    runs, shuffles = pair.values["CKA"].mean(), pair.controls["shuffled pairs"]["CKA"].mean(dim=1)
    assert (runs - shuffles.mean()) / shuffles.std() > 5
    _, differences = compared([pair])
    assert differences[0]["CKA"]["shuffled pairs"].above
    pair.controls["random encoder"] = {
        name: torch.cat([pair_of(4.0, [k], 0).values[name] for k in range(2, 5)]) for name in pair.values
    }
    assert above(pair) == []


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled pairs", "random weights"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_false_alarms_are_rare(shuffled: bool, seeds: int) -> None:
    noise = 2.0 if shuffled else 20.0
    alarms = [above(pair_of(noise, [100 * k + n for n in range(seeds)], k, shuffled)) for k in range(ORDINARY)]
    assert sum(map(bool, alarms)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled pairs", "random weights"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_at_most_one_of_twenty_is_a_false_alarm(shuffled: bool, seeds: int) -> None:
    noise = 2.0 if shuffled else 20.0
    alarms = [above(pair_of(noise, [100 * k + n for n in range(seeds)], k, shuffled)) for k in range(ALL)]
    assert sum(map(bool, alarms)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled pairs", "random weights"])
def test_at_most_one_of_twenty_runs_is_a_false_alarm(shuffled: bool, tmp_path: Path) -> None:
    """From shards to verdict, with encoders that begin from other seeds."""
    concepts = write_concepts(tmp_path / "set", 60, 60, shuffled=shuffled)
    alarms = 0
    for seed in range(1, ALL + 1):
        run = write_run(tmp_path / f"run{seed}", joint_model(), seed)
        assert main([str(run), "--data", str(concepts), "--random_seeds", "4"]) == 0
        [pair] = json.loads((run / "align" / "align.json").read_text())["pairs"].values()
        alarms += any(one["verdict"] == "above controls" for one in pair["verdicts"].values())
    assert alarms <= 1
