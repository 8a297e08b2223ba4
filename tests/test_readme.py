"""Every command of the README and of the pages that go on from it is run, on small data, in the order a user would."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import papers
import pyarrow
import pyarrow.parquet
import pytest
from launch import PROCESS, run_program
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = ["--recipe", "demo_vision", "--stop_at", "2", "--tracking.enabled", "false", "--data.workers", "0"]

ACTIVATE = "source .venv/bin/activate"

FURTHER = ("own_data", "training", "encoders")
"""Pages of docs/ that are read here."""

# Options that stand-ins have to be small, or because the README's recipe has them.
SMALL = {
    "--evaluation.test",
    *("--stop_at", "--tracking.enabled", "--data.workers", "--global_batch_size", "--vocab_size", "--recipe"),
    *("--samples", "--length", "--rounds", "--warmup", "--sweeps", "--worlds", "--optim.max_steps"),
    *("--optim.warmup_steps", "--evaluation.train", "--model.backbone.width", "--model.backbone.heads"),
    *("--model.backbone.ffn", "--fewer_pieces", "--evaluation.held_out"),
}
# Options of the README that take too long here.
LONG = {"--all"}

# README command (comments and continuation lines removed) -> what stands in for it. None: run elsewhere in the suite
# or by the suite itself.
STAND_INS: dict[str, list[str] | None] = {
    "bash tools/quickstart.sh": None,
    "bash tools/test.sh": None,
    "python3 -m venv .venv && .venv/bin/pip install -e .": None,
    ACTIVATE: None,
    "d2v shards SRC OUT": ["tools/make_shards.py", "src", "shards"],
    "d2v shards dataset SRC OUT": ["tools/make_shards.py", "dataset", "rows", "row_shards"],
    "sbatch --array=0-31 slurm/make_shards.sh SRC OUT": None,
    "d2v train --recipe d2v2_vision_base --data SRC --prepare --run_dir runs/raw": [
        *["d2v_scale/__main__.py", "train", *TINY, "--data", "src", "--prepare", "--run_dir", "runs/raw"],
        *["--global_batch_size", "4", "--evaluation.train", "null"],
    ],
    "d2v shards images SRC OUT": ["tools/make_shards.py", "images", "src", "shards"],
    "d2v shards audio SRC OUT": ["tools/make_shards.py", "audio", "waves", "speech"],
    "d2v shards text SRC OUT": [
        "tools/make_shards.py",
        "text",
        "prose",
        "text",
        "--vocab_size",
        "300",
    ],
    "d2v shards arrays SRC OUT": ["tools/make_shards.py", "arrays", "series", "arrays"],
    "d2v shards pairs TABLE OUT": [
        *["tools/make_shards.py", "pairs", "table.csv", "pairs", "--vocab_size", "300", "--fewer_pieces"]
    ],
    "d2v shards demo --modality joint demo_data": None,
    "d2v train --recipe tiny2_joint --run_dir runs/joint": None,
    "d2v train --recipe tiny2_joint --data pairs/train.index.json --run_dir runs/pairs": [
        *["d2v_scale/__main__.py", "train", *TINY[2:], "--recipe", "tiny2_joint", "--data", "pairs/train.index.json"],
        *["--global_batch_size", "2", "--evaluation.test", "null", "--evaluation.held_out", "null"],
        *["--run_dir", "runs/pairs"],
    ],
    "d2v align runs/joint --data demo_data/joint": None,
    "d2v index 'shards/*.tar' --modality vision": [*["tools/index_shards.py", "shards/*.tar", "--modality", "vision"]],
    "d2v inspect 'shards/*.tar' --out preview": [*["tools/inspect_shards.py", "shards/*.tar", "--out", "preview"]],
    "d2v tokenizer 'text/*.tar' tokenizer.model": [
        *["tools/train_tokenizer.py", "text/*.tar", "own.model", "--vocab_size", "300"]
    ],
    "d2v train --recipe d2v2_vision_base --data 'OUT/train-*.tar' --run_dir runs/mine": [
        *["d2v_scale/__main__.py", "train", *TINY, "--data", "shards/*.tar", "--run_dir", "runs/mine"],
        *["--global_batch_size", "4", "--evaluation.train", "null"],
    ],
    "d2v probe runs/mine --data 'OUT/train-*.tar' --test 'OUT/train-*.tar' --task knn": [
        *["tools/probe.py", "runs/mine", "--data", "shards/*.tar", "--test", "shards/*.tar", "--task", "knn"]
    ],
    "d2v export runs/mine out/mine --to hf": ["tools/export.py", "runs/mine", "out/mine", "--to", "hf"],
    "d2v extract runs/mine 'OUT/train-*.tar' vectors/": [
        *["tools/extract.py", "runs/mine", "shards/*.tar", "vectors/"]
    ],
    "deepspeed d2v_scale/train.py": None,
    "deepspeed d2v_scale/train.py --recipe d2v2_vision_base --data '/shards/in1k-{000000..001281}.tar' "
    "--deepspeed_config ds_configs/zero3.json --teacher.placement cpu --run_dir runs/vit": [
        *[
            "d2v_scale/train.py",
            *TINY,
            "--data",
            "shards/*.tar",
            "--deepspeed_config",
            str(ROOT / "ds_configs/zero3.json"),
        ],
        *[
            "--teacher.placement",
            "cpu",
            "--run_dir",
            "runs/vit",
            "--global_batch_size",
            "4",
            "--evaluation.train",
            "null",
        ],
    ],
    "deepspeed d2v_scale/train.py --resume runs/vit --stop_at 100000": [
        *["d2v_scale/train.py", "--resume", "runs/vit", "--stop_at", "3"]
    ],
    "d2v shards arrays eeg/train eeg/shards --prefix train": [
        *["tools/make_shards.py", "arrays", "eeg/train", "eeg/shards", "--prefix", "train"]
    ],
    "d2v shards arrays eeg/val eeg/shards --prefix val": [
        *["tools/make_shards.py", "arrays", "eeg/val", "eeg/shards", "--prefix", "val"]
    ],
    "deepspeed d2v_scale/train.py --recipe eeg.yaml --data eeg/shards/train.index.json --run_dir runs/eeg": [
        *["d2v_scale/train.py", "--recipe", "eeg.yaml", "--data", "eeg/shards/train.index.json"],
        *["--run_dir", "runs/eeg", "--stop_at", "2", "--global_batch_size", "4"],
        *["--tracking.enabled", "false", "--data.workers", "0"],
    ],
    "d2v probe runs/eeg --data eeg/shards/train.index.json --test eeg/shards/val.index.json --task knn": [
        *["tools/probe.py", "runs/eeg", "--data", "eeg/shards/train.index.json"],
        *["--test", "eeg/shards/val.index.json", "--task", "knn"],
    ],
    "deepspeed --num_gpus 4 d2v_scale/train.py --parallel.pipeline 2 --parallel.tensor 2 "
    "--deepspeed_config ds_configs/pipeline.json": None,
    "deepspeed d2v_scale/train.py --help": ["d2v_scale/train.py", "--help"],
    "sbatch slurm/pretrain_large.sh --data '/shards/in1k-{000000..001281}.tar'": None,
    "d2v plan --recipe d2v2_vision_7b --nodes 32 --gpus 8 --device h100": None,
    # tests/planning/test_calibration.py and tests/benchmarks/test_plan.py have its parts.
    "d2v plan --recipe d2v2_vision_7b --nodes 32 --gpus 8 --calibrate": None,
    "d2v plan --table --device h100": None,
    "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db": None,
    "d2v report runs/a runs/b --out report.html": [
        *["tools/report.py", "runs/vit", "runs/vit", "--out", "report.html"]
    ],
    "d2v draw runs/a --data 'shards/val-*.tar'": [*["tools/draw.py", "runs/vit", "--data", "shards/*.tar"]],
    "d2v extract runs/vit 'shards/*.tar' features/": [*["tools/extract.py", "runs/vit", "shards/*.tar", "features/"]],
    "python tools/check_golden.py tests/golden/recorded/v2_image": [
        *["tools/check_golden.py", str(ROOT / "tests/golden/recorded/v2_image")]
    ],
    "d2v export runs/vit out/vit --to hf": [
        "tools/export.py",
        "runs/vit",
        "out/vit",
        "--to",
        "hf",
    ],
    "deepspeed d2v_scale/train.py --recipe finetune_vision_v2_base --init_from runs/vit --data '/shards/train-*.tar' "
    "--evaluation.test '/shards/val-*.tar' --run_dir runs/tuned": [
        *["d2v_scale/train.py", "--recipe", "finetune_vision_v2_base", "--init_from", "runs/vit", "--stop_at", "2"],
        *["--data", "shards/*.tar", "--evaluation.test", "shards/*.tar", "--run_dir", "runs/tuned"],
        *["--global_batch_size", "4", "--tracking.enabled", "false", "--data.workers", "0"],
    ],
    "d2v probe runs/tuned --test '/shards/val-*.tar' --task classify": [
        *["tools/probe.py", "runs/tuned", "--test", "shards/*.tar", "--task", "classify"]
    ],
    "d2v export runs/tuned out/tuned --to hf": [*["tools/export.py", "runs/tuned", "out/tuned", "--to", "hf"]],
    "d2v shards text train.tsv OUT --columns sentence1,sentence2,label --tokenizer tokenizer.model": [
        *["tools/make_shards.py", "text", "train.tsv", "two_texts", "--columns", "sentence1,sentence2,label"],
        *["--tokenizer", "text/tokenizer.model"],
    ],
    "d2v shards audio SRC OUT --transcripts transcripts.txt": [
        *["tools/make_shards.py", "audio", "waves", "spoken", "--transcripts", "transcripts.txt"]
    ],
    "d2v import checkpoint.pt out/checkpoint": [*["tools/import_weights.py", "out/vit", "out/checkpoint"]],
    "deepspeed d2v_scale/train.py --recipe d2v1_speech_base --init_from out/checkpoint --data '/shards/*.tar' "
    "--run_dir runs/continued": [
        *["d2v_scale/train.py", *TINY, "--data", "shards/*.tar", "--init_from", "out/checkpoint"],
        *["--global_batch_size", "4"],
        *["--run_dir", "runs/continued", "--evaluation.train", "null"],
    ],
    # tests/pretraining/test_late_end.py decides the end of a run while it runs.
    "deepspeed d2v_scale/train.py --recipe d2v2_vision_base --data '/shards/in1k-{000000..001281}.tar' "
    "--optim.schedule wsd --optim.max_steps 1000000 --run_dir runs/vit": None,
    "deepspeed d2v_scale/train.py --resume runs/vit --decay_from 80000 --optim.max_steps 100000": None,
    "deepspeed d2v_scale/train.py --recipe d2v2_vision_base --data '/shards/in1k-{000000..001281}.tar' "
    "--optim.muon.momentum 0.95": None,
    # tests/interop/test_published_text.py does these three.
    "d2v import FOLDER out/text": None,
    "d2v shards text train.tsv glue --tokenizer out/text --columns sentence,label": None,
    "d2v train --recipe finetune_glue_sst2 --init_from out/text --data glue --run_dir runs/sst2": None,
    "d2v probe runs/vit --data 'shards/train-*.tar' --test 'shards/val-*.tar' --task knn": [
        *["tools/probe.py", "runs/vit", "--data", "shards/*.tar", "--test", "shards/*.tar", "--task", "knn"]
    ],
    "bash tools/bench_gpu.sh": None,
    "python tools/bench.py step --peer hf --all": [
        *[
            "tools/bench.py",
            "step",
            "--peer",
            "hf",
            "--recipe",
            "v1_text",
            "--samples",
            "2",
            "--length",
            "32",
            "--rounds",
            "1",
        ],
        *["--warmup", "0", "--model.backbone.width=32", "--model.backbone.heads=4", "--model.backbone.ffn=64"],
    ],
    "python tools/bench.py growth --out growth.png": [
        *["tools/bench.py", "growth", "--out", "growth.png", "--rounds", "1", "--sweeps", "clones", "--worlds"]
    ],
    "bash tools/evidence.sh --data DIR": None,
    "d2v sweep tiny2_vision --grid objective.masking.clones=1,4 --equal_compute --seeds 1 2 "
    "--out out/masks -- --data 'shards/train-*.tar' --evaluation.train 'shards/train-*.tar' "
    "--evaluation.test 'shards/val-*.tar' --evaluation.every 100": [
        *["tools/sweep.py", "tiny2_vision", "--grid", "objective.masking.clones=1,4", "--equal_compute"],
        *["--seeds", "1", "--out", "masks", "--", "--data", "shards/*.tar", "--evaluation.train", "shards/*.tar"],
        *["--evaluation.test", "shards/*.tar", "--evaluation.every", "1", "--optim.max_steps", "1"],
        *["--optim.warmup_steps", "0", "--global_batch_size", "4"],
        *["--tracking.enabled", "false", "--data.workers", "0"],
    ],
}


PAGES = {name: (ROOT / name).read_text() for name in ("README.md", *(f"docs/{n}.md" for n in FURTHER))}


def test_every_command_has_a_stand_in_and_every_file_in_it_exists():
    found = [command for page in PAGES.values() for command in papers.commands(page)]
    assert set(found) == set(STAND_INS)
    for command in found:
        assert papers.missing_files(command) == []


def options_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}


def test_a_stand_in_has_the_options_that_the_readme_has() -> None:
    """A required option that only the stand-in gives would hide that the README's command fails as it is typed."""
    for command, stand_in in STAND_INS.items():
        if stand_in is not None:
            ours, stated = options_of(stand_in), options_of(shlex.split(command))
            assert ours - stated <= SMALL, command
            assert stated - ours <= LONG, command


