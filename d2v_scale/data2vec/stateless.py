"""Random numbers as pure functions of what they are for.

Every draw (order, crop, mask, drop path, decoder noise, layer drop) is keyed by the integers that name it, such as
(seed, step, sample id, clone). Nothing is carried from call to call, so a draw is the same at any world size, in any
worker and after any resume. The mixing function is splitmix64 (Steele, Lea and Flood 2014). torch is imported where
tensors are asked for: a recipe is checked, masks included, without it.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MUL1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL2) & _MASK
    return z ^ (z >> 31)


def key(*parts: int | str) -> int:
    """A 64-bit key from integers and names; the order of the parts matters. Strings enter by their CRC-32."""
    state = 0
    for part in parts:
        value = zlib.crc32(part.encode()) if isinstance(part, str) else part
        state = _mix((state + _GOLDEN + (value & _MASK)) & _MASK)
    return state


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator keyed by `parts`; cheap enough to make one per sample."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_tensor(z: "Tensor") -> "Tensor":
    """splitmix64's finaliser on int64 tensors; `>>` is arithmetic, so the sign bits are masked away."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MUL1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MUL2)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def row_keys(ids: "Tensor", *parts: int | str) -> "Tensor":
    """Keys of many rows at once: int64 `ids` of any shape to int64 keys of that shape, on the device of `ids`."""
    return _mix_tensor(ids + _signed(key(*parts)) + _signed(_GOLDEN))


def _bits(keys_r: "Tensor", count: int) -> "Tensor":
    import torch

    counter = torch.arange(1, count + 1, device=keys_r.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix_tensor(keys_r[..., None] + counter)


def uniform(keys_r: "Tensor", count: int) -> "Tensor":
    """`count` float32 uniforms in [0, 1) for each key: shape (*keys.shape, count). 24 random bits each."""
    return ((_bits(keys_r, count) >> 40) & ((1 << 24) - 1)).float() * (1.0 / (1 << 24))


def normal(keys_r: "Tensor", count: int) -> "Tensor":
    """`count` float32 standard normals for each key (Box-Muller): shape (*keys.shape, count)."""
    import torch

    half = (count + 1) // 2
    bits = _bits(keys_r, half)
    # u in (0, 1], so that the logarithm is finite.
    u = (((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) + 1.0) * (1.0 / (1 << 24))
    angle = (bits & ((1 << 24) - 1)).to(torch.float32) * (2.0 * torch.pi / (1 << 24))
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)[..., :count]


def array_keys(ids: np.ndarray, *parts: int | str) -> np.ndarray:
    """Keys of many rows at once in NumPy: integer `ids` of any shape to uint64 keys of that shape."""
    offset = np.uint64((key(*parts) + _GOLDEN) & _MASK)
    return _mix_array(ids.astype(np.int64).view(np.uint64) + offset)


def array_bits(keys_r: np.ndarray, count: int) -> np.ndarray:
    """`count` uint64 of random bits for each uint64 key: shape (*keys.shape, count). The first of them do not depend on
    how many there are."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix_array(keys_r[..., None] + counter)


def array_uniform(keys_r: np.ndarray, count: int) -> np.ndarray:
    """`count` float64 uniforms in [0, 1) for each uint64 key: shape (*keys.shape, count). 53 random bits each."""
    return (array_bits(keys_r, count) >> np.uint64(11)) * (1.0 / (1 << 53))


def _mix_array(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 arrays (which wrap around)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MUL2)
    return z ^ (z >> np.uint64(31))
