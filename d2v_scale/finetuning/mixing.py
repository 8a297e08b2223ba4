"""Mixup, cutmix and random erasing on a batch of images (spec 7.2), and the soft targets that follow. Tensors only."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.data2vec import stateless
from d2v_scale.finetuning.config import ImageConfig

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


def soft_targets(labels_b: Tensor, classes: int, smoothing: float) -> Tensor:
    """float32 (B, C): one class each, smoothed; a row of zeros where the label is -1."""
    known_b = labels_b >= 0
    targets_bc = F.one_hot(labels_b.clamp(min=0), classes).float() * (1 - smoothing) + smoothing / classes
    return targets_bc * known_b[:, None]


def mix(images_bchw: Tensor, targets_bc: Tensor, config: ImageConfig, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Each image with the one at the other end of the batch, all in the same proportion; or both unchanged.

    Whether, how and in which proportion is a function of (seed, step), so it is the same on all ranks.
    """
    draw = stateless.numpy_generator(seed, step, "mix")
    alphas = [alpha for alpha in (config.mixup, config.cutmix) if alpha > 0]
    if not alphas or len(images_bchw) < 2 or draw.random() >= config.mix_probability:
        return images_bchw, targets_bc
    cut = config.mixup == 0 or (config.cutmix > 0 and draw.random() < 0.5)
    alpha = config.cutmix if cut else config.mixup
    kept = float(draw.beta(alpha, alpha))
    others_bchw = images_bchw.flip(0)
    if cut:
        height, width = images_bchw.shape[-2:]
        top, bottom = _side(height, math.sqrt(1 - kept), draw.random())
        left, right = _side(width, math.sqrt(1 - kept), draw.random())
        mixed_bchw = images_bchw.clone()
        mixed_bchw[..., top:bottom, left:right] = others_bchw[..., top:bottom, left:right]
        # The rectangle may reach over the border.
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed_bchw = torch.lerp(others_bchw, images_bchw, kept)
    return mixed_bchw, torch.lerp(targets_bc.flip(0), targets_bc, kept)


def _side(length: int, share: float, u_centre: float) -> tuple[int, int]:
    half, centre = int(length * share) // 2, int(u_centre * length)
    return max(0, centre - half), min(length, centre + half)


def erase(images_bchw: Tensor, probability: float, sample_ids_b: Tensor, seed: int, step: int) -> Tensor:
    """A rectangle of some images becomes standard normal noise; keyed by (seed, step, sample)."""
    if probability == 0:
        return images_bchw
    height, width = images_bchw.shape[-2:]
    keys_b = stateless.row_keys(sample_ids_b, seed, step, "erase")
    u_chosen, u_area, u_ratio, u_top, u_left = stateless.uniform(keys_b, 5).unbind(dim=1)
    area_b = height * width * (_ERASED_AREA[0] + u_area * (_ERASED_AREA[1] - _ERASED_AREA[0]))
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    ratio_b = torch.exp(low + u_ratio * (high - low))
    h_b = torch.sqrt(area_b * ratio_b).round().clamp(max=height - 1)
    w_b = torch.sqrt(area_b / ratio_b).round().clamp(max=width - 1)
    inside_bhw = _between(height, u_top, h_b)[:, :, None] & _between(width, u_left, w_b)[:, None, :]
    inside_bhw &= (u_chosen < probability)[:, None, None]
    noise = stateless.normal(stateless.row_keys(keys_b, "noise"), images_bchw[0].numel()).view_as(images_bchw)
    return torch.where(inside_bhw[:, None], noise.to(images_bchw.dtype), images_bchw)


def _between(length: int, u_start_b: Tensor, size_b: Tensor) -> Tensor:
    """bool (B, length): True from a start uniform over where the size fits."""
    start_b = torch.floor(u_start_b * (length - size_b + 1))
    at = torch.arange(length, device=size_b.device)
    return (at >= start_b[:, None]) & (at < (start_b + size_b)[:, None])
