"""An encoder with a head. Encoder parameters are named as in pretraining, the head's are below `head`."""

import math

import torch
from torch import Tensor, nn

from d2v_scale.data.batch import Batch
from d2v_scale.data.labels import Vocabulary
from d2v_scale.data2vec import stateless
from d2v_scale.evaluation.features import mean_over_positions
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.model.config import ModelConfig, TeacherParts
from d2v_scale.model.init import InitRule, linear_rules
from d2v_scale.model.speech import SpeechContext, SpeechFeatures
from d2v_scale.model.stack import Draw, Student

PROJECTION = 256
"""Channels that speech is pooled in (the SUPERB convention)."""
_VISION_EPS = 1e-6


def outputs_of(task: TaskConfig) -> int:
    """Outputs of a task's head."""
    if task.kind == "ctc":
        return len(Vocabulary(task.ctc.letters))
    if task.kind == "regress":
        return 1
    assert task.classes is not None, "the loader knows the number of classes"
    return task.classes


class ImageHead(nn.Module):
    """Mean of the patches, norm, linear (spec 7.2)."""

    def __init__(self, width: int, outputs: int, scale: float) -> None:
        """`scale`: of the linear's first weights. 1.0 starts near zero."""
        super().__init__()
        self.norm = nn.LayerNorm(width, _VISION_EPS)
        self.out = nn.Linear(width, outputs)
        # Cut at 2, which is timm's default and next to never reached.
        linear_rules(self.out, InitRule("truncated", 0.02 * scale, 2 * scale))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        del valid_bt
        return self.out(self.norm(states_btd.mean(dim=1)))


class TextHead(nn.Module):
    """The vector of <s>: dense, tanh, linear (spec 7.3)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)
        for linear in (self.dense, self.out):
            linear_rules(linear, InitRule("normal", 0.02))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        del valid_bt
        return self.out(torch.tanh(self.dense(states_btd[:, 0])))


class SpeechHead(nn.Module):
    """Linear, mean over the real frames, linear."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, PROJECTION)
        self.out = nn.Linear(PROJECTION, outputs)

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        pooled_bd = mean_over_positions(self.dense(states_btd), valid_bt)
        return self.out(pooled_bd.to(self.out.weight.dtype))


class CtcHead(nn.Module):
    """A character, or the blank, at every frame (spec 7.1)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, outputs)
        bound = math.sqrt(6 / (width + outputs))
        linear_rules(self.out, InitRule("uniform", -bound, bound))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, T, outputs)."""
        del valid_bt
        return self.out(states_btd)


class TaskModel(Student):
    """The pretrained encoder (without predictor; 1.0 vision also without its final norm) and the head of a task."""

    def __init__(self, config: ModelConfig, task: TaskConfig) -> None:
        """Parameters are unfilled until `initialize` and the pretrained weights are written."""
        super().__init__(config, parts=TeacherParts())
        [modality] = config.modalities
        width, outputs = config.backbone.width, outputs_of(task)
        self.head: nn.Module
        if task.kind == "ctc":
            self.head = CtcHead(width, outputs)
        elif modality == "vision":
            self.head = ImageHead(width, outputs, scale=1.0 if config.visible_only else 0.001)
        else:
            self.head = TextHead(width, outputs) if modality == "text" else SpeechHead(width, outputs)
        self.ctc: CtcConfig | None = task.ctc if task.kind == "ctc" else None
        stem = self._stem(modality)
        if isinstance(stem.features, SpeechFeatures) and isinstance(stem.context, SpeechContext):
            stem.features.frozen_convs = True
            if self.ctc is not None:
                stem.context.channel_mask = (self.ctc.channel_mask, self.ctc.channel_mask_length)

    def forward(  # type: ignore[override]  # logits, not predictions of a teacher
        self, batch: Batch, draw: Draw, *, learns: bool = True
    ) -> Tensor:
        """Logits: (B, outputs), for CTC (B, T, outputs). In training, frames and channels are hidden for CTC.

        `learns` False: no gradient reaches the encoder. Under ZeRO-3 all ranks must call, with the same modality.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            states_btd = self.states(batch, draw)
        return self.head(states_btd, self.valid_positions(batch))

    def states(self, batch: Batch, draw: Draw) -> Tensor:
        """Output (B, T, D) of the last block, without extra tokens."""
        features_btd = self._features(batch, batch.inputs)
        hides = self.training and self.ctc is not None and self.ctc.time_mask > 0
        if hides and self.config.visible_only:
            features_btd = self._with_noise(features_btd, batch, draw)
        # In 1.0 the context layer puts its learned vector at masked frames; in 2.0 it would remove them.
        masked = hides and not self.config.visible_only
        carry = self._enter(batch, features_btd, self.valid_positions(batch), masked=masked)
        self.run_blocks(batch, carry, draw)
        return carry.states_rsd[:, carry.extra_tokens :]

    def _with_noise(self, features_btd: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """Noise at masked frames (spec 7.1)."""
        assert self.ctc is not None
        keys_b = stateless.row_keys(stateless.row_keys(batch.sample_ids, draw.seed, draw.step), "mask noise")
        noise_btd = self.ctc.noise_std * stateless.normal(keys_b, features_btd[0].numel()).view_as(features_btd)
        return torch.where(batch.masked_rt[..., None], noise_btd.to(features_btd.dtype), features_btd)