def test_the_environment_is_active_before_it_is_needed() -> None:
    commands = papers.commands(PAGES["README.md"])
    needs = [line.startswith(("deepspeed", "d2v", "python ", "mlflow")) for line in commands]
    assert commands.index(ACTIVATE) < needs.index(True)
    assert all(f"`{ACTIVATE}`" in PAGES[f"docs/{name}.md"] for name in FURTHER)
    assert not [name for name, page in PAGES.items() if ".venv/bin/python" in page]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a few labelled images, one recording, one text, one array, and the recordings of docs/own_data.md
    with its recipe of them."""
    import soundfile

    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "src" / label).mkdir(parents=True)
        for n in range(8):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "src" / label / f"{n}.png")
    (folder / "rows").mkdir()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    table = pyarrow.table({"image": [{"bytes": content.getvalue(), "path": None}] * 3, "label": [0, 1, 0]})
    pyarrow.parquet.write_table(table, folder / "rows" / "train.parquet")
    (folder / "series").mkdir()
    np.save(folder / "series" / "one.npy", rng.standard_normal((2, 50)))
    for split in ("train", "val"):
        for label, volts in (("rest", 2e-5), ("task", 6e-5)):
            (folder / "eeg" / split / label).mkdir(parents=True)
            for n in range(4):
                values = volts * rng.standard_normal((19, 900 * (n + 1)))
                values[3, 50 * n : 80 * n] = np.nan
                np.save(folder / "eeg" / split / label / f"{n}.npy", values)
    (recipe,) = papers.blocks(PAGES["docs/own_data.md"], "yaml")
    (folder / "eeg.yaml").write_text(recipe)
    (folder / "waves").mkdir()
    soundfile.write(folder / "waves" / "tone.wav", np.sin(np.arange(8000) / 5), 8000)
    (folder / "table.csv").write_text("image,audio,text\nimage.png,waves/tone.wav,a long tone\n")
    (folder / "transcripts.txt").write_text("tone A LONG NOTE\n")
    (folder / "train.tsv").write_text("sentence1\tsentence2\tlabel\nhello\tgood bye\t0\ngood day\tgood day\t1\n")
    (folder / "prose").mkdir()
    (folder / "prose" / "story.txt").write_text("Once upon a time there was a teacher who followed a student.\n" * 40)
    for name in ("image.png", "a.jpg", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


def run(environment: dict[str, str], folder: Path, script: str, *arguments: str, again: bool) -> tuple[int, str]:
    """Exit code and output. `again`: the program was started by an interpreter of its own before; a fork will do."""
    if again:
        return run_program(ROOT / script, *arguments, cwd=folder, timeout=300)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def test_the_readmes_commands_run_in_order(workplace):
    environment = {**os.environ, **PROCESS}
    started: set[str] = set()
    for command, stand_in in STAND_INS.items():
        if stand_in is None:
            continue
        code, output = run(environment, workplace, *stand_in, again=stand_in[0] in started)
        started.add(stand_in[0])
        assert code == 0, f"{command}\n{output[-5000:]}"
    for program in (program for page in PAGES.values() for program in papers.blocks(page, "python")):
        # What it trains is no small model; tests/api/test_training.py calls the same.
        short = "\n".join(line for line in program.splitlines() if "d2v_scale.train(" not in line)
        subprocess.run([sys.executable, "-c", short], cwd=workplace, env=environment, check=True, timeout=120)
