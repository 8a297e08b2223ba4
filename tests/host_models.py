"""Exported folders in transformers: how tests load them, and what goes into the models."""

from pathlib import Path
from typing import Any

import torch

REMOTE: dict[str, Any] = {"trust_remote_code": True}
SAMPLES = 6400

Folders = dict[str, Path]


def load(auto: str, folder: Path, **options: Any) -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, **REMOTE, **options).eval()


def inputs(kind: str, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "vision":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    return {"input_values": torch.randn(rows, SAMPLES, generator=generator)}


# (automatic class, folder to load it from, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "speech": ("AutoModel", "speech", {}),
    "ctc": ("AutoModelForCTC", "ctc", {}),
    "speech classes": ("AutoModelForAudioClassification", "speech_classes", {}),
    "speech frames": ("AutoModelForAudioFrameClassification", "speech", {"num_labels": 3}),
    "vision": ("AutoModel", "vision", {}),
    "vision classes": ("AutoModelForImageClassification", "vision_classes", {}),
}


def pair(which: str, folders: Folders, **options: Any) -> tuple[Any, Any, str]:
    """Transformers' own model, ours, and what goes into both."""
    auto, folder, more = MODELS[which]
    theirs, ours = (load(auto, folders[f"{version}_{folder}"], **more, **options) for version in ("v1", "v2"))
    return theirs, ours, which.split()[0].replace("ctc", "speech")
