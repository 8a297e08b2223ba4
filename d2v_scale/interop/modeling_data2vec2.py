"""data2vec 2.0 encoders for speech and vision, as Hugging Face models of their own.

This file and the two that it imports travel with exported weights and need torch and transformers only. The
architectures are not those of `Data2VecAudioModel` (no ALiBi there) or of any image class (post-norm with fixed
positions), so loading the weights into one of them would be silently wrong. Options, outputs and methods are those of
transformers' data2vec classes; what this architecture lacks raises.

Speech: 16 kHz waveforms, each normalised to zero mean and unit variance, in `input_values`. Vision: `pixel_values`;
position 0 of the output is the CLS token.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
)

from .configuration_data2vec2 import Data2Vec2AudioConfig, Data2Vec2Config, Data2Vec2VisionConfig
from .layers_data2vec2 import AlibiScale, Block, SpeechContext, SpeechFeatures, VisionContext, VisionFeatures


class Data2Vec2PreTrainedModel(PreTrainedModel):
    """What encoders and heads have in common."""

    config_class: type = Data2Vec2Config
    base_model_prefix = "data2vec2"
    supports_gradient_checkpointing = True
    # The trainer divides the loss by the steps that it accumulates.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config):
        config.refuse_other_architectures()
        super().__init__(config)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AlibiScale):
            init.ones_(module.scale)
        elif isinstance(module, VisionContext):
            init.normal_(module.cls)
        elif getattr(module, "layer_weights", None) is not None:
            init.constant_(module.layer_weights, 1 / len(module.layer_weights))

    def _given(self, output, return_dict):
        """`output`, or a tuple of what is in it where the caller or the configuration wants one."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def freeze_base_model(self):
        """Train the head alone."""
        for parameter in self.base_model.parameters():
            parameter.requires_grad = False


