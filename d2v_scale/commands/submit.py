"""Submit a training to Slurm: picks the recipe's template, shows what Slurm is asked for, submits, says where to look.

    d2v submit --recipe d2v2_vision_large --nodes 8 --data '/shards/in1k-{0000..1281}.tar' --optim.lr 1e-3
    d2v submit --recipe d2v2_vision_7b --nodes 32 --device h100 --data '/shards/in1k-{0000..1281}.tar'

With --spares N the job gets N nodes more than train, which take the places of lost ones (docs/faults.md).
With --device the topology and the DeepSpeed JSON are those that `d2v plan` finds fastest among those that fit.
Options of this tool come first by name; everything else goes to train.py. SBATCH_* variables of slurm/site.env count.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# A login node may have nothing but Python: what is imported here needs no other package.
from d2v_scale import templates
from d2v_scale.answers.help_text import VerbParser
from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.programs.own_program import own_program

TEMPLATES = ("base", "large", "huge", "1b", "7b")


def template_of(recipe: str) -> Path:
    """The template whose size the recipe's name carries; the base one if it carries none."""
    size = next((size for size in TEMPLATES if size in Path(recipe).stem), "base")
    return templates.folder("slurm") / f"pretrain_{size}.sh"


def sbatch_options(options: argparse.Namespace, training: int) -> list[str]:
    """What is asked for on sbatch's command line, where it counts for more than the template and the environment.
    `training`: nodes that train, which counts with spare ones."""
    asked = {
        "nodes": training + options.spares if options.spares else options.nodes,
        "gpus-per-node": options.gpus,
        "time": options.time,
        "partition": options.partition,
        "job-name": options.job_name,
    }
    # By itself Slurm ends a job that loses a node.
    whole = ["--no-kill"] if options.spares else []
    return [*(f"--{name}={value}" for name, value in asked.items() if value is not None), *whole]


def effective(template: Path, asked: list[str], environment: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Directive -> (value, where it comes from) after the environment and the command line have had their say."""
    found: dict[str, tuple[str, str]] = {}
    for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", template.read_text(), re.MULTILINE):
        found[name] = (value, "template")
    renamed = {"TIMELIMIT": "time", "MEM_PER_NODE": "mem", "ARRAY_INX": "array"}
    for variable, value in sorted(environment.items()):
        if variable.startswith("SBATCH_"):
            short = variable.removeprefix("SBATCH_")
            found[renamed.get(short, short.lower().replace("_", "-"))] = (value, variable)
    for option in asked:
        name, _, value = option.removeprefix("--").partition("=")
        found[name] = (value, "asked for here")
    return found


PLANNED = "start it with"
"""Begins the line of `d2v plan` that holds the arguments of its best option."""


def planned(options: argparse.Namespace, for_training: list[str], nodes: int, gpus: int) -> list[str] | None:
    """Arguments of train.py that `d2v plan` proposes and the user did not give; None: nothing fits."""
    program = own_program("plan", "--recipe", options.recipe, "--show", "1")
    program += ["--nodes", str(nodes), "--gpus", str(gpus), "--device", options.device, *for_training]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(PLANNED)), None)
    if done.returncode != 0 or line is None:
        return None
    words = line.removeprefix(PLANNED).split()
    proposed = dict(zip(words[::2], words[1::2], strict=True))
    proposed["--deepspeed_config"] = str(templates.root() / proposed["--deepspeed_config"])
    chosen = {name for name in proposed if _argument(for_training, name.removeprefix("--")) is not None}
    return [word for name, value in proposed.items() if name not in chosen for word in (name, value)]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="recipe of the package or a YAML file")
    parser.add_argument("--nodes", type=int, help="number of nodes that train; default: the template's")
    parser.add_argument("--spares", type=int, default=0, help="nodes beside them, to take the place of a lost one")
    parser.add_argument("--gpus", help="GPUs on each node, such as 8 or h100:8; default: the template's")
    parser.add_argument("--device", help="plan the topology for this kind of GPU: h100, h200, a100")
    parser.add_argument("--time", help="time limit, such as 2-00:00:00; the job continues after it")
    parser.add_argument("--partition", help="partition")
    parser.add_argument("--job_name", help="name of the job and of its run directory")
    parser.add_argument("--template", type=Path, help="template to use instead of the recipe's")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="only let Slurm check it (--test-only)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Submit, and say where to look."""
    options, for_training = make_parser().parse_known_args(arguments)
    template = options.template or template_of(options.recipe)
    if not template.is_file():
        print(f"error: no template {template}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if shutil.which("sbatch") is None:
        print("error: no sbatch here: run this on a login node of the cluster", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.spares < 0:
        print(f"error: --spares is {options.spares}. Give 0 or more.", file=sys.stderr)
        return EXIT_BAD_INPUT
    training = options.nodes or 0
    if not training and (options.spares or options.device is not None):
        said, source = effective(template, [], dict(os.environ)).get("nodes", ("1", ""))
        if not said.isdecimal():
            print(f"error: {source} asks for --nodes={said}. Say with --nodes how many train.", file=sys.stderr)
            return EXIT_BAD_INPUT
        training = int(said)
    asked = sbatch_options(options, training)
    holds = effective(template, asked, dict(os.environ))
    if options.device is not None:
        gpus = int(holds.get("gpus-per-node", ("8", ""))[0].rpartition(":")[2])
        proposed = planned(options, for_training, training, gpus)
        if proposed is None:
            print("error: d2v plan finds no way to train this on that many devices", file=sys.stderr)
            return EXIT_BAD_INPUT
        for_training += proposed
    print(f"{template}:")
    for name, (value, source) in holds.items():
        print(f"  {'--' + name + ('=' + value if value else ''):34}  {source}")
    spares = ["--spares", str(options.spares)] if options.spares else []
    command = ["sbatch", *asked, str(template), *spares, *for_training, "--recipe", options.recipe]
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return subprocess.run(["sbatch", "--test-only", *command[1:]], check=False).returncode
    done = subprocess.run(["sbatch", "--parsable", *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return done.returncode
    job = done.stdout.strip().split(";")[0]
    name = options.job_name or holds.get("job-name", (template.stem, ""))[0]
    run_dir = _argument(for_training, "run_dir") or f"{os.environ.get('D2V_SCALE_RUNS', 'runs')}/{name}-{job}"
    print(
        f"job {job}\n"
        f"  log of the job      {name}-{job}.out\n"
        f"  run directory       {run_dir}  (metrics.jsonl, status.json, checkpoints/)\n"
        f"  logs by node        {run_dir}/logs/{job}-0/\n"
        f"  save and requeue    scancel --batch --signal=USR1 {job}\n"
        f"  end for good        scancel {job}"
    )
    return 0


def _argument(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
        if argument == f"--{name}" and index + 1 < len(arguments):
            return arguments[index + 1]
    return None
