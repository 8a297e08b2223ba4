"""Keeps `import torchaudio` working beside a CPU-only torch.

torchaudio's published wheels are linked against CUDA, so loading its C++ extension beside a CPU build of torch raises
OSError, and `transformers` fails with it. Resampling and filters are pure Python and need no extension. The guard
steps in only when `torchaudio._extension` is imported, and only when the real one cannot be loaded.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_GUARDED = "torchaudio._extension"


def _fail_if_no_align(_function: Callable[..., object]) -> Callable[..., object]:
    """Decorator that torchaudio puts on forced alignment: the function then says why it is not available."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(
            "torchaudio's C++ extension does not load beside this build of torch: forced alignment is not available. "
            "Install a torch build that matches torchaudio's CUDA version."
        )

    return fail


class _FallbackLoader(importlib.abc.Loader):
    """Loads the real extension package; without its library the module holds what pure-Python torchaudio asks for."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        except (OSError, ImportError, RuntimeError):
            module.__dict__.update(
                _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=_fail_if_no_align
            )


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _GUARDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _FallbackLoader(spec.loader)
        return spec


def install() -> None:
    """Install the import hook once; costs nothing until torchaudio is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