class Data2Vec2AudioPreTrainedModel(Data2Vec2PreTrainedModel):
    """What models of speech have in common."""

    config_class = Data2Vec2AudioConfig
    main_input_name = "input_values"
    input_modalities = "audio"

    def freeze_feature_encoder(self):
        """Do not train the convolutions over the waveform."""
        self.base_model.features.freeze_convolutions()

    def frames_of(self, samples):
        """Frames that the convolutions make of this many samples."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def _get_feat_extract_output_lengths(self, input_lengths, add_adapter=None):
        return self.frames_of(input_lengths)

    def _get_feature_vector_attention_mask(self, feature_vector_length, attention_mask, add_adapter=None):
        """bool (B, T) of a mask over samples. A row of padding alone keeps its first frame: its numbers mean nothing,
        but are finite."""
        frames = self.frames_of(attention_mask.long().sum(-1)).clamp(min=1)
        return torch.arange(feature_vector_length, device=attention_mask.device)[None] < frames[:, None]


def run_blocks(model, x, bias, output_attentions, output_hidden_states):
    """(output, states before and after every block or None, attention weights or None); asked for by the caller, else
    by the configuration."""
    config = model.config
    output_attentions = config.output_attentions if output_attentions is None else output_attentions
    output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    states, attentions = [x], []
    for block in model.blocks:
        if not (model.training and config.layerdrop > 0 and torch.rand(()) < config.layerdrop):
            call = block
            if block.gradient_checkpointing and model.training:
                call = functools.partial(block._gradient_checkpointing_func, block.__call__)
            x, weights = call(x, bias, output_attentions)
            attentions.append(weights)
        states.append(x)
    return x, tuple(states) if output_hidden_states else None, tuple(attentions) if output_attentions else None


def blocks_of(config):
    """All blocks; later ones lose more branches while training."""
    last = max(config.depth - 1, 1)
    return nn.ModuleList(Block(config, config.drop_path_rate * i / last) for i in range(config.depth))


class Data2Vec2AudioModel(Data2Vec2AudioPreTrainedModel):
    """The encoder of speech. `last_hidden_state` (B, T, D) is the last block's output; there is no norm after it."""

    def __init__(self, config):
        super().__init__(config)
        self.features = SpeechFeatures(config)
        self.context = SpeechContext(config)
        if config.alibi:
            self.bias = AlibiScale(config)
        self.blocks = blocks_of(config)
        self.post_init()

    def forward(
        self,
        input_values,
        attention_mask=None,
        mask_time_indices=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`attention_mask` (B, samples): 1 where the waveform is real. Padded frames are not attended to; as in
        pretraining, the positional convolutions see them. `mask_time_indices` bool (B, T): frames to hide."""
        x, features = self.features(input_values)
        valid = None
        if attention_mask is not None:
            valid = self._get_feature_vector_attention_mask(x.shape[1], attention_mask)
        x = self.context(self._masked(x, mask_time_indices, valid))
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        bias = self.bias(x.shape[1])[None].to(x.dtype) if hasattr(self, "bias") else None
        if valid is not None:
            zeros = torch.zeros(1, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
            bias = (zeros if bias is None else bias).masked_fill(~valid[:, None, None, :], -math.inf)
        x, states, attentions = run_blocks(self, x, bias, output_attentions, output_hidden_states)
        output = Wav2Vec2BaseModelOutput(
            last_hidden_state=x, extract_features=features, hidden_states=states, attentions=attentions
        )
        return self._given(output, return_dict)

    def _masked(self, x, mask_time_indices, valid):
        """SpecAugment, as transformers' classes draw it; what is hidden is zero, as in fine-tuning of 2.0."""
        config, (rows, length, width) = self.config, x.shape
        augments = self.training and config.apply_spec_augment
        if augments and max(config.mask_time_prob, config.mask_feature_prob) > 0:
            # Here, as it imports much that an encoder does not need.
            from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices
        if mask_time_indices is None and augments and config.mask_time_prob > 0:
            shape, least = (rows, length), config.mask_time_min_masks
            drawn = _compute_mask_indices(shape, config.mask_time_prob, config.mask_time_length, valid, least)
            mask_time_indices = torch.from_numpy(drawn).to(x.device)
        if mask_time_indices is not None:
            x = x.masked_fill(mask_time_indices[..., None], 0.0)
        if augments and config.mask_feature_prob > 0:
            shape, least = (rows, width), config.mask_feature_min_masks
            drawn = _compute_mask_indices(shape, config.mask_feature_prob, config.mask_feature_length, None, least)
            x = x.masked_fill(torch.from_numpy(drawn).to(x.device)[:, None], 0.0)
        return x


class Data2Vec2VisionPreTrainedModel(Data2Vec2PreTrainedModel):
    """What models of images have in common."""

    config_class = Data2Vec2VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)


class Data2Vec2VisionModel(Data2Vec2VisionPreTrainedModel):
    """The encoder of images. `last_hidden_state` (B, 1 + T, D) is the last block's output, CLS first; there is no norm
    after it."""

    def __init__(self, config):
        super().__init__(config)
        self.features = VisionFeatures(config)
        self.context = VisionContext(config)
        self.blocks = blocks_of(config)
        self.post_init()

    def get_input_embeddings(self):
        """The patches' projection."""
        return self.features.patch

    def forward(
        self,
        pixel_values,
        bool_masked_pos=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=False,
        return_dict=None,
    ):
        """Images of another size than `config.image_size` have more or fewer positions; with
        `interpolate_pos_encoding` they are laid over those of pretraining."""
        if bool_masked_pos is not None:
            raise ValueError("bool_masked_pos: a data2vec 2.0 encoder has no mask token.")
        x = self.context(self.features(pixel_values), interpolate_pos_encoding)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        x, states, attentions = run_blocks(self, x, None, output_attentions, output_hidden_states)
        output = BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=states, attentions=attentions)
        return self._given(output, return_dict)


