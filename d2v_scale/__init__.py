"""Pretraining data2vec models (speech, vision, text, arrays) at scale.

    import d2v_scale

    encoder = d2v_scale.load_encoder("runs/vit")          # a run, a checkpoint, an export
    vectors = encoder.embed(["a.jpg", "b.jpg"])           # float32 (2, D)
    run_dir = d2v_scale.train("demo_vision", run_dir="runs/demo", optim={"max_steps": 100})

These names are imported when they are first used: `import d2v_scale` imports no torch.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from d2v_scale.process.torchaudio_guard import install as _install_torchaudio_guard

if TYPE_CHECKING:
    from d2v_scale.api.encoder import Encoder, load_encoder
    from d2v_scale.api.training import train
    from d2v_scale.recipe import Recipe

__all__ = ["Encoder", "Recipe", "__version__", "load_encoder", "train"]

__version__ = "0.2.0"

_FROM = {
    "Encoder": "d2v_scale.api.encoder",
    "Recipe": "d2v_scale.recipe",
    "load_encoder": "d2v_scale.api.encoder",
    "train": "d2v_scale.api.training",
}

# megatron-core's optional CUDA packages, and torch names that DeepSpeed still uses: nothing a user can act on.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)

_install_torchaudio_guard()


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
