"""An encoder with a head. Encoder parameters are named as in pretraining, the head's are below `head`."""

from typing import cast

import torch
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.labels import Vocabulary
from d2v_scale.data2vec import stateless
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.heads import CtcHead
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem import Stem
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student


def outputs_of(task: TaskConfig) -> int:
    """Outputs of a task's head."""
    if task.kind == "ctc":
        return len(Vocabulary(task.ctc.letters))
    if task.kind == "regress":
        return 1
    assert task.classes is not None, "the loader knows the number of classes"
    return task.classes


class TaskModel(nn.Module):
    """The pretrained encoder (without predictor; 1.0 vision also without its final norm) and the head of a task."""

    def __init__(self, config: ModelConfig, task: TaskConfig) -> None:
        """Parameters are unfilled until `initialize` and the pretrained weights are written."""
        super().__init__()
        encoder = Student(config, parts=TeacherParts())
        # Its parts under their own names: initial values, checkpoints and exports go by them.
        for name, part in encoder.named_children():
            self.add_module(name, part)
        self._encoder = (encoder,)
        [modality] = config.modalities
        outputs = outputs_of(task)
        self.head: nn.Module
        if task.kind == "ctc":
            self.head = CtcHead(config.backbone.width, outputs)
        else:
            self.head = modalities.of(config, modality).build_head(outputs)
        self.ctc: CtcConfig | None = task.ctc if task.kind == "ctc" else None
        hidden = None if self.ctc is None else (self.ctc.channel_mask, self.ctc.channel_mask_length)
        cast(Stem, encoder.stems[modality]).fine_tune(hidden)

    @property
    def encoder(self) -> Student:
        """The network below the head."""
        return self._encoder[0]

    def train(self, mode: bool = True) -> "TaskModel":
        """Also the encoder, which is no part of its own: its parts are."""
        self.encoder.train(mode)
        return super().train(mode)

    def forward(self, batch: Batch, draw: Draw, *, learns: bool = True) -> Tensor:
        """Logits: (B, outputs), for CTC (B, T, outputs). In training, frames and channels are hidden for CTC.

        `learns` False: no gradient reaches the encoder. Under ZeRO-3 all ranks must call, with the same modality.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            states_btd = self.states(batch, draw)
        return self.head(states_btd, self.encoder.valid_positions(batch))

    def states(self, batch: Batch, draw: Draw) -> Tensor:
        """Output (B, T, D) of the last block, without extra tokens."""
        hides = self.training and self.ctc is not None and self.ctc.time_mask > 0
        if not hides:
            return self.encoder.encode(batch, draw)
        # In 1.0 the context layer puts its learned vector at masked frames; in 2.0 it would remove them.
        if not self.encoder.config.visible_only:
            return self.encoder.encode(batch, draw, masked=True)
        features_btd = self.encoder.stem_features(batch)
        return self.encoder.encode(batch, draw, self._with_noise(features_btd, batch, draw))

    def _with_noise(self, features_btd: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """Noise at masked frames (spec 7.1)."""
        assert self.ctc is not None
        keys_b = stateless.row_keys(stateless.row_keys(batch.sample_ids, draw.seed, draw.step), "mask noise")
        noise_btd = self.ctc.noise_std * stateless.normal(keys_b, features_btd[0].numel()).view_as(features_btd)
        return torch.where(batch.masked_rt[..., None], noise_btd.to(features_btd.dtype), features_btd)
