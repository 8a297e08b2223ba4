"""One model, several topologies: every way to divide it computes what one process computes."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from launch import run_ranks
from topology_worker import other_encoder, recipe_of

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.planning.stages import StageSplit
from d2v_scale.run_files.committed import directory_name

WORKER = Path(__file__).with_name("topology_worker.py")
STEPS = 5
SLEEPS = (0.4, 0.6)
"""Seconds by stage."""

# Name, ranks, and what the case says.
TOPOLOGIES: dict[str, tuple[int, dict]] = {
    "pp2": (2, {"pipeline": 2, "accumulation": 4}),
    "tp2": (2, {"tensor": 2, "accumulation": 4}),
    "pp4": (4, {"pipeline": 4, "accumulation": 4}),
    "pp2 x dp2": (4, {"pipeline": 2, "accumulation": 2}),
    "pp2 x dp2, cpu teacher, offload": (
        4,
        {"pipeline": 2, "accumulation": 2, "placement": "cpu", "zero": {"offload_optimizer": {"device": "cpu"}}},
    ),
    "tp4": (4, {"tensor": 4, "accumulation": 4}),
    "tp2 x dp2, ZeRO-1": (4, {"tensor": 2, "accumulation": 2}),
    "tp2 x dp2, ZeRO-3": (4, {"tensor": 2, "accumulation": 2, "stage": 3}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2, "accumulation": 4}),
}


SCALED = {"model": "v2_text", "lr_scale": {"text": 0.25}}
"""Groups of parameters with rates of their own."""
TOKENS = ("v1_vision+2", "v2_speech+2")
"""With two extra tokens, of which the last one's output is compared in 2.0."""
MUON = {"model": "v2_vision", "muon": True}
"""Matrices of blocks and grouped convolutions, stepped whole wherever their pieces are."""
MUON_ON_TWO: list[dict] = [
    {"name": "muon tp2", **MUON, **TOPOLOGIES["tp2"][1]},
    {"name": "muon ZeRO-3", **MUON, "stage": 3, "accumulation": 2},
]
MORE_MUON_ON_TWO: list[dict] = [
    {"name": "muon pp2", **MUON, **TOPOLOGIES["pp2"][1]},
    {"name": "muon ZeRO-1", **MUON, "stage": 1, "accumulation": 2},
    {"name": "muon ZeRO-2", **MUON, "stage": 2, "accumulation": 2},
    {"name": "muon offload", **MUON, "zero": {"offload_optimizer": {"device": "cpu"}}, "accumulation": 2},
]
FROZEN = {"model": "v2_speech", "teacher": "frozen"}
"""Whose stem the student shares with a teacher that follows it."""
OTHER = {"model": "v2_vision", "teacher": "checkpoint"}
"""Of another width and depth."""
TEACHERS_ON_TWO: list[dict] = [
    {"name": "frozen pp2", **FROZEN, **TOPOLOGIES["pp2"][1]},
    {"name": "frozen ZeRO-3", **FROZEN, "stage": 3, "accumulation": 2},
    {"name": "other tp2", **OTHER, **TOPOLOGIES["tp2"][1]},
    {"name": "other ZeRO-3, cpu teacher", **OTHER, "stage": 3, "accumulation": 2, "placement": "cpu"},
]
MORE_TEACHERS_ON_TWO: list[dict] = [
    {"name": "frozen tp2", **FROZEN, **TOPOLOGIES["tp2"][1]},
    {"name": "frozen ZeRO-2", **FROZEN, "stage": 2, "accumulation": 2},
    {"name": "other ZeRO-1", **OTHER, "stage": 1, "accumulation": 2},
]
KOLEO: list[dict] = [
    {"name": f"koleo_{name}", "model": name, "koleo": 0.2} for name in ("v1_text", "v2_speech", "v2_pair")
]
"""Mean states of samples are kept apart: of all positions of the last block, and of what is visible."""
LAYERS = {"model": "v1_text", "target": {"layers": [0, 2]}}
"""Taps of either stage, and not of the last block."""


def train(root: Path, world_size: int, cases: list[dict]) -> dict[str, Checkpoint]:
    """Run the cases in one launch; the checkpoint of each."""
    for case in cases:
        case.setdefault("steps", [0, STEPS])
        case["out"] = str(root / case["name"].replace(" ", "_"))
    listed = root / f"cases-{world_size}-{len(cases)}.json"
    listed.write_text(json.dumps(cases))
    run_ranks(world_size, WORKER, str(listed), timeout=1800)  # every topology on a busy machine
    found = {case["name"]: find_newest_valid(Path(case["out"]))[0] for case in cases}
    assert all(found.values()), found
    return found  # type: ignore[return-value]


