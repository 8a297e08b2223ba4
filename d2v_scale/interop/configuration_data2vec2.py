"""Configuration of data2vec encoders whose classes travel with exported weights: 2.0 speech and vision, arrays,
and samples of several parts."""

# mypy: allow-untyped-defs, allow-untyped-calls

import math

from transformers import PretrainedConfig

# What a class of another architecture would read from config.json: sizes that none can be built with.
NO_OTHER_CLASS = {"hidden_size": 1, "num_attention_heads": 2}

# Options of transformers' data2vec classes with which this architecture would be another one.
FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "conv_bias": False,
    "add_adapter": False,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
}


class Data2Vec2Config(PretrainedConfig):
    """Sizes of a data2vec 2.0 speech or vision encoder, and how it is fine-tuned. `depth` counts all blocks.

    Options have the names and meanings of `Data2VecAudioConfig` and `Data2VecVisionConfig`. Regularisation is off until
    it is asked for; time and feature masks hide with zeros, as this architecture has no mask embedding.
    """

    model_type = "data2vec2"
    attribute_map = {  # noqa: RUF012  (as in every class of transformers)
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "num_conv_pos_embeddings": "pos_conv_depth",
        "conv_pos_kernel_size": "pos_conv_kernel",
        "num_conv_pos_embedding_groups": "pos_conv_groups",
    }
    # Of blocks; arrays may have others.
    norm_first = False
    key_bias = True
    layer_scale = False

    def __init__(
        self,
        modality="vision",
        width=768,
        depth=12,
        heads=12,
        ffn=3072,
        layer_norm_eps=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        image_size=224,
        patch_size=16,
        num_channels=3,
        conv_layers=(),
        pos_conv_depth=5,
        pos_conv_kernel=19,
        pos_conv_groups=16,
        alibi=True,
        vocab_size=32,
        classifier_proj_size=256,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        drop_path_rate=0.0,
        mask_time_prob=0.0,
        mask_time_length=10,
        mask_time_min_masks=2,
        mask_feature_prob=0.0,
        mask_feature_length=10,
        mask_feature_min_masks=0,
        apply_spec_augment=True,
        ctc_loss_reduction="sum",
        ctc_zero_infinity=True,
        use_weighted_layer_sum=False,
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    ):
        self.modality = modality
        self.width = width
        self.depth = depth
        self.heads = heads
        self.ffn = ffn
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.conv_layers = [list(layer) for layer in conv_layers]
        self.pos_conv_depth = pos_conv_depth
        self.pos_conv_kernel = pos_conv_kernel
        self.pos_conv_groups = pos_conv_groups
        self.alibi = alibi
        self.vocab_size = vocab_size
        self.classifier_proj_size = classifier_proj_size
        self.feat_proj_dropout = feat_proj_dropout
        self.final_dropout = final_dropout
        self.layerdrop = layerdrop
        self.drop_path_rate = drop_path_rate
        self.mask_time_prob = mask_time_prob
        self.mask_time_length = mask_time_length
        self.mask_time_min_masks = mask_time_min_masks
        self.mask_feature_prob = mask_feature_prob
        self.mask_feature_length = mask_feature_length
        self.mask_feature_min_masks = mask_feature_min_masks
        self.apply_spec_augment = apply_spec_augment
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.initializer_range = initializer_range
        if all(kwargs.get(key) == value for key, value in NO_OTHER_CLASS.items()):
            kwargs = {key: value for key, value in kwargs.items() if key not in NO_OTHER_CLASS}
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)

    @property
    def inputs_to_logits_ratio(self):
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def conv_dim(self):
        """Channels of each convolution over the waveform."""
        return [channels for channels, _, _ in self.conv_layers]

    @property
    def conv_kernel(self):
        """Kernel size of each convolution over the waveform."""
        return [kernel for _, kernel, _ in self.conv_layers]

    @property
    def conv_stride(self):
        """Stride of each convolution over the waveform."""
        return [stride for _, _, stride in self.conv_layers]

    @property
    def num_feat_extract_layers(self):
        """Convolutions over the waveform."""
        return len(self.conv_layers)

    def refuse_other_architectures(self):
        """Raises ValueError for an option with which transformers' classes would compute something else."""
        for key, value in FIXED.items():
            if getattr(self, key, value) != value:
                raise ValueError(f"{key}={getattr(self, key)!r}: a data2vec 2.0 encoder has {key}={value!r} only.")

    def to_dict(self):
        """As config.json has it."""
        return {**super().to_dict(), **NO_OTHER_CLASS}


class Data2Vec2AudioConfig(Data2Vec2Config):
    """Of speech. Transformers remembers one model to a configuration class."""

    def __init__(self, modality="speech", **kwargs):
        super().__init__(modality=modality, **kwargs)


class Data2Vec2VisionConfig(Data2Vec2Config):
    """Of images."""

    def __init__(self, modality="vision", **kwargs):
        super().__init__(modality=modality, **kwargs)


class Data2Vec2ArrayConfig(Data2Vec2Config):
    """Of arrays along 1 to 4 axes, in 1.0 and 2.0. `patch` and `extents`: steps along each of `axes`, of a patch and of
    every array, padding included."""

    def __init__(
        self,
        modality="array",
        axes=("time",),
        patch=(1,),
        extents=(2,),
        positions="sincos",
        extra_tokens=0,
        mask_token=False,
        context_norm=True,
        norm_first=False,
        key_bias=True,
        layer_scale=False,
        final_norm=False,
        **kwargs,
    ):
        self.axes = list(axes)
        self.patch = list(patch)
        self.extents = list(extents)
        self.positions = positions
        self.extra_tokens = extra_tokens
        self.mask_token = mask_token
        self.context_norm = context_norm
        self.norm_first = norm_first
        self.key_bias = key_bias
        self.layer_scale = layer_scale
        self.final_norm = final_norm
        if not 1 <= len(self.axes) <= 4 or not len(self.axes) == len(self.patch) == len(self.extents):
            raise ValueError(f"axes, patch and extents have {len(self.axes)}, {len(self.patch)}, {len(self.extents)}.")
        super().__init__(modality=modality, **kwargs)

    @property
    def grid(self):
        """Patches along each axis."""
        return tuple(extent // patch for extent, patch in zip(self.extents, self.patch, strict=True))


class Data2Vec2JointConfig(Data2Vec2Config):
    """Of samples of several parts, in 1.0 and 2.0. `parts`: of each its `name`, how it is read (`kind`: patches, waves
    or tokens) and the sizes of its stem, in the order of the sequence. `depth` counts the blocks after the stems'."""

    def __init__(
        self,
        modality="joint",
        parts=(),
        norm_first=False,
        key_bias=True,
        layer_scale=False,
        final_norm=False,
        **kwargs,
    ):
        self.parts = [dict(part) for part in parts]
        self.norm_first = norm_first
        self.key_bias = key_bias
        self.layer_scale = layer_scale
        self.final_norm = final_norm
        super().__init__(modality=modality, **kwargs)
