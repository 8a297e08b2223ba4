"""Reading pickled checkpoints without running what is in them."""

import argparse
import codecs
import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_scale.errors import CheckpointError

# Configuration objects of the programs that wrote the checkpoints: replaced by `Opaque`, never imported.
_REPLACED = ("omegaconf.", "fairseq", "examples.data2vec.", "data2vec.", "hydra.")
_ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": collections.defaultdict,
    "collections.OrderedDict": collections.OrderedDict,
    "typing.Any": Any,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.str": str,
    "builtins.bool": bool,
    "builtins.set": set,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "_codecs.encode": codecs.encode,
    **{f"numpy.dtypes.{name}": getattr(np.dtypes, name) for name in np.dtypes.__all__},
}


class Opaque:
    """Stands where a foreign object was: holds what was pickled, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a .pt or .pth file, on the CPU.

    Raises `CheckpointError` when the file is damaged, holds no dictionary, or wants anything imported that is neither
    a tensor nor one of a few plain types.
    """
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        mapped = True
    except Exception:
        # Not a zip archive: either the old format, which the load below judges, or damaged.
        wanted, mapped = [], False
    refused = [name for name in wanted if name not in _ALLOWED and not name.startswith(_REPLACED)]
    if refused:
        raise CheckpointError(
            f"{path} is a pickle that wants to import {', '.join(sorted(refused))}; it was not loaded.",
            "Convert it to safetensors where you trust it, and import that.",
        )
    names: list[Any] = [(Opaque, name) for name in wanted if name not in _ALLOWED]
    names += [(value, name) for name, value in _ALLOWED.items()]
    try:
        with torch.serialization.safe_globals(names):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{path} cannot be loaded: {reason}.", "Is the file complete?") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a checkpoint dictionary.")
    return value


def plain(value: Any) -> Any:
    """Configuration objects as dictionaries, lists and scalars; what is neither becomes None."""
    if isinstance(value, Opaque):
        state = value.state if isinstance(value.state, Mapping) else {}
        inner = state.get("_content", state.get("_val"))
        return plain(inner) if inner is not None else None
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return None
