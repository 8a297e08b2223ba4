"""The real student and teacher at a tiny size, with tensor-parallel blocks; same interface as `toy`."""

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.data2vec import loss as objective
from d2v_scale.data2vec.config import LossConfig, TargetConfig
from d2v_scale.modalities import published_parts
from d2v_scale.model import init
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.networks import stack

MODEL = ModelConfig(
    vision=VisionStem(image_size=16, patch_size=4),
    backbone=Backbone(
        width=24, heads=4, ffn=36, depth=2, norm_first=True, key_bias=False, layer_scale=0.1, final_norm=True
    ),
    init="beit",
)
TARGET = TargetConfig(tap="block", top_k_layers=2, layer_norm="layer")
PARTS = published_parts(MODEL)


def Student() -> nn.Module:
    return stack.Student(MODEL)


def Teacher() -> nn.Module:
    return stack.Teacher(MODEL, TARGET, PARTS)


def initialize(module: nn.Module) -> None:
    init.initialize(module, seed=3)


def role(name: str) -> str:
    return PARTS.role(name)


def batch(step: int, rows: slice) -> Batch:
    generator = torch.Generator().manual_seed(500 + step)
    x = torch.randn(12, 3, 16, 16, generator=generator)
    masked = torch.rand(12, 16, generator=generator) < 0.5
    masked[:, 0], masked[:, 1] = True, False
    return Batch(
        modality="vision",
        inputs=x[rows],
        valid=None,
        masked_rt=masked[rows],
        sample_ids=torch.arange(12)[rows],
        grid=(4, 4),
        extra_tokens=1,
    )


def count(step: int) -> int:
    return int(batch(step, slice(0, 12)).masked_rt.sum())


def loss(student, teacher, step: int, rows: slice, bf16: bool = False) -> Tensor:
    part = batch(step, rows)
    output = student(part, stack.Draw(seed=1, step=step))
    targets = masked_targets(teacher(part, output.features_btd), part)
    return objective.masked_loss_sum(output.predictions_nd, targets, LossConfig(), MODEL.backbone.width)
