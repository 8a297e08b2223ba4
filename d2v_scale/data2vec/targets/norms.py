"""Parameter-free norms of taps and targets (spec 1.2)."""

from typing import TYPE_CHECKING

from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-5

# Axes of (B, T, D) that each norm takes its mean and biased variance over.
_AXES: dict[str, tuple[int, ...]] = {
    "instance": (1,),
    "layer": (2,),
    "batch": (0, 1),
    "group": (1, 2),
    "across_batch": (0,),
    "across_batch_and_channels": (0, 2),
}


def split_norms(names: str, key: str) -> list[str]:
    """`instance+layer` to ["instance", "layer"], `none` to []. Raises `ConfigError` at `key` for an unknown name."""
    parts = [] if names == "none" else names.split("+")
    unknown = [part for part in parts if part not in _AXES]
    if unknown:
        raise ConfigError(key, f"unknown norm {unknown[0]!r} in {names!r}.", f"Join any of {', '.join(_AXES)} by '+'.")
    return parts


def normalise(x_btd: "Tensor", name: str) -> "Tensor":
    """fp32 (B, T, D) with this norm. Padded positions take part in its statistics, as in the reference."""
    from torch.nn import functional as F

    if name == "layer":
        return F.layer_norm(x_btd, x_btd.shape[-1:], eps=_EPS)
    axes = _AXES[name]
    centred_btd = x_btd - x_btd.mean(dim=axes, keepdim=True)
    # Two passes: as exact as torch.var_mean and several times faster over strided axes on a CPU.
    variance = centred_btd.square().mean(dim=axes, keepdim=True)
    return centred_btd.mul_((variance + _EPS).rsqrt())
