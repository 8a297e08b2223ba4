"""Steps of several sources: every topology computes what one process does, sources together or in turn."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_mixtures
import torch
from launch import run_ranks

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.run_files.committed import directory_name

WORKER = Path(__file__).with_name("mixing_worker.py")
STEPS = 12
MIXINGS = ("together", "alternate")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OVERLAP = {"overlap_comm": True, "reduce_bucket_size": 3000}
"""With buckets so small that many are on their way at once."""

# Name, ranks, and what the case says.
TOPOLOGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"stage": 1}),
    "zero1 offload": (2, {"stage": 1, "zero": OFFLOAD}),
    "zero2": (2, {"stage": 2}),
    "zero2 offload": (2, {"stage": 2, "zero": OFFLOAD}),
    "zero3": (2, {"stage": 3}),
    "zero3 offload": (2, {"stage": 3, "zero": OFFLOAD}),
    "zero1 overlap": (2, {"stage": 1, "zero": OVERLAP}),
    "zero2 overlap": (2, {"stage": 2, "zero": OVERLAP}),
    "zero2 offload overlap": (2, {"stage": 2, "zero": {**OFFLOAD, **OVERLAP}}),
    "zero3 overlap": (2, {"stage": 3, "zero": OVERLAP}),
    "pp2 overlap": (2, {"pipeline": 2, "zero": OVERLAP}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2}),
}
LIMITS = {"loss": 1e-6, "norm": 1e-5}
WEIGHTS = 2e-5


def case_of(model: str, mixing: str, topology: str | None, steps: int) -> dict[str, Any]:
    settings = {} if topology is None else TOPOLOGIES[topology][1]
    return {"name": f"{model} {mixing} {topology}", "model": model, "mixing": mixing, "steps": [0, steps], **settings}


def train(root: Path, world_size: int, cases: list[dict[str, Any]], timeout: float = 600) -> dict[str, Checkpoint]:
    """Run the cases in one launch; the checkpoint of each."""
    for case in cases:
        case["out"] = str(root / case["name"].replace(" ", "_"))
    listed = root / f"cases-{world_size}-{len(cases)}.json"
    listed.write_text(json.dumps(cases))
    run_ranks(world_size, WORKER, str(listed), timeout=timeout)
    found = {case["name"]: find_newest_valid(Path(case["out"]))[0] for case in cases}
    assert all(found.values()), found
    return found  # type: ignore[return-value]


def differences(ours: Checkpoint, reference: Checkpoint) -> dict[str, float]:
    """The largest: of losses and gradient norms relative, of weights absolute."""
    found = {}
    for name in LIMITS:
        pairs = zip(ours.extra["figures"], reference.extra["figures"], strict=True)
        found[name] = max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs)
    for kind in ("student", "teacher", "state"):
        assert ours.names(kind) == reference.names(kind)
        found[kind] = max(
            (float((ours.tensor(kind, n) - reference.tensor(kind, n)).abs().max()) for n in reference.names(kind)),
            default=0.0,
        )
    return found


def same_training(ours: Checkpoint, reference: Checkpoint, what: str) -> dict[str, float]:
    found = differences(ours, reference)
    for name, difference in found.items():
        assert difference <= LIMITS.get(name, WEIGHTS), f"{what}: {name} differs by {difference:.1e}"
    return found


def compare(root: Path, cases: list[tuple[str, str, str]], steps: int = STEPS) -> list[tuple[str, dict[str, float]]]:
    """Model, mixing and topology of each, against one process."""
    needed = list(dict.fromkeys((model, mixing) for model, mixing, _ in cases))
    references = train(root, 1, [case_of(*each, None, steps) for each in needed], timeout=3000)
    rows = []
    for world_size in (2, 4):
        chosen = [case for case in cases if TOPOLOGIES[case[2]][0] == world_size]
        found = train(root, world_size, [case_of(*case, steps) for case in chosen], timeout=6000) if chosen else {}
        rows += [
            (name, same_training(checkpoint, references[f"{model} {mixing} None"], name))
            for (name, checkpoint), (model, mixing, _) in zip(found.items(), chosen, strict=True)
        ]
    return rows


def test_two_topologies_of_either_mixing_compute_what_one_process_does(tmp_path: Path) -> None:
    cases = [
        ("v2_triple", "together", "zero3 offload"),
        ("v1_pair", "together", "zero1 overlap"),
        ("v2_pair", "together", "tp2 x pp2"),
        ("v1_triple", "alternate", "zero2 offload"),
        ("v1_triple", "alternate", "pp2"),
    ]
    compare(tmp_path, cases, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_topology_computes_what_one_process_does(
    tmp_path: Path, mixing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [(model, mixing, topology) for topology in TOPOLOGIES for model in tiny_mixtures.NAMES]
    rows = compare(tmp_path, cases)
    with capsys.disabled():
        print(f"\n| {mixing} | loss | norm | student | teacher | state |\n|---|---|---|---|---|---|")
        for topology in TOPOLOGIES:
            found = [values for name, values in rows if name.split(" ", 2)[2] == topology]
            worst = " | ".join(f"{max(values[what] for values in found):.1e}" for what in found[0])
            print(f"| {topology} | {worst} |")


@pytest.mark.slow
def test_a_run_of_steps_together_goes_on_bitwise(tmp_path: Path) -> None:
    """The buffers of a new engine hold nothing, those of the old one held the last gradients."""
    kind = {"model": "v2_states", "mixing": "together", "stage": 2, "zero": OFFLOAD}
    half = {"name": "half", "steps": [0, 3], **kind}
    whole = {"name": "whole", "steps": [0, 6], **kind}
    rest = {"name": "rest", "steps": [3, 6], "load": str(tmp_path / "half" / directory_name(3)), **kind}
    found = train(tmp_path, 2, [half, whole, rest])
    for tensors in found["whole"].kinds():
        for name in found["whole"].names(tensors):
            assert torch.equal(found["rest"].tensor(tensors, name), found["whole"].tensor(tensors, name)), name
    assert found["rest"].extra["figures"] == found["whole"].extra["figures"][3:]