class Data2Vec2ForCTC(Data2Vec2AudioPreTrainedModel):
    """A character, or the blank (number `pad_token_id`), at every frame of speech."""

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2AudioModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_values,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`labels`: characters (B, U), filled with -100."""
        if labels is not None and labels.numel() and labels.max() >= self.config.vocab_size:
            raise ValueError(f"labels go up to {int(labels.max())}, but vocab_size is {self.config.vocab_size}.")
        outputs = self.data2vec2(input_values, attention_mask, None, output_attentions, output_hidden_states, True)
        states = F.dropout(outputs.last_hidden_state, self.config.final_dropout, self.training)
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
            with torch.backends.cudnn.flags(enabled=False):
                loss = F.ctc_loss(
                    logits.float().log_softmax(-1).transpose(0, 1),
                    labels.clamp(min=0),
                    self.frames_of(mask.long().sum(-1)).clamp(min=1),
                    (labels >= 0).sum(-1),
                    blank=self.config.pad_token_id,
                    reduction=self.config.ctc_loss_reduction,
                    zero_infinity=self.config.ctc_zero_infinity,
                )
        output = CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._given(output, return_dict)


class Data2Vec2ForImageClassification(Data2Vec2VisionPreTrainedModel):
    """Mean of the patches, norm, linear."""

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2VisionModel(config)
        self.head_norm = nn.LayerNorm(config.width, 1e-6)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=False,
        return_dict=None,
    ):
        """`labels`: classes (B,); of several labels (B, labels); of a regression (B,) or (B, labels)."""
        outputs = self.data2vec2(
            pixel_values, None, output_attentions, output_hidden_states, interpolate_pos_encoding, True
        )
        logits = self.classifier(self.head_norm(outputs.last_hidden_state[:, 1:].mean(1)))
        loss = None if labels is None else label_loss(self.config, logits, labels)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._given(output, return_dict)


def label_loss(config, logits, labels):
    """By `config.problem_type`; where it says nothing, by the number and the type of the labels."""
    kind, logits = config.problem_type, logits.float()
    if kind is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        kind = "single_label_classification" if whole else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else kind
    if kind == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels.float())
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))


class _OverLayers(Data2Vec2AudioPreTrainedModel):
    """The encoder, and a learned mean over its layers' outputs where `use_weighted_layer_sum` says so."""

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2AudioModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.full((config.depth + 1,), 1 / (config.depth + 1)))

    def encode(self, input_values, attention_mask, output_attentions, output_hidden_states):
        """The encoder's outputs, and (B, T, D) for the head."""
        weighted = self.config.use_weighted_layer_sum
        wanted = True if weighted else output_hidden_states
        outputs = self.data2vec2(input_values, attention_mask, None, output_attentions, wanted, True)
        x = outputs.last_hidden_state
        if weighted:
            x = (torch.stack(outputs.hidden_states) * self.layer_weights.softmax(0).view(-1, 1, 1, 1)).sum(0)
            if not (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states):
                outputs.hidden_states = None
        return outputs, x


class Data2Vec2ForSequenceClassification(_OverLayers):
    """Speech: linear, mean over the real frames, linear."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = nn.Linear(config.width, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_values,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`labels` as of `Data2Vec2ForImageClassification`."""
        outputs, x = self.encode(input_values, attention_mask, output_attentions, output_hidden_states)
        x = self.projector(x).float()
        if attention_mask is None:
            pooled = x.mean(1)
        else:
            real = self._get_feature_vector_attention_mask(x.shape[1], attention_mask)
            pooled = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        loss = None if labels is None else label_loss(self.config, logits, labels)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._given(output, return_dict)


class Data2Vec2ForAudioFrameClassification(_OverLayers):
    """Speech: linear at every frame."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_values,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`labels` (B, T, labels): 1 at the class of a frame."""
        outputs, x = self.encode(input_values, attention_mask, output_attentions, output_hidden_states)
        logits, loss = self.classifier(x), None
        if labels is not None:
            flat = logits.float().view(-1, self.config.num_labels)
            loss = F.cross_entropy(flat, labels.view(-1, self.config.num_labels).argmax(1))
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._given(output, return_dict)