def differences(ours: Checkpoint, reference: Checkpoint) -> dict[str, float]:
    """The largest differences: loss and gradient norm relative, student and teacher absolute."""

    def relative(name: str) -> float:
        pairs = zip(ours.extra[name], reference.extra[name], strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    def absolute(kind: str) -> float:
        assert set(ours.names(kind)) == set(reference.names(kind))
        return max(
            float((ours.tensor(kind, name) - reference.tensor(kind, name)).abs().max()) for name in ours.names(kind)
        )

    assert set(reference.extra["figures"]) == set(ours.extra["figures"])
    # Rank and cosine are of one rank's last micro-batch, which is another one at another number of replicas.
    local = ("target_rank", "target_cosine", "prediction_rank", "prediction_cosine")
    figures = {name: value for name, value in reference.extra["figures"].items() if name not in local}
    observed = max(abs(ours.extra["figures"][k] - v) / max(abs(v), 1e-3) for k, v in figures.items())
    return {
        "loss": relative("losses"),
        "gradient norm": relative("norms"),
        "student": absolute("student"),
        "teacher": absolute("teacher"),
        "figures": observed,
    }


LIMITS = {"loss": 2e-6, "gradient norm": 1e-5, "student": 2e-5, "teacher": 2e-5, "figures": 2e-3}


def cases_of(topology: str, models: tuple[str, ...]) -> list[dict]:
    """Activation checkpointing in every second model."""
    settings = TOPOLOGIES[topology][1]
    return [
        {"name": f"{model} {topology}", "model": model, "checkpointing": index % 2 == 1, **settings}
        for index, model in enumerate(models)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("topologies")


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Checkpoint]:
    """What one process computes."""
    models = (*tiny_models.NAMES, *tiny_models.WIDE, *tiny_models.ARRAYS, *TOKENS, *tiny_models.PAIRS)
    cases = [{"name": model, "model": model, "accumulation": 4} for model in models]
    poisoned = {"name": "skipping", "model": "v2_vision", "accumulation": 4, "poisoned_step": 2}
    return train(
        root,
        1,
        [
            *cases,
            poisoned,
            {"name": "layers", **LAYERS, "accumulation": 4},
            {"name": "scaled", **SCALED, "accumulation": 4},
            {"name": "muon", **MUON, "accumulation": 4},
            {"name": "frozen", **FROZEN, "accumulation": 4},
            {"name": "other", **OTHER, "accumulation": 4},
            *({**case, "accumulation": 4} for case in KOLEO),
        ],
    )


def compare(found: dict[str, Checkpoint], references: dict[str, Checkpoint]) -> list[tuple[str, dict[str, float]]]:
    return [(name, differences(checkpoint, references[name.split()[0]])) for name, checkpoint in found.items()]


def within_limits(rows: list[tuple[str, dict[str, float]]]) -> None:
    for name, found in rows:
        for what, limit in LIMITS.items():
            assert found[what] <= limit, f"{name}: {what} differs by {found[what]:.1e}"


@pytest.fixture(scope="module")
def on_two_ranks(root: Path) -> dict[str, Checkpoint]:
    """Every model in a pipeline; `bf16`; and `delayed`, whose stages sleep in every forward pass of the last step."""
    pipeline = TOPOLOGIES["pp2"][1]
    return train(
        root,
        2,
        [
            *cases_of("pp2", (*tiny_models.NAMES, "v2_maps")),
            *cases_of("tp2", ("v2_speech", "v1_vision_wide")),
            *cases_of("pp2", TOKENS[:1]),
            *cases_of("tp2", TOKENS[1:]),
            *cases_of("pp2", ("v2_pair",)),
            {"name": "layers pp2", **LAYERS, **pipeline},
            {"name": "scaled pp2", **SCALED, **pipeline},
            {**KOLEO[0], "name": "koleo_v1_text pp2", **pipeline},
            {**KOLEO[2], "name": "koleo_v2_pair ZeRO-2", "stage": 2, "accumulation": 2},
            *MUON_ON_TWO,
            *TEACHERS_ON_TWO,
            {"name": "bf16", "model": "v1_vision", "precision": "bf16", **pipeline},
            {"name": "delayed", "model": "v2_text", "steps": [0, 2], "sleeps": SLEEPS, **pipeline},
        ],
    )


def test_two_ranks_compute_what_one_does(
    on_two_ranks: dict[str, Checkpoint], references: dict[str, Checkpoint]
) -> None:
    within_limits(compare({n: c for n, c in on_two_ranks.items() if n.split()[0] in references}, references))
    plain, muon = (references[name].tensor("student", "blocks.0.ffn.fc1.weight") for name in ("v2_vision", "muon"))
    assert float((plain - muon).abs().max()) > 1e-3
    wanted = references["v1_vision"].extra["losses"]
    assert on_two_ranks["bf16"].extra["losses"] == pytest.approx(wanted, rel=1e-3)


def test_a_teacher_that_does_not_follow_keeps_its_weights_bit_for_bit(
    on_two_ranks: dict[str, Checkpoint], references: dict[str, Checkpoint]
) -> None:
    """From the first step to the last: those of the other encoder, or that the student began with."""
    for name, case in (("frozen", FROZEN), ("other", OTHER)):
        source = teacher_source(case)
        divided = [on_two_ranks[one["name"]] for one in TEACHERS_ON_TWO if one["name"].split()[0] == name]
        assert len(divided) == 2
        for found in (references[name], *divided):
            assert set(found.names("teacher")) == set(source)
            assert all(torch.equal(found.tensor("teacher", key), values) for key, values in source.items())


def teacher_source(case: dict) -> dict[str, torch.Tensor]:
    """The weights that the teacher of the case begins with."""
    if case["teacher"] == "checkpoint":
        return other_encoder(case["model"])
    recipe = recipe_of({**case, "accumulation": 4})
    with undivided():
        student, teacher = Student(recipe.model), Teacher(recipe.model, recipe.targets(), recipe.parts())
    initialize(student, recipe.seed)
    kept = {name for name, _ in teacher.named_parameters()}
    return {name: values.detach() for name, values in student.named_parameters() if name in kept}


def test_the_measured_idle_share_is_that_of_the_delays(on_two_ranks: dict[str, Checkpoint]) -> None:
    """The delays are most of the step, so its stages wait as the schedule predicts for costs of their size."""
    expected = StageSplit((range(2), range(2, 4)), SLEEPS).idle(micro_batches=4)
    assert on_two_ranks["delayed"].extra["idle_shares"] == pytest.approx(expected, abs=0.09)


def test_a_step_that_is_not_finite_is_skipped_by_every_stage(
    on_four_ranks: dict[str, Checkpoint], references: dict[str, Checkpoint]
) -> None:
    """A NaN in one micro-batch of one replica: no stage of any replica moves, and the run goes on as one process."""
    ours, reference = on_four_ranks["skipping in a pipeline"], references["skipping"]
    assert ours.manifest.state == reference.manifest.state
    assert ours.manifest.state["skipped_updates"] == 1
    within_limits([("skipping", differences(ours, reference))])


@pytest.fixture(scope="module")
def on_four_ranks(root: Path) -> dict[str, Checkpoint]:
    """Some models in some topologies; then `a` in TP2 x PP2, and `b`, which goes on with it in ZeRO-3."""
    return train(
        root,
        4,
        [
            *cases_of("pp4", ("v1_speech",)),
            *cases_of("pp2 x dp2, cpu teacher, offload", ("v2_speech",)),
            *cases_of("tp2 x pp2", ("v1_pair",)),
            *cases_of("tp2 x dp2, ZeRO-3", ("v2_maps",)),
            {"name": "muon tp2 x ZeRO-3", **MUON, **TOPOLOGIES["tp2 x dp2, ZeRO-3"][1]},
            {"name": "skipping in a pipeline", "model": "v2_vision", "poisoned_step": 2, **TOPOLOGIES["pp2 x dp2"][1]},
            {"name": "half muon", **MUON, "stage": 3, "accumulation": 1, "steps": [0, 3]},
            {"name": "a", "model": "v1_vision", "steps": [0, 2], **TOPOLOGIES["tp2 x pp2"][1]},
            {
                "name": "b",
                "model": "v1_vision",
                "stage": 3,
                "accumulation": 1,
                "steps": [2, 4],
                "load": path(root, "a", 2),
            },
        ],
    )


def test_four_ranks_compute_what_one_does(
    on_four_ranks: dict[str, Checkpoint], references: dict[str, Checkpoint]
) -> None:
    within_limits(compare({n: c for n, c in on_four_ranks.items() if n.split()[0] in references}, references))


def test_checkpoints_cross_topologies(
    root: Path, on_four_ranks: dict[str, Checkpoint], references: dict[str, Checkpoint]
) -> None:
    """TP2 x PP2, then ZeRO-3 on four ranks, then one process, then TP2 x PP2: as if nothing had happened. With Muon
    ZeRO-3 on four ranks, then one process."""
    alone = [
        {"name": "straight", "model": "v1_vision", "accumulation": 4, "steps": [0, 8]},
        {"name": "c", "model": "v1_vision", "accumulation": 4, "steps": [4, 6], "load": path(root, "b", 4)},
        {"name": "whole muon", **MUON, "accumulation": 4, "steps": [3, STEPS], "load": path(root, "half_muon", 3)},
    ]
    found = train(root, 1, alone)
    straight = found["straight"]
    assert_equal(found["whole muon"], references["muon"])
    divided = TOPOLOGIES["tp2 x pp2"][1]
    back = {"name": "d", "model": "v1_vision", "steps": [6, 8], "load": path(root, "c", 6), **divided}
    assert_equal(train(root, 4, [back])["d"], straight)


def assert_equal(ours: Checkpoint, straight: Checkpoint) -> None:
    """Weights, teacher and moments, within the limit of weights."""
    for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        for name in straight.names(kind):
            difference = float((ours.tensor(kind, name) - straight.tensor(kind, name)).abs().max())
            assert difference <= 2e-5, (kind, name, difference)


def path(root: Path, case: str, step: int) -> str:
    """Where a case leaves its checkpoint."""
    return str(root / case / directory_name(step))


@pytest.mark.slow
def test_more_models_and_optimizers_on_two_and_four_ranks(root: Path, references: dict[str, Checkpoint]) -> None:
    """What shares its topology with another case of the ordinary tests."""
    two = [
        *cases_of("tp2", ("v2_cubes", TOKENS[0])),
        *cases_of("pp2", (TOKENS[1], "v1_pair")),
        *MORE_MUON_ON_TWO,
        *MORE_TEACHERS_ON_TWO,
        {**KOLEO[0], "name": "koleo_v1_text ZeRO-3", "stage": 3, "accumulation": 2},
        {**KOLEO[1], "name": "koleo_v2_speech tp2", **TOPOLOGIES["tp2"][1]},
        {**KOLEO[2], "name": "koleo_v2_pair pp2", **TOPOLOGIES["pp2"][1]},
    ]
    four = [
        *cases_of("pp4", ("v2_vision",)),
        *cases_of("pp2 x dp2", ("v1_vision", "v2_text")),
        *cases_of("tp2 x pp2", ("v1_vision", "v2_speech", "v2_vision_wide")),
        *cases_of("tp2 x dp2, ZeRO-3", ("v2_vision_wide", "v1_series", "v2_pair")),
        {"name": "muon tp2 x pp2", **MUON, **TOPOLOGIES["tp2 x pp2"][1]},
        {"name": "scaled ZeRO-3", **SCALED, "stage": 3, "accumulation": 1},
    ]
    within_limits(compare(train(root, 2, two) | train(root, 4, four), references))


@pytest.mark.slow
def test_every_topology_computes_what_one_process_does(
    root: Path, references: dict[str, Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every model in every topology, with and without activation checkpointing."""
    rows = []
    for world_size in (2, 4):
        cases = []
        for topology in (name for name, (ranks, _) in TOPOLOGIES.items() if ranks == world_size):
            for case in cases_of(topology, tiny_models.NAMES):
                cases += [case, {**case, "name": f"{case['name']} *", "checkpointing": not case["checkpointing"]}]
        rows += compare(train(root, world_size, cases), references)
    with capsys.disabled():
        print(report(rows))
    within_limits(rows)


def report(rows: list[tuple[str, dict[str, float]]]) -> str:
    """A table: the largest difference of each topology over models, with and without activation checkpointing."""
    lines = ["", "| topology | loss | gradient norm | student | teacher |", "|---|---|---|---|---|"]
    for topology in TOPOLOGIES:
        found = [values for name, values in rows if name.split(" ", 1)[1].removesuffix(" *") == topology]
        worst = {what: max(values[what] for values in found) for what in LIMITS}
        cells = " | ".join(f"{worst[what]:.1e}" for what in ("loss", "gradient norm", "student", "teacher"))
        lines.append(f"| {topology} | {cells} |")
    return "\n".join(lines)
