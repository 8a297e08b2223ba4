"""Which files of a Hugging Face folder hold its weights, and the tensors in them.

The file or index that transformers would load decides, in its order; what else lies in the folder (shards of an earlier
upload, variants, adapters, optimizer states) is not read, and named. Pickles are never run (see `unpickling`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v_scale.errors import CheckpointError
from d2v_scale.interop.unpickling import load_pickle

PRECEDENCE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
# The same with a variant's name before the last ending; a shard's number is none.
_VARIANTS = tuple(
    re.compile(f"{re.escape(name.rpartition('.')[0])}\\.(?P<variant>[^.]+)\\.{name.rpartition('.')[2]}")
    for name in PRECEDENCE
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", _INDEX)
_LFS_POINTER = b"version https://git-lfs"
_NAMED = 8


class Folder(Mapping[str, Tensor]):
    """Tensors of a folder by the names in its files, read when asked for. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        """What was not read, for the user."""
        chosen = weights_file(path)
        read = {chosen}
        if _is_index(chosen):
            self._where, shards, unnamed = _by_index(path, chosen)
            read |= shards
            if unnamed:
                self.notes.append(f"not read, since {chosen} does not name them: tensors {_some(unnamed)}")
        else:
            opened = _tensors_in(path / chosen)
            self._where = dict.fromkeys(opened, opened)
        others = [file.name for file in _weight_files(path) if file.name not in read]
        if others:
            self.notes.append(f"read {chosen}; not read: {_some(others)}")

    def __getitem__(self, key: str) -> Tensor:
        return self._where[key][key]

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def weights_file(folder: Path) -> str:
    """The name of the file or index that transformers would load; of the only variant, where there is nothing else.

    Raises CheckpointError where there is none, or several variants.
    """
    named = _named_by_config(folder)
    if named is not None:
        return named
    for name in PRECEDENCE:
        if (folder / name).is_file():
            return name
    variants = [name for name in _names(folder) if _is_variant(name)]
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise CheckpointError(
            f"{folder} holds several variants and no model.safetensors: {_some(variants)}.",
            "Leave the one that you mean in the folder.",
        )
    raise _nothing_in(folder)


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def _is_index(name: str) -> bool:
    return ".index." in name and name.endswith(".json")


def _is_variant(name: str) -> bool:
    matches = [match for pattern in _VARIANTS if (match := pattern.fullmatch(name))]
    return any(not _SHARD.fullmatch(match["variant"]) for match in matches)


def _weight_files(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder) if name.endswith(_WEIGHTS) or _is_variant(name)]


def _named_by_config(folder: Path) -> str | None:
    """config.json may name the file itself, under `transformers_weights`."""
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = settings.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", f".safetensors{_INDEX}")):
        raise CheckpointError(f"{folder / 'config.json'} has transformers_weights={name!r}, no safetensors file.")
    _require_inside(name, folder / "config.json")
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / 'config.json'} names {name} as its weights, which is not there.")
    return name


def _nothing_in(folder: Path) -> CheckpointError:
    names = [file.name for file in _weight_files(folder)]
    if any(name.startswith("adapter_model.") for name in names):
        remedy = "Merge the adapter into its model (peft's merge_and_unload) and save that."
    elif any(_SHARD.fullmatch(name.partition(".")[0]) for name in names):
        remedy = "The index that says which tensor is in which shard is missing: take it from the model's page."
    elif any(name.endswith((".h5", ".msgpack")) for name in names):
        remedy = "Weights of TensorFlow or Flax are not read: save them once with save_pretrained from PyTorch."
    else:
        remedy = "Give a complete Hugging Face folder."
    others = f", only {_some(names)}" if names else ""
    return CheckpointError(f"{folder} holds no model.safetensors and no pytorch_model.bin{others}.", remedy)


def _by_index(folder: Path, index: str) -> tuple[dict[str, Mapping[str, Tensor]], set[str], list[str]]:
    """Tensor to the shard that has it, the shards, and the tensors of shards that the index does not give to them."""
    where = read_json(folder / index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{folder / index} has no weight_map.", "Take it from the model's folder again.")
    shards = {}
    for shard in where.values():
        _require_inside(shard, folder / index)
    missing = sorted({shard for shard in where.values() if not (folder / shard).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder / index} names {_some(missing)}, which {'is' if len(missing) == 1 else 'are'} not there.",
            "Complete the folder.",
        )
    shards = {shard: _tensors_in(folder / shard) for shard in sorted(set(where.values()))}
    lacking = sorted(key for key, shard in where.items() if key not in shards[shard])
    if lacking:
        raise CheckpointError(
            f"{folder}: {where[lacking[0]]} lacks {_some(lacking)}, which {index} says it has.",
            "Index and shards are of different uploads: take them again.",
        )
    unnamed = sorted(key for shard, tensors in shards.items() for key in tensors if where.get(key) != shard)
    return {key: shards[shard] for key, shard in where.items()}, set(shards), unnamed


def _require_inside(name: Any, by: Path) -> None:
    """Raises CheckpointError for a name that leads out of the folder. Links are followed: caches are made of them."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or "\\" in name or ":" in name or PurePosixPath(name).is_absolute():
        raise CheckpointError(f"{by} names {name!r}, which is no file of its folder; it was not opened.")


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, file: Path) -> None:
        try:
            self._opened = safe_open(file, framework="pt")
            self._keys = dict.fromkeys(self._opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.", "Is the file complete?") from error

    def __getitem__(self, key: str) -> Tensor:
        return self._opened.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _tensors_in(file: Path) -> Mapping[str, Tensor]:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights.", "Run git lfs pull in the folder.")
    if file.suffix == ".safetensors":
        return _Safetensors(file)
    content = load_pickle(file)
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{file} holds more than tensors ({_some(others)}): it is not what transformers saves.",
            "Give a checkpoint of fairseq as a file, without a config.json beside it.",
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.", "Take it from the model's folder again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def write_json(path: Path, value: Any) -> None:
    """As the files of a model's folder are written."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
