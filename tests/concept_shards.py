"""Small sets of concepts with a picture, a recording and a written name, and joint runs to look at them with."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
import tiny_models
import torch
from PIL import Image

from d2v_scale.checkpoint import write_single
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.shards.writing import Sample, write_shard

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def samples(first: int, count: int, each: int = 1, categories: int = 3, shuffled: bool = False) -> list[Sample]:
    """Concept n: a picture of a code, a recording of tones of the same code, and its name. `each`: samples a concept.
    `shuffled`: recordings and names belong to other concepts."""
    order = np.random.default_rng(first).permutation(count) if shuffled else np.arange(count)
    found: list[Sample] = []
    for number in range(first, first + count):
        partner = first + int(order[number - first])
        for version in range(each):
            found.append(
                {
                    "__key__": f"{number:05d}-{version}",
                    "png": picture(number, version),
                    "flac": recording(partner, version),
                    "txt": name(partner),
                    "cls": number,
                    "json": json.dumps({"concept": f"c{number}", "category": f"k{number % categories}"}).encode(),
                }
            )
    return found


def code(number: int) -> np.ndarray:
    """Eight values of a concept."""
    return np.random.default_rng(1000 + number).uniform(0, 1, 8)


def picture(number: int, version: int = 0, side: int = 16) -> bytes:
    """Bars whose brightness is the code."""
    noise = np.random.default_rng((number, version)).normal(0, 4, (side, side, 3))
    bars = np.repeat(code(number), side // 8)[:, None, None] * 200 + 20
    content = io.BytesIO()
    Image.fromarray((bars + noise).clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def recording(number: int, version: int = 0) -> bytes:
    """Tones whose loudness is the code, a third of a second and more."""
    length = 4800 + 200 * version
    time = np.arange(length) / 16_000
    wave = sum(level * np.sin(2 * np.pi * (300 + 350 * k) * time) for k, level in enumerate(code(number)))
    wave = np.asarray(wave) + np.random.default_rng((number, version, 1)).normal(0, 0.05, length)
    content = io.BytesIO()
    soundfile.write(content, (0.08 * wave).astype(np.float32), 16_000, format="FLAC")
    return content.getvalue()


def name(number: int) -> str:
    """A word that spells the code."""
    return "".join(LETTERS[int(25 * value)] for value in code(number)) + f" {LETTERS[number % 26]}"


def write_concepts(folder: Path, train: int = 60, test: int = 60, **options: object) -> Path:
    """`folder`/train and `folder`/test."""
    for side, first, count in (("train", 0, train), ("test", train, test)):
        (folder / side).mkdir(parents=True)
        write_shard(folder / side / "part-000000.tar", samples(first, count, **options))  # type: ignore[arg-type]
    return folder


def joint_model() -> ModelConfig:
    """Pictures and recordings."""
    model = tiny_models.joint()
    model.text = None
    return model


def write_run(path: Path, model: ModelConfig, seed: int = 1, **recipe: object) -> Path:
    """A run directory with the weights that a run of this seed begins with."""
    made = Recipe(
        name=path.name,
        model=model,
        seed=seed,
        objective=ObjectiveConfig(target=tiny_models.TAPS),
        **recipe,  # type: ignore[arg-type]
    )
    with undivided():
        module = Student(made.model)
    initialize(module, seed)
    tensors = {n: p.detach() for n, p in module.named_parameters()}
    write_single(path / "checkpoints", tensors, tensors, {"recipe": json.loads(json.dumps(to_dict(made)))})
    (path / "metrics.jsonl").write_text("")
    return path


def aligned(n: int, width: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features of one code, each turned and with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.Generator().manual_seed(99)
    code_nd = torch.randn(n, width, generator=generator)
    mixed = [code_nd @ torch.randn(width, width, generator=turn) for _ in range(2)]
    made = [x_nd + noise * torch.randn(n, width, generator=generator) for x_nd in mixed]
    return made[0], made[1]
