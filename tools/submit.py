"""Submit a training to Slurm: picks the recipe's template, shows what Slurm is asked for, submits, says where to look.

    python tools/submit.py --recipe d2v2_vision_large --nodes 8 --data '/shards/in1k-{0000..1281}.tar' --optim.lr 1e-3

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

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = ("base", "large", "huge", "1b", "7b")


def template_of(recipe: str) -> Path:
    """The template whose size the recipe's name carries; the base one if it carries none."""
    size = next((size for size in TEMPLATES if size in Path(recipe).stem), "base")
    return REPOSITORY / "slurm" / f"pretrain_{size}.sh"


def sbatch_options(options: argparse.Namespace) -> list[str]:
    """What is asked for on sbatch's command line, where it counts for more than the template and the environment."""
    asked = {
        "nodes": options.nodes,
        "gpus-per-node": options.gpus,
        "time": options.time,
        "partition": options.partition,
        "job-name": options.job_name,
    }
    return [f"--{name}={value}" for name, value in asked.items() if value is not None]


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="recipe of the package or a YAML file")
    parser.add_argument("--nodes", type=int, help="number of nodes")
    parser.add_argument("--gpus", help="GPUs on each node, such as 8 or h100:8")
    parser.add_argument("--time", help="time limit, such as 2-00:00:00; the job continues after it")
    parser.add_argument("--partition", help="partition")
    parser.add_argument("--job_name", help="name of the job and of its run directory")
    parser.add_argument("--template", type=Path, help="template to use instead of the recipe's")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="only let Slurm check it (--test-only)")
    options, for_training = parser.parse_known_args()

    template = options.template or template_of(options.recipe)
    if not template.is_file():
        print(f"error: no template {template}", file=sys.stderr)
        return 2
    if shutil.which("sbatch") is None:
        print("error: no sbatch here: run this on a login node of the cluster", file=sys.stderr)
        return 2
    asked = sbatch_options(options)
    print(f"{template}:")
    for name, (value, source) in effective(template, asked, dict(os.environ)).items():
        print(f"  {'--' + name + ('=' + value if value else ''):34}  {source}")
    command = ["sbatch", *asked, str(template), *for_training, "--recipe", options.recipe]
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return subprocess.run(["sbatch", "--test-only", *command[1:]], check=False).returncode
    done = subprocess.run(["sbatch", "--parsable", *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return done.returncode
    job = done.stdout.strip().split(";")[0]
    name = options.job_name or effective(template, asked, dict(os.environ)).get("job-name", (template.stem, ""))[0]
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


if __name__ == "__main__":
    sys.exit(main())
