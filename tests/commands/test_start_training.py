"""`d2v train`: how many processes are started, and as what."""

import sys
from collections.abc import Callable

import pytest

from d2v_scale.commands import start_training
from d2v_scale.parallel import local_ranks
from d2v_scale.programs.own_program import TRAINING

PROGRAM = [sys.executable, "-u", str(TRAINING)]
Start = Callable[..., tuple[int, list[str], dict[str, str]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Calls the verb on a machine of some GPUs; the number of processes, the command, and its environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    started: list[tuple[int, list[str], dict[str, str]]] = []

    def become(command: list[str], environment: dict[str, str]) -> int:
        started.append((1, command, environment))
        return 0

    def run(command: list[str], ranks: int, environment: dict[str, str], *, share_cores: bool) -> int:
        started.append((ranks, command, environment | {"share_cores": str(share_cores)}))
        return 13

    monkeypatch.setattr(local_ranks, "become", become)
    monkeypatch.setattr(local_ranks, "run", run)

    def call(*arguments: str, gpus: int = 0) -> tuple[int, list[str], dict[str, str]]:
        monkeypatch.setattr(local_ranks, "count_gpus", lambda _: gpus)
        code = start_training.main([*arguments])
        found = started.pop()
        assert code == (0 if found[0] == 1 else 13), "the exit code is theirs"
        return found

    return call


@pytest.mark.parametrize(
    ("arguments", "gpus", "ranks"), [((), 0, 1), ((), 1, 1), ((), 8, 8), (("--ranks=2",), 0, 2), (("--ranks=2",), 8, 2)]
)
def test_a_process_for_each_gpu_or_as_many_as_asked_for(
    start: Start, arguments: tuple[str, ...], gpus: int, ranks: int
) -> None:
    found, command, environment = start(*arguments, "--recipe", "x", "--optim.lr=1", gpus=gpus)
    assert found == ranks
    assert command == [*PROGRAM, "--recipe", "x", "--optim.lr=1"]
    assert environment.get("DS_ACCELERATOR") == (None if gpus else "cpu")
    if ranks > 1:
        assert environment["share_cores"] == str(gpus == 0)


def test_a_process_of_another_launcher_is_one_rank(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks, command, environment = start("--recipe", "x", gpus=8)
    assert (ranks, command, environment["RANK"]) == (1, [*PROGRAM, "--recipe", "x"], "3")


@pytest.mark.parametrize(
    ("arguments", "environment", "gpus", "says"),
    [
        (["--ranks", "0"], {}, 0, "--ranks is 0."),
        (["--ranks", "9"], {}, 8, "Give at most 8."),
        (["--ranks", "2"], {"RANK": "0"}, 8, "that a launcher has started"),
        (["--meet", "x", "--ranks", "2"], {"RANK": "0"}, 8, "that a launcher has started"),
        (["--spares", "1"], {}, 8, "there are no other nodes"),
        (["--node", "n1"], {}, 8, "nobody is to be met"),
        (["--meet", "x", "--spares", "1", "--restarts", "0"], {}, 8, "Give 1 or more"),
        (["--meet", "x"], {}, 8, "without --ranks"),
        (["--meet", "absent", "--ranks", "9"], {}, 8, "absent/nodes cannot be read"),
    ],
)
def test_a_number_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    gpus: int,
    says: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local_ranks, "count_gpus", lambda _: gpus)
    assert start_training.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_every_key_is_explained_by_the_training_program(start: Start) -> None:
    for option in ("--help_all", "--list_recipes", "--print_config"):
        ranks, command, _ = start(option, "--recipe", "x", gpus=8)
        assert (ranks, {*command}) == (1, {*PROGRAM, option, "--recipe", "x"})


def test_help_is_that_of_training_with_the_number_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_training.main(["--recipe", "demo_text", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--ranks N" in said
    assert "what demo_text has" in said
