"""submit.py with a stand-in for sbatch that writes down what it was asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.commands.submit import template_of

PROGRAM = Path(__file__).resolve().parents[2] / "tools/submit.py"


def submit(tmp_path: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run submit.py; returns what it printed and the arguments that sbatch got."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\necho "4711;cluster"\n')
    sbatch.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "D2V_SCALE_"))}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], env=env, capture_output=True, text=True)
    return done, (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_template_of_the_recipe_with_the_training_arguments_behind_it(tmp_path: Path) -> None:
    recipe = "d2v2_vision_large"
    done, asked = submit(tmp_path, "--recipe", recipe, "--nodes", "8", "--optim.lr", "1e-3", "--time", "1-00:00:00")
    assert done.returncode == 0, done.stderr
    template = str(PROGRAM.parents[1] / "slurm/pretrain_large.sh")
    assert asked[0] == "--parsable"
    assert asked[1:3] == ["--nodes=8", "--time=1-00:00:00"]
    assert asked[3:] == [template, "--optim.lr", "1e-3", "--recipe", recipe]
    assert "job 4711\n" in done.stdout
    assert "runs/d2v-large-4711 " in done.stdout


def test_spare_nodes_are_asked_for_beside_those_that_train(tmp_path: Path) -> None:
    recipe, template = "d2v2_vision_large", str(PROGRAM.parents[1] / "slurm/pretrain_large.sh")
    done, asked = submit(tmp_path, "--recipe", recipe, "--nodes", "8", "--spares", "2", "--restarts", "5")
    assert done.returncode == 0, done.stderr
    assert asked[1:] == ["--nodes=10", "--no-kill", template, "--spares", "2", "--restarts", "5", "--recipe", recipe]
    assert submit(tmp_path, "--recipe", recipe, "--spares", "1")[1][1] == "--nodes=5", "the template has four"
    (tmp_path / "asked").unlink()
    done, asked = submit(tmp_path, "--recipe", recipe, "--spares", "-1")
    assert (done.returncode, asked) == (2, [])
    assert "--spares is -1" in done.stderr


def test_a_template_that_leaves_the_number_of_nodes_open_is_asked_about_only_where_it_counts(tmp_path: Path) -> None:
    template = tmp_path / "own.sh"
    template.write_text("#!/bin/bash\n#SBATCH --nodes=2-4\n")
    arguments = ("--recipe", "d2v2_vision_large", "--template", str(template))
    done, asked = submit(tmp_path, *arguments)
    assert (done.returncode, asked[1]) == (0, str(template))
    (tmp_path / "asked").unlink()
    done, asked = submit(tmp_path, *arguments, "--spares", "1")
    assert (done.returncode, asked) == (2, [])
    assert "template asks for --nodes=2-4. Say with --nodes how many train." in done.stderr
    assert submit(tmp_path, *arguments, "--spares", "1", "--nodes", "3")[1][1] == "--nodes=4"


def test_what_holds_in_the_end_is_shown_with_its_origin(tmp_path: Path) -> None:
    variables = {"SBATCH_TIMELIMIT": "60", "SBATCH_PARTITION": "gpu", "SBATCH_GPUS_PER_NODE": "4"}
    done, _ = submit(tmp_path, "--recipe", "d2v2_text_base", "--gpus", "2", **variables)
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert shown["--time=60"] == "SBATCH_TIMELIMIT"
    assert shown["--partition=gpu"] == "SBATCH_PARTITION"
    assert shown["--gpus-per-node=2"] == "asked for here"
    assert shown["--signal=B:USR1@300"] == "template"


def test_the_topology_is_planned_for_a_kind_of_gpu(tmp_path: Path) -> None:
    arguments = ("--nodes", "4", "--gpus", "h100:8", "--device", "h100", "--data", "/shards/{0..9}.tar")
    done, asked = submit(tmp_path, "--recipe", "d2v2_vision_7b", *arguments, "--accumulation", "2")
    assert done.returncode == 0, done.stderr
    assert "topologies fit, fastest first" in done.stdout
    config = Path(asked[asked.index("--deepspeed_config") + 1])
    assert config.is_file()
    assert config.is_absolute()
    assert {"--parallel.tensor", "--parallel.pipeline", "--teacher.placement"} <= set(asked)
    assert [asked[i + 1] for i, word in enumerate(asked) if word == "--accumulation"] == ["2"], "the user's counts"


def test_a_model_that_does_not_fit_is_not_submitted(tmp_path: Path) -> None:
    arguments = ("--nodes", "1", "--gpus", "1", "--device", "a100", "--data", "/shards/{0..9}.tar")
    thirty_billion = ("--model.backbone.width=7168", "--model.backbone.heads=56", "--model.backbone.ffn=28672")
    depth = ("--model.backbone.depth=48", "--objective.target.top_k_layers=36")
    done, asked = submit(tmp_path, "--recipe", "d2v2_vision_7b", *arguments, *thirty_billion, *depth)
    assert done.returncode == 2
    assert "finds no way" in done.stderr
    assert asked == []


def test_dry_run_only_lets_slurm_check(tmp_path: Path) -> None:
    done, asked = submit(tmp_path, "--recipe", "d2v2_vision_huge14", "--dry_run")
    assert asked[0] == "--test-only"
    assert "job 4711" not in done.stdout


def test_a_template_for_every_recipe() -> None:
    recipes = (PROGRAM.parents[1] / "d2v_scale/recipes").glob("*.yaml")
    assert all(template_of(recipe.stem).is_file() for recipe in recipes)
    assert template_of("d2v2_vision_huge14").name == "pretrain_huge.sh"
    assert template_of("demo_vision").name == "pretrain_base.sh"


@pytest.mark.parametrize("fault", ["no template", "no sbatch"])
def test_what_is_missing_is_said(tmp_path: Path, fault: str) -> None:
    if fault == "no template":
        done, _ = submit(tmp_path, "--recipe", "x", "--template", "slurm/none.sh")
    else:
        env = {"PATH": str(tmp_path)}
        done = subprocess.run([sys.executable, str(PROGRAM), "--recipe", "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert fault in done.stderr
